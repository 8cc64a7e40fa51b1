"""What can not be evaluated is refused with its reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import with_other_tokens
from unnorm.errors import UnnormError
from unnorm.evaluation import evaluate


class TestRefused:
    def refusal(self, *arguments: Any, **options: Any) -> str:
        with pytest.raises(UnnormError) as caught:
            evaluate(*arguments, **options)
        return str(caught.value)

    def test_other_tokenizers(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        text = self.refusal(str(with_other_tokens(tiny_model_dir, tmp_path / "m")), str(tiny_model_dir))
        assert "different tokenizers: 2 tokens, such as 'a'" in text and "same tokenizer" in text

    def test_tokenizers_of_one_vocabulary_that_split_text_differently(
        self, tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_model_dir, tmp_path / "m")
        saved = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
        assert saved["model"]["merges"]
        saved["model"]["merges"] = []
        (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(saved))
        text = self.refusal(str(tmp_path / "m"), str(tiny_model_dir))
        assert "have the same vocabulary but split text differently" in text and "same tokenizer" in text

    def test_benchmark_files(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval")
        path = tmp_path / "a.jsonl"
        model = str(tiny_model_dir)
        path.write_text('{"question": "?", "label": 0}\n')
        text = self.refusal(model, data=f"hellaswag={path}")
        assert "is not a HellaSwag file: item 1 has no 'ctx' and no 'endings'" in text
        assert "It has: question, label. Needed: ctx, endings, label." in text
        path.write_text('{"ctx": "a", "endings": ["b"], "label": 3}\n')
        assert "has label 3, but 1 endings" in self.refusal(model, data=f"hellaswag={path}")
        assert "is not a LAMBADA file" in self.refusal(model, data=f"lambada={path}")
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
            ({"suite": "huge"}, "Choose from quick, full, paper"),
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
        assert "holds something other than an evaluation" in text

    def test_no_model(self) -> None:
        assert "name at least one" in self.refusal([])
