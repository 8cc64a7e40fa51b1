"""Runs of the tiny model: settings, breaking them off, and comparing what they leave."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unnorm
from unnorm.training import distillation

SETTINGS: dict[str, Any] = {"tokens": 20 * 512, "batch_size": 8, "context": 64, "device": "cpu", "dtype": "float32"}
"""Of a run of 20 steps of the tiny model; with `model`, `data` and `out` it is complete."""


def ctrl_c_at(step: int) -> Callable[[dict[str, Any]], None]:
    """A watch that presses Ctrl-C once, when that training step is told of, or the first one after it."""
    pressed: list[int] = []

    def press(row: dict[str, Any]) -> None:
        if row["kind"] == "train" and row["step"] >= step and not pressed:
            pressed.append(row["step"])
            os.kill(os.getpid(), signal.SIGINT)

    return press


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = (load_file(path / "model" / "model.safetensors") for path in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class CrashError(Exception):
    """What nobody has foreseen."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a run breaks off there, without saving anything more."""
    take = distillation.DistillationTrainer.training_step

    def training_step(self: distillation.DistillationTrainer, *args: Any, **more: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise CrashError
        return take(self, *args, **more)

    monkeypatch.setattr(distillation.DistillationTrainer, "training_step", training_step)


def crash(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run that breaks off after 14 steps, and leaves what it had saved."""
    with monkeypatch.context() as patch:
        stop_at(14, patch)
        with pytest.raises(CrashError):
            unnorm.remove(**SETTINGS, **options)


WITHOUT_UNNORM = """
import json, sys
sys.modules["unnorm"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("def read(self):", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
model.save_pretrained(sys.argv[2])
print(json.dumps([type(model).__name__, model(input_ids=ids).logits[0, -1].double().tolist(), out[0].tolist()]))
"""


def loaded_without_unnorm(model: Path, again: Path, modules: Path) -> tuple[str, torch.Tensor, list[int]]:
    """What a process without unnorm makes of a checkpoint: its class, last logits and a continuation.

    It saves the model `again`; `modules` is the directory for code that comes with it.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT_UNNORM, str(model), str(again)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, last_logits, generated = json.loads(done.stdout.splitlines()[-1])
    return name, torch.tensor(last_logits).float(), generated
