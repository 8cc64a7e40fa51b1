"""Which precision the training passes take where the user does not say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2LMHeadModel, TrainingArguments

import unnorm
from tests.running import SETTINGS, assert_same_weights
from unnorm.removal.resume import saved_options
from unnorm.runs import plan
from unnorm.runs.config import RemoveConfig
from unnorm.runs.plan import make_plan
from unnorm.training import loop


@pytest.mark.parametrize(
    ("able", "gain", "bfloat16"),
    [
        ({"amx_bf16": True}, 0.1, True),
        ({"avx512_bf16": True}, 3.0, True),
        ({"avx512_bf16": True}, 0.8, False),
        ({"avx512_bf16": False}, 3.0, False),
        ({}, 3.0, False),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster(
    able: dict[str, bool], gain: float, bfloat16: bool, tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(plan, "_bfloat16_gain", lambda: gain)
    assert make_plan(RemoveConfig(device="cpu"), tiny_model).bfloat16 is bfloat16
    assert make_plan(RemoveConfig(device="cpu", dtype="float32"), tiny_model).dtype == "float32"
    assert make_plan(RemoveConfig(device="cpu", dtype="bfloat16"), tiny_model).dtype == "bfloat16"


def test_the_launchers_precision_is_not_the_runs(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` always sets one, which the Trainer would take."""
    options: dict[str, Any] = {**SETTINGS, "tokens": 4 * 512, "data": text_file}
    unnorm.remove(tiny_model_dir, out=tmp_path / "alone", **options)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    unnorm.remove(tiny_model_dir, out=tmp_path / "launched", **options)
    assert_same_weights(tmp_path / "alone", tmp_path / "launched")


def test_a_compiled_run_is_the_same_run(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own backend for tests, which needs no compiler."""
    make = loop._arguments

    def arguments(*args: Any) -> TrainingArguments:
        made = make(*args)
        made.torch_compile_backend = "eager" if made.torch_compile else None
        return made

    monkeypatch.setattr(loop, "_arguments", arguments)
    options: dict[str, Any] = {**SETTINGS, "tokens": 4 * 512, "data": text_file}
    plain = unnorm.remove(tiny_model_dir, out=tmp_path / "plain", **options)
    compiled = unnorm.remove(tiny_model_dir, out=tmp_path / "compiled", compile=True, **options)
    assert compiled["plan"]["compile"] and compiled["kl"] == pytest.approx(plain["kl"], rel=1e-4)


def test_bfloat16_gain_is_the_ratio_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0 if torch.is_autocast_enabled("cpu") else 2.0
        return now

    monkeypatch.setattr(plan.time, "perf_counter", clock)
    assert plan._bfloat16_gain() == 2.0


@pytest.mark.parametrize("gain", [3.0, 0.8])
def test_a_run_keeps_what_was_chosen_by_timing(
    gain: float, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(plan, "_bfloat16_gain", lambda: gain)
    run = tmp_path / "run"
    result = unnorm.remove(model=str(tiny_model_dir), data=str(text_file), tokens=512, out=run, device="cpu")
    saved = yaml.safe_load((run / "config.yaml").read_text())["dtype"]
    (run / "result.json").unlink()
    assert saved_options({"out": run, "dtype": "auto"})["dtype"] == saved
    assert saved == ("bfloat16" if result["plan"]["bfloat16"] else "float32") == ("bfloat16" if gain > 1 else "float32")
