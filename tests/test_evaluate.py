"""Evaluation: equal to independent computations, intervals at their stated rate, resumed, refused with a reason."""

import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

import unnorm
import unnorm.evaluation.run
from tests.conftest import POSITIONS, VOCAB, Cli, randomize, stdlib_text
from unnorm.data import as_dataset
from unnorm.errors import RunInterruptedError, UnnormError
from unnorm.evaluation import Results, Score, evaluate, evaluate_model, metrics
from unnorm.evaluation.corpora import open_corpus
from unnorm.evaluation.harness import _interval, against
from unnorm.evaluation.intervals import bootstrap_interval, paired_share_interval, share_interval
from unnorm.evaluation.metrics import calibration
from unnorm.evaluation.suites import choose
from unnorm.report.evaluation_page import render_evaluation
from unnorm.terminal import evaluation_tables

BLOCKS = 120


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """nanoGPT's files: `val.bin` beside `train.bin`, of real text in short documents."""
    lines = stdlib_text("os", "inspect", "pathlib", "typing").split("\n\n")
    ids = [i for text in lines for i in [*tiny_tokenizer(text)["input_ids"], 0]][: BLOCKS * POSITIONS]
    directory = tmp_path_factory.mktemp("tokens")
    np.array(ids[:1000], dtype="<u2").tofile(directory / "train.bin")
    np.array(ids, dtype="<u2").tofile(directory / "val.bin")
    return directory / "train.bin"


def held_out(tokens: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(tokens.parent / "val.bin", dtype="<u2").astype(np.int64)).view(-1, POSITIONS)


def plain_transformers(ids: torch.Tensor, model: Any, original: Any) -> dict[str, float]:
    """The same numbers with nothing of ours."""
    with torch.no_grad():
        q, p = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, original))
    m = torch.log((q.exp() + p.exp()) / 2)
    loss, base = (-x[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1) for x in (q, p))
    right = (q[:, :-1].argmax(-1) == ids[:, 1:]).double()
    confidence = q[:, :-1].exp().amax(-1)
    bins = [(confidence > i / 15) & (confidence <= (i + 1) / 15) for i in range(15)]
    top5 = [set(row) for row in q.topk(5).indices.flatten(0, 1).tolist()]
    theirs = p.topk(5).indices.flatten(0, 1).tolist()
    return {
        "loss": loss.mean().item(),
        "perplexity": loss.mean().exp().item(),
        "difference": (loss.mean() - base.mean()).item(),
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "jsd": ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)).mean().item() / 2,
        "top1_agreement": (q.argmax(-1) == p.argmax(-1)).double().mean().item(),
        "top5_agreement": sum(len(a & set(b)) for a, b in zip(top5, theirs, strict=True)) / 5 / len(theirs),
        "entropy": -(q.exp() * q).sum(-1).mean().item(),
        "entropy_difference": ((p.exp() * p).sum(-1) - (q.exp() * q).sum(-1)).mean().item(),
        "ece": sum(abs(float((right - confidence)[b].sum())) for b in bins) / right.numel(),
    }


