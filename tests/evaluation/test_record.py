"""An evaluation that goes on where it stopped, and measures what changed."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import unnorm.evaluation.session
from tests.conftest import randomize
from unnorm.errors import RunInterruptedError
from unnorm.evaluation import evaluate
from unnorm.evaluation.session import Session
from unnorm.versions import versions


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
        assert measured() and not measured()
        for path in (out / "measurements").iterdir():
            if path.read_text().rstrip().endswith("}"):
                path.write_text(json.dumps(json.loads(path.read_text()) | {"measured": []}))
        assert measured() and not measured()

    def test_another_tokenizer_device_or_torch_is_measured_anew(
        self, files: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("lm_eval")
        model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))

        def measured() -> bool:
            seen: list[str] = []
            options: dict[str, Any] = {"data": f"lambada={files['lambada']}", "tasks": "lambada_openai", "items": 4}
            evaluate(str(model), out=tmp_path / "out", watch=lambda r: seen.append(r.get("text", "")), **options)
            return any(" on " in text for text in seen)

        assert measured() and not measured()
        path = model / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["pre_tokenizer"]["add_prefix_space"] = not tokenizer["pre_tokenizer"].get("add_prefix_space")
        path.write_text(json.dumps(tokenizer))
        assert measured() and not measured()
        known = versions()
        for package in ("torch", "unnorm"):
            monkeypatch.setattr(unnorm.evaluation.session, "versions", lambda package=package: known | {package: "9.9"})
            assert measured() and not measured()
        computed_by = Session.computed_by.fget
        assert computed_by is not None
        elsewhere = property(lambda session: computed_by(replace(session, device="cuda")))
        monkeypatch.setattr(Session, "computed_by", elsewhere)
        assert measured() and not measured()

    def test_scores_are_reused_at_the_same_context_alone(
        self, files: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("lm_eval")

        def measured(context: int) -> bool:
            seen: list[str] = []
            options: dict[str, Any] = {"data": f"lambada={files['lambada']}", "tasks": "lambada_openai", "items": 4}
            watch = {"watch": lambda r: seen.append(r.get("text", ""))}
            evaluate(str(tiny_model_dir), out=tmp_path / "out", context=context, **options, **watch)
            return any(" on lambada_openai" in text for text in seen)

        assert measured(64) and not measured(64) and measured(32)

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
