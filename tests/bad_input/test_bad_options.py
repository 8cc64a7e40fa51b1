"""Values of options and files of options that can't be."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import GPT2LMHeadModel

import unnorm
from tests.conftest import Cli
from unnorm.runs.config import RemoveConfig


def test_a_path_that_can_not_be(refused: Callable[..., str], tiny_model_dir: Path) -> None:
    name = 300 * "x"
    for arguments in (("--out", name), ("--data", name)):
        text = refused("remove", tiny_model_dir, *arguments)
        assert "xxx…' can't be used: File name too long" in text


class TestOptions:
    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            (["--tokens", "many"], "tokens"),
            (["--tokens", "-5"], "tokens"),
            (["--tokens", "1.5T"], "tokens"),
            (["--tokens", "9" * 400], "tokens"),
            (["--recipe", "magic"], "recipe"),
            (["--dtype", "int8"], "dtype"),
            (["--estimator", "magic"], "estimator"),
            (["--device", "abacus"], "device"),
            (["--device", "cpu:7"], "device"),
            (["--context", "65"], "--context 65 is longer than the 64 tokens"),
            (["--context", "1"], "context"),
            (["--batch-size", "0"], "batch_size"),
            (["--lr", "-1"], "lr"),
            (["--lr", "nan"], "lr"),
            (["--lr", "inf"], "lr"),
            (["--seed", "-1"], "seed"),
            (["--seed", str(2**70)], "seed"),
            (["--report-to", "abacus"], "abacus is not supported"),
            (["--report-to", "comet_ml"], "pip install"),
        ],
    )
    def test_of_remove(
        self, wrong: list[str], expected: str, tiny_model_dir: Path, options: list[object], refused: Callable[..., str]
    ) -> None:
        assert expected in refused("remove", tiny_model_dir, *options, *wrong)

    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            (["--tokens", "many"], "--tokens"),
            (["--tokens", "9" * 400], "--tokens"),
            (["--context", "65"], "--context"),
            (["--context", "1"], "--context"),
            (["--context", "0"], "--context"),
            (["--context", "-3"], "--context"),
            (["--device", "abacus"], "device"),
            (["--device", "cpu:7"], "device"),
        ],
    )
    @pytest.mark.parametrize("command", ["evaluate", "stats"])
    def test_of_evaluate_and_stats(
        self,
        command: str,
        wrong: list[str],
        expected: str,
        tiny_model_dir: Path,
        text_file: Path,
        refused: Callable[..., str],
    ) -> None:
        if (command, wrong[0]) != ("stats", "--tokens"):
            assert expected in refused(command, tiny_model_dir, "--data", text_file, *wrong)

    @pytest.mark.parametrize("arguments", [["remove", "--no-such-option"], ["evaluate"], ["no-such-command"]])
    def test_usage(self, arguments: list[str], cli: Cli) -> None:
        result = cli(*arguments)
        assert result.code == 2
        assert "Usage" in result.err
        assert "Traceback" not in result.err

    def test_not_enough_disk(
        self,
        tiny_model_dir: Path,
        options: list[object],
        refused: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        usage = shutil.disk_usage(".")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        text = refused("remove", tiny_model_dir, *options)
        assert "Not enough disk" in text
        assert "--out" in text


class TestConfigFile:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"tokens: [1, 2", "settings.yaml"),
            (b"\xff\xfe\x00", "settings.yaml"),
            (b"just words", "holds no settings"),
            (b"- tokens\n- 5", "holds no settings"),
            (b"tokenz: 5", "tokenz"),
            (b"tokens: 1.5", "tokens"),
            (b"tokens: many", "tokens"),
            (b"1: 2", "1"),
            (b"recipe: [taper]", "recipe"),
            (b"resume: true", "resume"),
        ],
    )
    def test_refused(
        self,
        content: bytes,
        expected: str,
        work: Path,
        tiny_model_dir: Path,
        options: list[object],
        refused: Callable[..., str],
    ) -> None:
        (work / "settings.yaml").write_bytes(content)
        options = [o for o in options if o not in ("--tokens", 0)]
        assert expected in refused("remove", tiny_model_dir, *options, "--config", "settings.yaml")

    def test_missing(self, tiny_model_dir: Path, refused: Callable[..., str]) -> None:
        assert "'nothing.yaml'" in refused("remove", tiny_model_dir, "--config", "nothing.yaml")


@pytest.mark.parametrize("line", ["out: 2024-13-45", "tokens: 0x_"])
def test_values_that_yaml_itself_refuses(line: str, work: Path, refused: Callable[..., str]) -> None:
    (work / "settings.yaml").write_text(line)
    assert "Could not read the settings in 'settings.yaml'" in refused("remove", "--config", "settings.yaml")


def test_a_step_of_more_tokens_than_there_are(
    tiny_model_dir: Path, text_file: Path, refused: Callable[..., str]
) -> None:
    sizes = ["--tokens", "2k", "--batch-size", 2000, "--context", 64]
    text = refused("remove", tiny_model_dir, "--data", text_file, "--out", "run", *sizes)
    assert "--tokens 2,000 is less than one step, which takes 2,000 blocks of 64 tokens" in text


def test_a_model_in_memory_is_no_name(tiny_model: GPT2LMHeadModel) -> None:
    for ask in (unnorm.stats, unnorm.evaluate, lambda model: unnorm.evaluate([model])):
        with pytest.raises(unnorm.UnnormError, match="not a GPT2LMHeadModel"):
            ask(tiny_model)


def test_values_of_other_types_are_taken_or_refused_in_words(finished_run: Path, tiny_model_dir: Path) -> None:
    for call, message in (
        (lambda: unnorm.evaluate(finished_run, context="64"), "--context 64 is not a whole number"),
        (lambda: unnorm.audit(finished_run, context=16.5), "--context 16.5 is not a whole number"),
        (lambda: unnorm.verify({"directory": "x"}), "not a dict"),
        (lambda: unnorm.load(None), "not a NoneType"),
        (lambda: unnorm.analyze(finished_run, prompts=[{"clean": "a"}]), "not a list"),
        (lambda: unnorm.evaluate(finished_run, items=[1]), r"--items \[1\]"),
    ):
        with pytest.raises(unnorm.UnnormError, match=message):
            call()
    assert RemoveConfig.create(device=torch.device("cpu")).device == "cpu"
    several = pd.Series([str(finished_run.parent / "gone.txt")])
    for data in (several, several.to_numpy(), {"mine": several[0]}):
        with pytest.raises(unnorm.UnnormError, match=r"gone\.txt"):
            unnorm.evaluate(tiny_model_dir, data=data)


def test_a_process_that_is_not_the_first_says_what_it_alone_meets(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert "unnorm, process 1: There is no directory 'nothing'" in cli("verify", "nothing").err
