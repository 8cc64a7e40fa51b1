"""A command that must be refused, and what it is tried on."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.bad_input.edits import Edit
from tests.conftest import Cli, CliResult, randomize


def contents(directory: Path) -> dict[str, str]:
    """Every path below a directory with a hash of what is in it."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }


def message(result: CliResult) -> str:
    """The one paragraph that is said when something is refused."""
    assert result.code == 2, result
    assert "Traceback" not in result.err + result.out
    assert not result.out
    _, found, text = result.err.partition("unnorm: ")
    assert found, result.err
    assert "unnorm:" not in text
    assert text.count("\n") == 1, text
    assert len(text) < 900
    assert text.rstrip("\n").endswith((".", ")", "DIR"))
    return text.strip()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, so that whatever a run writes would be seen in it."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def refused(cli: Cli, work: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused and leave everything as it was; gives the message."""

    def run(*arguments: object) -> str:
        before = contents(tmp_path)
        text = message(cli(*arguments))
        assert contents(tmp_path) == before
        return text

    return run


@pytest.fixture
def options(text_file: Path) -> list[object]:
    """What a quick run of `unnorm remove` needs besides the model."""
    return ["--data", text_file, "--tokens", 0, "--device", "cpu", "--out", "run"]


@pytest.fixture
def save(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[torch.nn.Module], Path]:
    """Saves a randomized model with the tiny tokenizer."""

    def save_model(model: Any) -> Path:
        randomize(model).save_pretrained(tmp_path / "saved")
        tiny_tokenizer.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save_model


@pytest.fixture
def damaged(tmp_path: Path, tiny_model_dir: Path) -> Callable[[Edit], Path]:
    """A copy of the tiny model, changed for the worse."""

    def copy(edit: Edit) -> Path:
        directory = tmp_path / "damaged"
        shutil.copytree(tiny_model_dir, directory)
        edit(directory)
        return directory

    return copy


@pytest.fixture
def run_copy(tmp_path: Path, finished_run: Path) -> Path:
    """A finished run that may be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))


@pytest.fixture
def unfinished_run(tmp_path: Path, finished_run: Path) -> Path:
    """A run that was stopped: settings, but no result."""
    directory = tmp_path / "unfinished"
    directory.mkdir()
    shutil.copy(finished_run / "config.yaml", directory)
    return directory
