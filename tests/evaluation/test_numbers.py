"""Every number, next to one that plain transformers and NumPy give."""

import math
import re
import shutil
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
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import POSITIONS, VOCAB, randomize
from tests.evaluation.texts import BLOCKS, held_out
from unnorm.data import as_dataset
from unnorm.evaluation import Results, evaluate, evaluate_model, metrics
from unnorm.evaluation.corpora import count_bytes, open_corpus
from unnorm.evaluation.metrics import calibration
from unnorm.report.evaluation_page import render_evaluation
from unnorm.runs.text import TextSource
from unnorm.terminal.evaluation import evaluation_tables


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

    def test_of_a_model_in_bfloat16_are_computed_from_its_logits_in_float32(
        self, tokens: Path, tiny_model: GPT2LMHeadModel
    ) -> None:
        models = [model.bfloat16() for model in (randomize(deepcopy(tiny_model), 1), deepcopy(tiny_model))]
        ids = held_out(tokens)[:4]
        expected = plain_transformers(ids, *models)
        row = evaluate_model(models[0], as_dataset(ids.numpy()), models[1])
        assert [row.loss, row.kl] == pytest.approx([expected["loss"], expected["kl"]], rel=1e-5)

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
        corpus = open_corpus("text", TextSource(str(text_file)), tiny_tokenizer, VOCAB, POSITIONS, 10**6)
        rows = np.asarray(corpus.blocks["input_ids"][:])
        # Byte-level BPE: each letter of a token stands for one byte, and end-of-text for none.
        pieces = [tiny_tokenizer.convert_ids_to_tokens(r[1:].tolist()) for r in rows]
        size = sum(len(piece) for of_row in pieces for piece in of_row if piece != tiny_tokenizer.eos_token)
        assert corpus.text_bytes == size
        assert row.bits_per_byte == pytest.approx(row.loss * row.tokens / math.log(2) / size)

    def test_a_model_against_itself(self, tokens: Path, tiny_model_dir: Path) -> None:
        (row,) = evaluate(str(tiny_model_dir), str(tiny_model_dir), str(tokens), tokens=2000)
        assert (row.kl, row.difference, row.difference_ci, row.top5_agreement) == (0, 0, (0, 0), 1)

    def test_dropout_is_off_in_both_models(self, tiny_model: GPT2LMHeadModel) -> None:
        model = deepcopy(tiny_model).train()
        blocks = as_dataset(np.arange(64, dtype=np.int32).reshape(4, 16))
        assert evaluate_model(model, blocks, deepcopy(model).train()).kl == 0
        assert model.training

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
        (line,) = (line for line in text.getvalue().splitlines() if line.startswith("m overflows in"))
        elsewhere = f"in the others KL {expected.kl:.3f}, loss {expected.loss:.4f}"
        assert line == f"m overflows in {bad.sum()} of 12 blocks of d; {elsewhere}"
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
    assert tokens_in(TextSource(str(tmp_path / "train.bin")), tiny_tokenizer, 300).nonzero()[0].tolist() == [1, 2, 7]


def test_the_text_of_a_run_is_what_it_is_evaluated_on(
    finished_run: Path, tiny_model_dir: Path, text_file: Path
) -> None:
    def sources(*models: Path, **options: Any) -> list[str]:
        return [row["source"] for row in unnorm.evaluate(models, tokens=64, **options).protocol["corpora"]]

    assert sources(tiny_model_dir, finished_run) == sources(finished_run, data=text_file) == [str(text_file)]
    assert sources(finished_run, suite="quick", tasks="none") == [str(text_file)]
    assert sources(tiny_model_dir) == sources(finished_run, data="stdlib") == ["stdlib"]


class TestOwnOriginal:
    """A finished run is compared with the original that it was made from, unless another is named."""

    def test_is_the_default(self, finished_run: Path, tiny_model_dir: Path, tokens: Path) -> None:
        (own,), (named,) = (evaluate(finished_run, against, tokens, tokens=500) for against in (None, tiny_model_dir))
        assert own.kl is not None and own == named

    def test_is_measured_once_by_whichever_path_it_is_named(
        self, finished_run: Path, tiny_model_dir: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tiny_model_dir.parent)
        said: list[str] = []
        results = evaluate(
            [finished_run, tiny_model_dir.name], data=tokens, tokens=500, watch=lambda r: said.append(r.get("text", ""))
        )
        assert [text for text in said if text.startswith("loading")] == [
            f"loading {finished_run}",
            f"loading {tiny_model_dir.name}",
        ]
        assert results[1].kl == 0 and list(results.protocol["original"]) == [tiny_model_dir.name]

    def test_is_read_up_to_the_position_that_the_twin_was_trained_to(
        self, finished_run: Path, text_file: Path, tokens: Path, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        options: dict[str, Any] = {"data": text_file, "tokens": 0, "context": 16, "device": "cpu"}
        unnorm.remove(tiny_model_dir, out=tmp_path / "run", **options)

        def context(models: list[Path], **more: int) -> int:
            return int(evaluate(models, data=tokens, tokens=500, **more).protocol["context"])

        assert context([tmp_path / "run"]) == context([finished_run, tmp_path / "run"]) == 16
        assert context([finished_run]) == context([tmp_path / "run"], context=POSITIONS) == POSITIONS

    def test_is_left_out_where_it_is_gone(self, finished_run: Path, tokens: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        shutil.copytree(finished_run, run)
        config = run / "config.yaml"
        config.write_text(re.sub(r"^model: .*$", f"model: {tmp_path / 'gone'}", config.read_text(), flags=re.M))
        said: list[str] = []
        (row,) = evaluate(run, data=tokens, tokens=500, watch=lambda row: said.append(row.get("text", "")))
        assert row.kl is None
        assert any("no comparison" in text and "gone" in text for text in said)

    def test_is_left_out_where_another_model_is_there_now(
        self, finished_run: Path, tokens: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        run, other = tmp_path / "run", tmp_path / "other"
        shutil.copytree(finished_run, run)
        config = GPT2Config(vocab_size=VOCAB + 20, n_positions=POSITIONS, n_embd=32, n_layer=1, n_head=4)
        GPT2LMHeadModel(config).save_pretrained(other)
        tiny_tokenizer.save_pretrained(other)
        settings = run / "config.yaml"
        settings.write_text(re.sub(r"^model: .*$", f"model: {other}", settings.read_text(), flags=re.M))
        (row,) = evaluate(run, data=tokens, tokens=500)
        assert row.kl is None and math.isfinite(row.loss)

    def test_is_none_where_runs_have_several(
        self, finished_run: Path, other_dir: Path, text_file: Path, tokens: Path, tmp_path: Path
    ) -> None:
        unnorm.remove(str(other_dir), data=str(text_file), tokens=0, out=tmp_path / "run", device="cpu")
        assert [row.kl for row in evaluate([finished_run, tmp_path / "run"], data=tokens, tokens=500)] == [None, None]


def test_no_bits_per_byte_where_the_text_of_unknown_tokens_is_lost() -> None:
    words = Tokenizer(models.WordLevel({"?": 0, "one": 1, "two": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    assert count_bytes(np.array([[1, 1, 2]]), tokenizer) == len("one one two") - len("one")
    assert count_bytes(np.array([[1, 0, 2]]), tokenizer) == 0
    assert count_bytes(np.array([[0, 1, 2]]), tokenizer) > 0