@pytest.fixture(scope="module")
def other_model(tiny_model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The tiny model with changed weights: far enough for every measure to differ."""
    model = deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def other_dir(
    tmp_path_factory: pytest.TempPathFactory, other_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    directory = tmp_path_factory.mktemp("models") / "other"
    other_model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


class TestNumbers:
    @pytest.mark.parametrize("rows", [metrics._AT_ONCE // VOCAB, 7])
    def test_equal_to_plain_transformers(
        self, rows: int, tokens: Path, tiny_model_dir: Path, other_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metrics, "_AT_ONCE", rows * VOCAB)
        models = [AutoModelForCausalLM.from_pretrained(d).eval() for d in (other_dir, tiny_model_dir)]
        expected = plain_transformers(held_out(tokens), *models)
        (row,) = evaluate(str(other_dir), str(tiny_model_dir), str(tokens), tokens=10**6)
        found = row.to_json()
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)
        assert row.kl > 0.01 and row.top1_agreement < 1 and row.tokens == BLOCKS * (POSITIONS - 1)  # type: ignore[operator]

    def test_losses_by_position(self, tokens: Path, tiny_model: GPT2LMHeadModel, tiny_model_dir: Path) -> None:
        ids = held_out(tokens)
        with torch.no_grad():
            loss = F.cross_entropy(tiny_model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        (row,) = evaluate([str(tiny_model_dir)], data=[str(tokens)], tokens=10**6)
        assert row.position_loss == pytest.approx(loss.mean(0).tolist(), abs=1e-5)
        assert row.kl is None and row.difference is None

    def test_bits_per_byte(
        self, text_file: Path, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (row,) = evaluate(str(tiny_model_dir), data=str(text_file), tokens=10**6)
        corpus = open_corpus("text", str(text_file), tiny_tokenizer, VOCAB, POSITIONS, 10**6)
        rows = np.asarray(corpus.blocks["input_ids"][:])
        # Byte-level BPE: each letter of a token stands for one byte, and end-of-text for none.
        pieces = [tiny_tokenizer.convert_ids_to_tokens(r[1:].tolist()) for r in rows]
        size = sum(len(piece) for of_row in pieces for piece in of_row if piece != tiny_tokenizer.eos_token)
        assert corpus.text_bytes == size
        assert row.bits_per_byte == pytest.approx(row.loss * row.tokens / math.log(2) / size)

    def test_a_model_against_itself(self, tokens: Path, tiny_model_dir: Path) -> None:
        (row,) = evaluate(str(tiny_model_dir), str(tiny_model_dir), str(tokens), tokens=2000)
        assert (row.kl, row.difference, row.difference_ci, row.top5_agreement) == (0, 0, (0, 0), 1)

    def test_blocks_that_overflow_are_counted_and_the_others_measured(
        self, tokens: Path, tiny_model: GPT2LMHeadModel
    ) -> None:
        ids = held_out(tokens)[:12]
        model = randomize(deepcopy(tiny_model), 1)
        bad = ids[:, 0] == ids[3, 0]
        assert 0 < bad.sum() < len(bad)

        def overflow(_: Any, __: Any, kwargs: Any, output: Any) -> Any:
            output.logits[kwargs["input_ids"][:, 0] == ids[3, 0]] = torch.nan
            return output

        expected, whole = (
            evaluate_model(model, as_dataset(blocks.numpy()), tiny_model, name="m", data="d")
            for blocks in (ids[~bad], ids)
        )
        assert (whole.blocks, whole.overflowed_blocks, whole.loss_elsewhere, whole.kl_elsewhere) == (12, 0, None, None)
        model.register_forward_hook(overflow, with_kwargs=True)
        found = evaluate_model(model, as_dataset(ids.numpy()), tiny_model, name="m", data="d")
        assert (found.blocks, found.overflowed_blocks) == (12, bad.sum())
        assert math.isnan(found.loss) and found.kl is not None and math.isnan(found.kl)
        assert found.loss_elsewhere == pytest.approx(expected.loss)
        assert found.kl_elsewhere == pytest.approx(expected.kl)
        protocol = {"corpora": [], "tasks": [], "interval": "none", "dtype": "float32", "device": "cpu"}
        results = Results((found, replace(whole, model="other")), (), (), protocol)
        text = StringIO()
        Console(width=120, file=text).print(evaluation_tables(results))
        (line,) = (line for line in text.getvalue().splitlines() if "overflow" in line)
        assert line.startswith(f"m overflows in {bad.sum()} of 12 blocks of d; in the others loss {expected.loss:.4f}")
        (line,) = (line for line in render_evaluation(results).splitlines() if "overflows" in line)
        assert f"m overflows in {bad.sum()} of 12 blocks of d; in the others KL {expected.kl:.3f}" in line

    @pytest.mark.parametrize("whose", ["original", "model, after the last token"])
    def test_no_comparison_of_what_is_not_a_number(
        self, whose: str, tokens: Path, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """The model's loss is a number on all tokens, and its KL is not."""
        ids = held_out(tokens)[:6]
        model, original = randomize(deepcopy(tiny_model), 1), deepcopy(tiny_model)
        at = slice(None) if whose == "original" else slice(-1, None)

        def overflow(_: Any, __: Any, kwargs: Any, output: Any) -> Any:
            output.logits[kwargs["input_ids"][:, 0] == ids[3, 0], at] = torch.nan
            return output

        bad = ids[:, 0] == ids[3, 0]
        expected = evaluate_model(model, as_dataset(ids[~bad].numpy()), original, tokenizer=tiny_tokenizer)
        (original if whose == "original" else model).register_forward_hook(overflow, with_kwargs=True)
        found = evaluate_model(model, as_dataset(ids.numpy()), original, name="m", data="d", tokenizer=tiny_tokenizer)
        assert math.isfinite(found.loss) and found.kl is not None and math.isnan(found.kl)
        assert found.kl_elsewhere == pytest.approx(expected.kl)
        assert expected.comparison is not None and found.comparison is None
        protocol = {"corpora": [], "tasks": [], "interval": "none", "dtype": "float32", "device": "cpu"}
        assert "KL" in render_evaluation(Results((found,), (), (), protocol))

    def test_calibration_of_a_coin(self) -> None:
        """Confidence 0.8 and right 60% of the time is wrong by 0.2; a certain and right half adds nothing."""
        confidence = np.array([0.8] * 100 + [1.0] * 100)
        correct = np.array([1] * 60 + [0] * 40 + [1] * 100)
        error, bins = calibration(confidence, correct)
        assert error == pytest.approx(0.1)
        assert [(b.tokens, round(b.accuracy, 9), round(b.confidence, 9)) for b in bins] == [
            (100, 0.6, 0.8),
            (100, 1, 1),
        ]

    def test_original_stands_beside_the_models(self, tokens: Path, tiny_model_dir: Path, other_dir: Path) -> None:
        results = evaluate([str(other_dir)], str(tiny_model_dir), str(tokens), tokens=2000)
        (alone,) = evaluate([str(tiny_model_dir)], data=str(tokens), tokens=2000)
        (beside,) = results.original
        assert beside.loss == alone.loss and beside.loss_ci == alone.loss_ci and beside.ece == alone.ece
        assert results[0].difference == pytest.approx(results[0].loss - alone.loss, abs=1e-9)


class TestIntervals:
    @pytest.mark.parametrize(("units", "least"), [(15, 0.925), (60, 0.93)])
    def test_cover_the_truth_at_the_stated_rate(self, units: int, least: float) -> None:
        """Documents of different lengths and levels; tokens within one share its level."""
        generator = np.random.default_rng(3)
        covered = []
        for _ in range(1000):
            sizes = generator.integers(50, 400, units)
            levels = 3 + 0.4 * generator.gamma(2, 1, units) - 0.8
            sums = sizes * levels + 2 * np.sqrt(sizes) * generator.standard_normal(units)
            low, high = bootstrap_interval(sums, sizes)
            covered.append(low <= 3 <= high)
        assert least < np.mean(covered) < 0.97

    def test_shares_cover_the_truth(self) -> None:
        """On average over shares, as is all that can be had with whole numbers of right items."""
        generator = np.random.default_rng(4)
        truths = generator.uniform(0.02, 0.98, 4000)
        found = [share_interval(float(n), 200) for n in generator.binomial(200, truths)]
        covered = [low <= truth <= high for truth, (low, high) in zip(truths, found, strict=True)]
        assert 0.94 < np.mean(covered) < 0.96
        assert share_interval(0, 200)[1] > 0.01  # None of 200 right is no proof that none ever is.

    def test_differences_of_shares_cover_the_truth(self) -> None:
        generator = np.random.default_rng(5)
        covered = []
        for better, worse in ((0.04, 0.02), (0.01, 0.01), (0.15, 0.1)):
            for _ in range(1500):
                changes = generator.choice([1.0, -1.0, 0.0], 100, p=[better, worse, 1 - better - worse])
                low, high = paired_share_interval(changes.tolist())
                covered.append(low <= better - worse <= high)
        assert 0.94 < np.mean(covered) < 0.99
        assert paired_share_interval([0.0] * 50)[1] > 0.02

    def test_one_unit_that_differs_gives_no_absurd_interval(self) -> None:
        low, high = bootstrap_interval([-1.25] + [0.0] * 23)
        assert -1 < low < -1.25 / 24 < high < 0.5

    @pytest.mark.filterwarnings("error")
    def test_classes_and_predictions_are_no_weighted_perplexity(self) -> None:
        """Values of F1 and MCC are pairs too."""
        assert _interval({item: (item % 2, 0) for item in range(20)}, 0.0) == (None, {})

    def test_few_units_have_wide_intervals(self) -> None:
        low, high = bootstrap_interval([1.0, 2.0])
        assert (low, high) == pytest.approx((1.5 - 12.706 / 2, 1.5 + 12.706 / 2))
        assert bootstrap_interval([2.0]) is bootstrap_interval([1.0, math.nan, 2.0]) is None

    def test_a_planted_difference_is_found_paired_and_missed_unpaired(
        self, tokens: Path, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        corpus = open_corpus("val", str(tokens), tiny_tokenizer, VOCAB, POSITIONS, 10**6)

        def warmer(by: float) -> GPT2LMHeadModel:
            model = deepcopy(tiny_model)
            with torch.no_grad():
                for parameter in model.transformer.ln_f.parameters():
                    parameter *= by
            return model

        low, high = 1.0, 1.2
        for _ in range(14):  # Where sharper logits cost 0.003 nats.
            middle = (low + high) / 2
            row = evaluate_model(warmer(middle), corpus.blocks, tiny_model)
            low, high = (middle, high) if row.difference < 0.003 else (low, middle)  # type: ignore[operator]
        assert row.difference == pytest.approx(0.003, abs=2e-4)
        assert row.difference_ci is not None and 0.001 < row.difference_ci[0] < 0.003 < row.difference_ci[1]

        original = evaluate_model(tiny_model, corpus.blocks)
        generator = np.random.default_rng(0)
        means = [np.array(r.unit_losses) / np.array(r.unit_tokens) for r in (row, original)]
        apart = [np.subtract(*(m[generator.integers(len(m), size=len(m))].mean() for m in means)) for _ in range(2000)]
        assert np.quantile(apart, 0.025) < 0 < np.quantile(apart, 0.975)
        assert row.loss_ci[0] < original.loss_ci[1]

    def test_over_documents_where_there_are_enough(
        self, tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        texts = stdlib_text("os", "inspect", "typing").split("\n\n")[:900]
        path = tmp_path / "many.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        corpus = open_corpus("many", str(path), tiny_tokenizer, VOCAB, POSITIONS, 10**6)
        kind, units = corpus.units()
        flat = np.asarray(corpus.blocks["input_ids"][:]).ravel()
        # A unit ends with the separator, and only there.
        numbers = corpus.documents.ravel()  # type: ignore[union-attr]
        assert kind == "documents" and np.array_equal(np.diff(numbers) > 0, flat[:-1] == 0)
        (row,) = evaluate(str(tiny_model_dir), data=str(path), tokens=10**6)
        assert (row.interval_over, row.units) == ("documents", units.max() + 1)
        assert sum(row.unit_tokens) == row.tokens
        assert sum(row.unit_losses) == pytest.approx(row.loss * row.tokens)

    def test_protocol_names_the_very_tokens(self, tokens: Path, tiny_model_dir: Path) -> None:
        import hashlib

        results = evaluate(str(tiny_model_dir), data=f"mine={tokens}", tokens=10**6)
        (corpus,) = results.protocol["corpora"]
        assert corpus["tokens_sha256"] == hashlib.sha256(held_out(tokens).numpy().astype("<i4").tobytes()).hexdigest()
        keys = ("corpus", "context", "stride", "blocks", "predicted_tokens", "held_out")
        expected = ("mine", POSITIONS, POSITIONS, BLOCKS, BLOCKS * (POSITIONS - 1), "val.bin")
        assert tuple(corpus[key] for key in keys) == expected
        assert corpus["separator"].startswith("<|endoftext|> (id 0)")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three benchmarks in the form of their files."""
    directory = tmp_path_factory.mktemp("benchmarks")
    words = stdlib_text("os").split()[200:]
    hella = [
        {"ctx": " ".join(words[i : i + 5]), "label": i % 4, "endings": [words[i + 5 + k] + " it" for k in range(4)]}
        for i in range(24)
    ]
    lambada = [{"context": " ".join(words[i : i + 4]), "continuation": words[i + 4][:6]} for i in range(24)]
    pages = "".join(f" = Page {i} = \n \n {' '.join(words[30 * i : 30 * i + 30])} \n \n" for i in range(12))
    paths = {"hellaswag": directory / "h.jsonl", "lambada": directory / "l.jsonl", "wikitext": directory / "w.txt"}
    for name, rows in (("hellaswag", hella), ("lambada", lambada)):
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths["wikitext"].write_text(pages)
    return paths


def named(files: dict[str, Path], *names: str) -> list[str]:
    return [f"{name}={files[name]}" for name in names or files]


class TestBenchmarks:
    def test_equal_to_lm_eval_alone(
        self, files: dict[str, Path], finished_run: Path, tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("lm_eval")
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks.wikitext import preprocess_wikitext

        pages = tmp_path / "pages.jsonl"
        split = files["wikitext"].read_text().split(" = Page ")[1:]
        pages.write_text("".join(json.dumps({"page": " = Page " + page}) + "\n" for page in split))
        mean = {"aggregation": "mean", "higher_is_better": True}
        configs = [
            {
                "task": "h",
                "dataset_kwargs": {"data_files": str(files["hellaswag"])},
                "output_type": "multiple_choice",
                "doc_to_text": "{{ctx}}",
                "doc_to_target": "{{label}}",
                "doc_to_choice": "endings",
                "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
            },
            {
                "task": "l",
                "dataset_kwargs": {"data_files": str(files["lambada"])},
                "output_type": "loglikelihood",
                "doc_to_text": "{{context}}",
                "doc_to_target": "{{' ' + continuation}}",
                "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", **mean}],
            },
            {
                "task": "w",
                "dataset_kwargs": {"data_files": str(pages)},
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
                "process_results": preprocess_wikitext.process_results,
                "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
            },
        ]
        alone = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(finished_run / "model"), "trust_remote_code": True},
            tasks=[{**config, "dataset_path": "json", "test_split": "train"} for config in configs],
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )["results"]
        results = evaluate(str(finished_run), str(tiny_model_dir), named(files))
        ours = {(s.task, s.metric): s for s in results.scores if s.model == str(finished_run)}
        expected = {
            (task, key.partition(",")[0]): value
            for task, of in (("hellaswag", "h"), ("lambada_openai", "l"), ("wikitext", "w"))
            for key, value in alone[of].items()
            if key.endswith(",none") and "stderr" not in key
        }
        assert {key: score.value for key, score in ours.items()} == pytest.approx(expected, rel=1e-6)
        assert len(expected) == 7 and 0 < ours["hellaswag", "acc"].value < 1
        for score in ours.values():
            assert score.ci is not None and score.ci[0] <= score.value <= score.ci[1]
        base = {(s.task, s.metric): s.value for s in results.scores if s.model == str(tiny_model_dir)}
        for key in (("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("lambada_openai", "acc")):
            assert ours[key].difference == pytest.approx(ours[key].value - base[key])

    def test_a_subset_is_drawn_by_seed(self, files: dict[str, Path], tiny_model_dir: Path) -> None:
        pytest.importorskip("lm_eval")
        chosen = []
        for seed in (0, 0, 1):
            results = evaluate(str(tiny_model_dir), data=named(files, "hellaswag"), items=10, seed=seed)
            score = results.scores[0]
            assert (score.items, score.of, len(results)) == (10, 24, 0)
            chosen.append(set(score.item_values))
        assert chosen[0] == chosen[1] != chosen[2]
        assert results.protocol["tasks"][0]["seed"] == 1

    def test_differences_are_of_the_same_items(self) -> None:
        score = Score("a", "t", "acc", 0.5, (0, 1), 4, 9, item_values={1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0})
        other = replace(score, model="b", item_values={3: 0.0, 4: 0.0, 5: 1.0, 6: 1.0})
        assert against(score, other).difference == 0.5
        with pytest.raises(UnnormError, match="no item of 't' in common"):
            against(score, replace(other, item_values={7: 1.0}))


class TestSuites:
    def test_sources_by_name(self, tmp_path: Path) -> None:
        (tmp_path / "a=b.txt").touch()
        data = ["books=x.txt", "lambada=l.jsonl", str(tmp_path / "a=b.txt"), "owner/name:subset"]
        choice = choose("quick", data, None, None, None, "cpu")
        assert choice.corpora == {
            "books": "x.txt",
            str(tmp_path / "a=b.txt"): str(tmp_path / "a=b.txt"),
            "owner/name:subset": "owner/name:subset",
        }
        assert choice.files == {"lambada_openai": "l.jsonl"}
        assert choice.tasks == ("hellaswag", "lambada_openai")

    def test_paper_by_name_and_from_files(self) -> None:
        choice = choose("paper", ["pile=p.jsonl", "openwebtext=o.jsonl"], None, None, "all", "cpu")
        assert choice.corpora == {"openwebtext": "o.jsonl", "pile": "p.jsonl", "pile-filtered": "p.jsonl"}
        assert choice.tasks == ("hellaswag",) and choice.items is None

    def test_tasks_are_added_or_left_out(self) -> None:
        assert choose("quick", None, ["none"], None, None, "cpu").tasks == ()
        assert choose(None, None, ["piqa,arc_easy"], None, None, "cpu").tasks == ("piqa", "arc_easy")
        assert choose(None, None, None, None, None, "cpu").corpora == {"stdlib": "stdlib"}
        assert choose("full", None, None, None, None, "cuda").items is None
        assert choose("full", None, None, None, None, "cpu").items == 1000

    def test_pile_filtered_has_only_tokens_of_openwebtext(
        self, tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        plain = stdlib_text("os")[:30_000].replace("~", "")
        (tmp_path / "owt.txt").write_text(plain)
        odd = [plain[i : i + 300] + ("~" if i % 2 else "") for i in range(0, 9000, 301)]
        (tmp_path / "pile.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in odd * 3))
        data = [f"openwebtext={tmp_path}/owt.txt", f"pile={tmp_path}/pile.jsonl"]
        results = evaluate(str(tiny_model_dir), data=data, suite="paper", tasks=["none"], tokens=10**5)
        sizes = {row.data: row.tokens for row in results}
        assert 0 < sizes["pile-filtered"] < sizes["pile"]

        (tmp_path / "pile.jsonl").write_text("".join(json.dumps({"text": "~" * 40}) + "\n" for _ in range(300)))
        with pytest.raises(UnnormError, match=r"Nothing is left of 'pile-filtered'.*Give more of that text"):
            evaluate(str(tiny_model_dir), data=data, suite="paper", tasks=["none"], tokens=10**5)

    def test_quick_of_three_models_with_page(
        self, cli: Cli, files: dict[str, Path], tokens: Path, tiny_model_dir: Path, other_dir: Path,
        finished_run: Path, tmp_path: Path,
    ) -> None:  # fmt: skip
        pytest.importorskip("lm_eval")
        data = [
            part for source in (*named(files, "hellaswag", "lambada"), f"code={tokens}") for part in ("--data", source)
        ]
        models = (tiny_model_dir, other_dir, finished_run)
        out = tmp_path / "out"
        options = ("--suite", "quick", "--tokens", "2k", "--device", "cpu", "--out", out)
        result = cli("evaluate", *models, "--against", tiny_model_dir, *options, *data, "--json")
        assert result.code == 0, result.err
        values = json.loads(result.out)
        assert values == json.loads((out / "evaluation.json").read_text())
        assert [row["model"] for row in values["results"]] == [str(model) for model in models]
        assert {(row["model"], row["task"]) for row in values["tasks"]} == {
            (str(model), task) for model in models for task in ("hellaswag", "lambada_openai")
        }
        for model in models:
            for on in ("code", "hellaswag", "lambada_openai"):
                assert f"{model} on {on}" in result.err
        page = (out / "evaluation.html").read_text()
        assert page.count('class="group"') == 2 and "default-src 'none'" in page
        assert f"other and {finished_run.name} against tiny" in page and "SHA-256 of the token ids" in page
        assert "SHA-256 of the items" in page
        assert "24 of 24" in page and "built-in" not in page

        shown = cli("evaluate", *models, "--against", tiny_model_dir, *options, *data)
        assert "less original's" in shown.out and "acc_norm" in shown.out
        assert "intervals over" in shown.out


def test_names_that_tell_models_apart() -> None:
    names = ("/a/run/model", "/a/other/model", "./x/control", "owner/name", "demo")
    scores = tuple(Score(name, "t", "acc", 0.5, None, 1, 1) for name in names)
    assert list(Results((), (), scores, {}).short_names.values()) == [
        "run/model",
        "other/model",
        "control",
        "owner/name",
        "demo",
    ]


class TestResume:
    def test_goes_on_where_it_stopped(
        self, tokens: Path, text_file: Path, tiny_model_dir: Path, other_dir: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        options = {"data": [f"a={tokens}", f"b={text_file}"], "tokens": 2000}
        models = [str(tiny_model_dir), str(other_dir)]
        whole = evaluate(models, models[0], **options)  # type: ignore[arg-type]

        def stop(row: dict[str, Any]) -> None:
            if row["kind"] == "phase" and row["text"] == f"{other_dir} on b":
                raise KeyboardInterrupt

        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            evaluate(models, models[0], watch=stop, **options)  # type: ignore[arg-type]
        with pytest.raises(RunInterruptedError, match="same command"):
            evaluate(models, models[0], out=out, watch=stop, **options)  # type: ignore[arg-type]
        assert len(list((out / "measurements").iterdir())) == 3

        measured: list[str] = []
        again = evaluate(models, models[0], out=out, watch=lambda row: measured.append(row.get("text", "")), **options)  # type: ignore[arg-type]
        assert [text for text in measured if " on " in text] == [f"{other_dir} on b"]
        assert again.to_json() == whole.to_json()
        assert (out / "evaluation.html").is_file()

    def test_what_changed_or_broke_is_measured_anew(
        self, tokens: Path, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model, out = tmp_path / "model", tmp_path / "out"

        def measured(**options: Any) -> bool:
            seen: list[str] = []
            evaluate(
                str(model),
                data=str(tokens),
                tokens=2000,
                out=out,
                watch=lambda r: seen.append(r.get("text", "")),
                **options,
            )
            return any(" on " in text for text in seen)

        tiny_tokenizer.save_pretrained(model)
        tiny_model.save_pretrained(model)
        assert measured() and not measured()
        assert measured(context=32)  # other blocks
        randomize(deepcopy(tiny_model), seed=9).save_pretrained(model)  # type: ignore[operator]
        assert measured() and not measured()  # other weights under the same name
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))
        assert measured() and not measured()  # computes something else with the same weights
        for path in (out / "measurements").iterdir():
            path.write_bytes(path.read_bytes()[:100])
        assert measured()

    def test_other_items_in_the_same_file_are_measured_anew(
        self, files: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("lm_eval")
        path, rows = tmp_path / "l.jsonl", files["lambada"].read_text().splitlines(keepends=True)

        def scores(part: list[str], out: Path) -> list[Any]:
            path.write_text("".join(part))
            results = evaluate(str(tiny_model_dir), data=f"lambada={path}", tasks="lambada_openai", out=out)
            return [(score.metric, score.value) for score in results.scores]

        first = scores(rows[:8], tmp_path / "out")
        second = scores(rows[8:16], tmp_path / "out")
        assert second == scores(rows[8:16], tmp_path / "fresh") != first


class TestRefused:
    def refusal(self, *arguments: Any, **options: Any) -> str:
        with pytest.raises(UnnormError) as caught:
            evaluate(*arguments, **options)
        return str(caught.value)

    def test_other_tokenizers(self, tiny_model: GPT2LMHeadModel, tiny_model_dir: Path, tmp_path: Path) -> None:
        tiny_model.save_pretrained(tmp_path / "m")
        vocab = json.loads((tiny_model_dir / "tokenizer.json").read_text())
        ids = vocab["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        for name in ("tokenizer_config.json",):
            (tmp_path / "m" / name).write_text((tiny_model_dir / name).read_text())
        (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(vocab))
        text = self.refusal(str(tmp_path / "m"), str(tiny_model_dir))
        assert "different tokenizers: 2 tokens, such as 'a'" in text and "same tokenizer" in text

    def test_benchmark_files(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval")
        path = tmp_path / "a.jsonl"
        model = str(tiny_model_dir)
        path.write_text('{"question": "?", "label": 0}\n')
        text = self.refusal(model, data=f"hellaswag={path}")
        assert "is no HellaSwag file: item 1 has no 'ctx' and no 'endings'" in text
        assert "It has: question, label. Needed: ctx, endings, label." in text
        path.write_text('{"ctx": "a", "endings": ["b"], "label": 3}\n')
        assert "has label 3, but 1 endings" in self.refusal(model, data=f"hellaswag={path}")
        assert "is no LAMBADA file" in self.refusal(model, data=f"lambada={path}")
        assert "No data at 'nothing.txt'" in self.refusal(model, data="wikitext=nothing.txt")
        path.write_text("")
        assert "is empty" in self.refusal(model, data=f"lambada={path}")
        path.write_text(json.dumps({"ctx": "a", "endings": ["b", "long " * 200], "label": 0}) + "\n")
        assert "longer than the context of 64" in self.refusal(model, data=f"hellaswag={path}")

    def test_tasks_that_can_not_be_had(self, tiny_model_dir: Path) -> None:
        pytest.importorskip("lm_eval")
        model = str(tiny_model_dir)
        assert "lm-eval has no task 'no-such-task'" in self.refusal(model, tasks=["no-such-task"])
        text = self.refusal(model, suite="quick")
        assert "--data hellaswag=PATH" in text and "--tasks none" in text

    def test_without_lm_eval(self, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("unnorm.evaluation.harness.find_spec", lambda name: None)
        assert "pip install 'unnorm[eval]'" in self.refusal(str(tiny_model_dir), suite="quick")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"suite": "huge"}, "There is: quick, full, paper"),
            ({"items": "few"}, "--items few"),
            ({"items": 0}, "--items 0"),
            ({"tokens": 0}, "--tokens 0"),
            ({"data": ["a=x.txt", "a=y.txt"]}, "names 'a' twice"),
            ({"data": "code=nothing.jsonl"}, "No data at 'nothing.jsonl'"),
        ],
    )
    def test_options(self, options: dict[str, Any], expected: str, tiny_model_dir: Path) -> None:
        assert expected in self.refusal(str(tiny_model_dir), **options)

    def test_out_is_something_else(self, tiny_model_dir: Path, tokens: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        text = self.refusal(str(tiny_model_dir), data=str(tokens), out=tmp_path)
        assert "holds something else than an evaluation" in text

    def test_no_model(self) -> None:
        assert "Name one at least" in self.refusal([])


class TestComparison:
    def test_contexts_and_distributions(
        self, tokens: Path, tiny_model_dir: Path, other_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (row,) = evaluate(str(other_dir), str(tiny_model_dir), str(tokens), tokens=10**6)
        comparison = row.comparison
        assert comparison is not None
        means = [np.mean(context.kl) for context in comparison.contexts]
        assert means == sorted(means, reverse=True)
        assert {context.why for context in comparison.contexts} >= {"kl", "typical"}
        assert sum(map(sum, comparison.loss_density)) == row.tokens
        assert sum(comparison.kl.counts) == sum(comparison.entropy_difference.counts) == BLOCKS * POSITIONS
        ids = held_out(tokens)
        models = [AutoModelForCausalLM.from_pretrained(d).eval() for d in (other_dir, tiny_model_dir)]
        context = comparison.contexts[0]
        block = ids[context.block : context.block + 1]
        length = len(context.tokens)
        with torch.no_grad():
            q, p = (
                torch.log_softmax(m(block).logits[0, context.start - 1 : context.start - 1 + length], -1)
                for m in models
            )
        expected = block[0, context.start : context.start + length]
        assert "".join(context.tokens) == tiny_tokenizer.decode(expected) or "\ufffd" in "".join(context.tokens)
        assert context.loss == pytest.approx((-q.gather(-1, expected[:, None])).squeeze().tolist(), abs=1e-3)
        assert context.kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-4)
        assert list(context.guess) == [tiny_tokenizer.decode([i]) for i in q.argmax(-1).tolist()]

    def test_is_part_of_a_runs_report(self, finished_run: Path) -> None:
        page = (finished_run / "report.html").read_text()
        assert "Token by token" in page
        assert page.count('class="group"') == 1 and page.count('class="context"') >= 3
        for place in ("density", "kl", "entropy"):
            assert page.count(f'id="{place}"') == 1

    def test_texts_are_escaped_on_the_page(self, tokens: Path, tiny_model_dir: Path, other_dir: Path) -> None:
        results = evaluate(str(other_dir), str(tiny_model_dir), str(tokens), tokens=2000)
        row = results[0]
        assert row.comparison is not None
        context = row.comparison.contexts[0]
        attack = "</script><script>alert(1)</script>\n"
        hostile = replace(context, tokens=(attack,) * len(context.tokens), guess=(attack,) * len(context.tokens))
        bad = replace(row, model=attack, comparison=replace(row.comparison, contexts=(hostile,)))
        page = render_evaluation(replace(results, evaluations=(bad,)))
        assert "<script>alert" not in page and page.count("<script>") == 2
        assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;<u>↵</u>" in page


def test_public_function_is_the_same() -> None:
    assert unnorm.evaluate is evaluate
    assert isinstance(sys.modules["unnorm.evaluation"].evaluate, Callable)  # type: ignore[arg-type]


def test_tokens_of_sentencepiece_keep_their_spaces() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from unnorm.evaluation.comparison import _token_text

    words = Tokenizer(models.BPE({"\u2581the": 0, "\u2581cat": 1, "s": 2}, []))
    words.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert [_token_text(tokenizer, token) for token in range(3)] == [" the", " cat", "s"]


def test_tokens_that_occur_are_read_from_token_files_too(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from unnorm.evaluation.corpora import tokens_in

    np.array([1, 2, 7] * 100, dtype="<u2").tofile(tmp_path / "train.bin")
    assert tokens_in(str(tmp_path / "train.bin"), tiny_tokenizer, 300).nonzero()[0].tolist() == [1, 2, 7]
