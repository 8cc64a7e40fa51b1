"""Which text is measured on afterwards: the one that was named, else the run's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

import unnorm
from tests.texts import DOCUMENTS
from unnorm.errors import UnnormError
from unnorm.removal.blocks import text_digest
from unnorm.runs.text import TextSource, choose_text

RUN = {"data": "a", "text_field": "body", "split": "validation"}


def test_other_text_is_not_read_by_the_runs_field_and_split() -> None:
    assert choose_text(RUN) == TextSource("a", "body", "validation", is_own=True)
    assert choose_text(RUN, "a") == TextSource("a", "body", "validation", is_own=False)
    assert choose_text(RUN, split="test") == TextSource("a", "body", "test", is_own=True)
    assert choose_text(RUN, "b") == TextSource("b", None, "train", is_own=False)


def test_text_that_was_named_is_not_said_to_be_the_runs(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnnormError, match=r"^No data at"):
        choose_text(RUN, "/gone.txt").held_out(tiny_tokenizer, 300, 16, 1)
    with pytest.raises(UnnormError, match=r"^The run's own text can't be read\. No data at .* Or name other text"):
        choose_text({"data": "/gone.txt"}).held_out(tiny_tokenizer, 300, 16, 1)


def test_a_remedy_is_named_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnnormError) as refusal:
        choose_text({"data": "self"}).held_out(tiny_tokenizer, 300, 16, 1)
    assert str(refusal.value).count("--data") == 1


def test_text_that_is_divided_differently_now_is_refused(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which way depends on the first hundred documents, so on the names of files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    rows = [[{"text": "ever the same " * 40}] * 120, [{"text": f"document {n} " * 40} for n in range(150)]]
    for name, of_file in zip("ab", rows, strict=True):
        (tmp_path / "r" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    options: dict[str, Any] = {"tokens": 512, "context": 32, "device": "cpu", "kl_budget": 100}
    unnorm.remove(tiny_model_dir, data="r", out=tmp_path / "run", recipe="tapernorm", **options)
    monkeypatch.chdir(Path(__file__).parent)  # It is the same text from there.
    (tmp_path / "r" / "a.jsonl").rename(tmp_path / "r" / "z.jsonl")
    verbs: dict[str, Callable[[], object]] = {
        "evaluate": lambda: unnorm.evaluate(tmp_path / "run"),
        "evaluate, named": lambda: unnorm.evaluate(tmp_path / "run", data=tmp_path / "r"),
        "audit": lambda: unnorm.audit(tmp_path / "run", tokens=64),
        "analyze": lambda: unnorm.analyze(tmp_path / "run", tokens=64),
        "heal": lambda: unnorm.heal(tmp_path / "run", tokens=512, out=tmp_path / "healed"),
    }
    for verb in verbs.values():
        with pytest.raises(UnnormError, match=r"one document in 10, .* but for the run it was the last tenth of each"):
            verb()
    assert not (tmp_path / "healed").exists()


@pytest.mark.parametrize("context", [16, 64])
def test_held_out_text_shorter_than_a_block_is_the_same_text(
    context: int, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """What is said of it depends on the context, but not how the text is divided."""
    (tmp_path / "short.txt").write_text(text_file.read_text()[:1200])
    run = tmp_path / "run"
    unnorm.remove(tiny_model_dir, data=tmp_path / "short.txt", tokens=0, context=context, out=run, device="cpu")
    assert "tenth" in json.loads((run / "result.json").read_text())["division"]
    for longest in (16, 64):
        assert len(unnorm.evaluate(run, context=longest)) == 1
        assert unnorm.audit(run, tokens=64, context=longest)["classes"]
        assert unnorm.analyze(run, what="sinks", tokens=64, context=longest, out=tmp_path / f"{longest}")["findings"]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run whose text is in the column `body`."""
    rows = [{"text": "another column " * 40, "body": document * 3} for document in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy = Path(shutil.copytree(finished_run, tmp_path / "run"))
    write_settings(copy, data=str(tmp_path / "a.jsonl"), text_field="body")
    return copy


def write_settings(run: Path, **changed: str) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))


def evaluated_text(run: Path, **options: Any) -> str:
    results = unnorm.evaluate(run, tokens=64, device="cpu", **options)
    return str(results.protocol["corpora"][0]["tokens_sha256"])


def test_evaluation_is_on_the_runs_text_in_its_field(run: Path) -> None:
    data = run.parent / "a.jsonl"
    assert evaluated_text(run) == evaluated_text(run, data=data, text_field="body")
    assert evaluated_text(run) == evaluated_text(run, data=data)  # The run's own text, named.


def test_evaluation_asks_for_the_runs_settings_only_where_no_text_is_named(run: Path) -> None:
    write_settings(run, data="/gone.txt")
    with pytest.raises(UnnormError, match=r"^The run's own text can't be read\. No data at"):
        evaluated_text(run)
    (run / "config.yaml").write_text("a: [")
    assert evaluated_text(run, data=run.parent / "a.jsonl")
    with pytest.raises(UnnormError, match="Could not read the settings"):
        evaluated_text(run)


def test_text_may_be_named_twice_over(run: Path) -> None:
    assert evaluated_text(run, data="stdlib=stdlib") == evaluated_text(run, data="stdlib") != evaluated_text(run)


def test_the_digest_is_of_held_out_text_too() -> None:
    def digest(train: int, validation: int) -> str:
        of_train, held_out = (Dataset.from_dict({"input_ids": [[number, 2, 3]]}) for number in (train, validation))
        run: Any = SimpleNamespace(train_blocks=of_train, validation_blocks=held_out)
        return text_digest(run)

    assert len({digest(1, 1), digest(1, 2), digest(2, 1)}) == 3
