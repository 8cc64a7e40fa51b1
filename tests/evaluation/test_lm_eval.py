"""Benchmarks through lm-eval, and suites of them and of text."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import POSITIONS, Cli, Saved, stdlib_text
from tests.evaluation.texts import named
from unnorm.errors import UnnormError
from unnorm.evaluation import Score, evaluate
from unnorm.evaluation import run as evaluation_run
from unnorm.evaluation.harness import _language_model, with_difference
from unnorm.evaluation.intervals import bootstrap_interval, paired_share_interval
from unnorm.evaluation.suites import choose
from unnorm.report.evaluation_page import render_evaluation


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

    def test_prompts_of_generated_answers_that_are_cut_are_counted(
        self, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        from lm_eval.api.instance import Instance

        lm = _language_model(tiny_model, tiny_tokenizer, POSITIONS, 2, None)
        prompts = ["k " * 10, "k " * POSITIONS, "k " * 2 * POSITIONS]
        given = {"until": ["x"], "max_gen_toks": 8, "do_sample": False}
        lm.generate_until([Instance("generate_until", {}, (text, given), 0) for text in prompts])
        assert lm.truncated == 2

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
        assert with_difference(score, other).difference == 0.5
        assert with_difference(score, other).difference_ci == paired_share_interval([1.0, 0.0])
        in_parts = replace(score, item_values={3: 0.5, 4: 0.0})
        assert with_difference(in_parts, other).difference_ci == bootstrap_interval([0.5, 0.0])
        percent = replace(score, item_values={3: 57.0, 4: 31.0})  # By chance one changes by 1, which is no share.
        found = with_difference(percent, replace(other, item_values={3: 56.0, 4: 31.0}))
        assert found.difference_ci == bootstrap_interval([1.0, 0.0])
        with pytest.raises(UnnormError, match="no item of 't' in common"):
            with_difference(score, replace(other, item_values={7: 1.0}))

    def test_a_model_that_went_astray_has_an_infinite_perplexity(
        self, files: dict[str, Path], saved: Saved, tiny_model: GPT2LMHeadModel, tmp_path: Path
    ) -> None:
        astray = copy.deepcopy(tiny_model)
        astray.transformer.ln_f.weight.data *= 1e4
        results = evaluate(str(saved(astray)), data=named(files, "lambada"), out=tmp_path / "out")
        assert {score.metric: score.value for score in results.scores}["perplexity"] == math.inf
        assert (tmp_path / "out" / "evaluation.html").is_file()


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
        self,
        tmp_path: Path,
        tiny_model_dir: Path,
        tiny_tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plain = stdlib_text("os")[:30_000].replace("~", "")
        (tmp_path / "owt.txt").write_text(plain)
        odd = [plain[i : i + 300] + ("~" if i % 2 else "") for i in range(0, 9000, 301)]
        (tmp_path / "pile.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in odd * 3))
        data = [f"openwebtext={tmp_path}/owt.txt", f"pile={tmp_path}/pile.jsonl"]
        results = evaluate(str(tiny_model_dir), data=data, suite="paper", tasks=["none"], tokens=10**5)
        sizes = {row.data: row.tokens for row in results}
        assert 0 < sizes["pile-filtered"] < sizes["pile"]
        of = {row["corpus"]: row for row in results.protocol["corpora"]}
        assert of["pile"]["filter"] == ""
        assert of["pile"]["blocks_read"] > of["pile-filtered"]["blocks_read"] == of["pile-filtered"]["blocks"]
        left_out = of["pile"]["blocks_read"] - of["pile-filtered"]["blocks_read"]
        said = f"left out are {left_out} of {of['pile']['blocks_read']} blocks"
        assert of["pile-filtered"]["filter"].startswith(said) and "owt.txt lack" in of["pile-filtered"]["filter"]
        assert render_evaluation(results).count(said) == 1

        pieces = [plain[i : i + 3000] for i in range(0, len(plain), 3000)]
        as_json = "".join(json.dumps({"text": "~", "content": piece}) + "\n" for piece in pieces)
        (tmp_path / "owt.jsonl").write_text(as_json)
        run = {"data": f"{tmp_path}/owt.jsonl", "text_field": "content", "split": "train"}
        monkeypatch.setattr(evaluation_run, "settings_of", lambda name: run)
        again = evaluate(
            str(tiny_model_dir), data=[f"openwebtext={tmp_path}/owt.jsonl", data[1]], suite="paper", tasks=["none"],
            tokens=10**5,
        )  # fmt: skip
        assert [row.tokens for row in again][2] == sizes["pile-filtered"]
        monkeypatch.undo()

        (tmp_path / "pile.jsonl").write_text("".join(json.dumps({"text": "~" * 40}) + "\n" for _ in range(300)))
        results = evaluate(str(tiny_model_dir), data=data, suite="paper", tasks=["none"], tokens=10**5)
        assert [row.data for row in results] == ["openwebtext", "pile"]
        (reason,) = results.protocol["left_out"]
        assert "Nothing is left of 'pile-filtered'" in reason and f"the text of '{tmp_path}/owt.txt'" in reason
        assert "Nothing is left of" in render_evaluation(results)
        with pytest.raises(UnnormError, match="other text for this corpus of the suite: --data pile=SOURCE"):
            evaluate(str(tiny_model_dir), data=data[:1], suite="paper", tasks=["none"], tokens=10**5)

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
        assert "Δ original" in shown.out and "acc_norm" in shown.out
        assert "intervals over" in shown.out


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(
    saved: Saved, tiny_model: PreTrainedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    config = json.loads((saved(tiny_model) / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token"):
        config.pop(name, None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    data = named(files, "lambada")
    with pytest.raises(
        UnnormError, match=r"\(lambada_openai\) need a tokenizer with a beginning-of-text.*--tasks none"
    ):
        evaluate(str(tmp_path / "model"), data=data, items=2)
