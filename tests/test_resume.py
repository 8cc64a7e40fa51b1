"""Going on with a run that was cut short: at any point, of any family, to the same result."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState, TrainingArguments

import unnorm
from tests.test_families import FAMILIES, random_model
from tests.test_remove import SETTINGS, assert_same_weights
from unnorm.removal import remove as removal
from unnorm.schedule import FidelityController
from unnorm.training import distillation
from unnorm.training.callbacks import GuardCallback
from unnorm.training.run import last_checkpoint

CUT_SHORT: dict[str, Callable[[Path], object]] = {
    "weights half written": lambda checkpoint: (checkpoint / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "state half written": lambda checkpoint: (checkpoint / "trainer_state.json").write_text('{"global_step": 9'),
    "config alone": lambda checkpoint: (checkpoint / "config.json").write_text("{}"),
    "nothing": lambda checkpoint: None,
}


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a run breaks off there, without saving anything more."""
    take = distillation.DistillationTrainer.training_step

    def training_step(self: distillation.DistillationTrainer, *args: Any, **more: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return take(self, *args, **more)

    monkeypatch.setattr(distillation.DistillationTrainer, "training_step", training_step)


@pytest.mark.parametrize("family", ["gpt_neox, sequential", "mixtral"])
def test_all_weights_come_back_whatever_the_hub_calls_them(
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    tmp_path: Path,
) -> None:
    config = FAMILIES[family][0]()
    config.vocab_size = len(tiny_tokenizer)
    random_model(lambda: config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {**SETTINGS, "context": 32, "batch_size": 8, "tokens": 20 * 256, "kl_budget": 100}
    options |= {"model": str(tmp_path / "model"), "data": str(text_file), "control": True}
    unnorm.remove(out=tmp_path / "unbroken", **options)
    with monkeypatch.context() as patch:
        stop_at(14, patch)
        with pytest.raises(KeyboardInterrupt):
            unnorm.remove(out=tmp_path / "broken", **options)
    unnorm.remove(out=tmp_path / "broken", resume=True)
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.parametrize("fault", CUT_SHORT)
def test_a_checkpoint_that_was_cut_short_is_passed_over(
    fault: str, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "out": tmp_path / "run"}
    with monkeypatch.context() as patch:
        stop_at(14, patch)
        with pytest.raises(KeyboardInterrupt):
            unnorm.remove(**options)
    whole = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert whole is not None
    cut_short = Path(whole).with_name("checkpoint-14")
    cut_short.mkdir()
    CUT_SHORT[fault](cut_short)
    assert unnorm.remove(out=tmp_path / "run", resume=True)["verified"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_that_lacks_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "out": tmp_path / "run"}
    with monkeypatch.context() as patch:
        stop_at(14, patch)
        with pytest.raises(KeyboardInterrupt):
            unnorm.remove(**options)
    file = Path(str(last_checkpoint(tmp_path / "run" / "checkpoints"))) / "model.safetensors"
    weights = load_file(file)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(unnorm.UnnormError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        unnorm.remove(out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("stage", ["save_unfolded", "save_sites", "save_folded", "conclude"])
def test_a_disk_that_is_full_at_the_end_costs_no_training(
    stage: str, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**SETTINGS, "model": str(tiny_model_dir), "data": str(text_file), "control": True}
    unnorm.remove(out=tmp_path / "unbroken", **options)

    def fail(*_: object, **__: object) -> None:
        raise unnorm.UnnormError("Could not write.")

    with monkeypatch.context() as patch:
        patch.setattr(removal, stage, fail)
        with pytest.raises(unnorm.UnnormError, match="Could not write"):
            unnorm.remove(out=tmp_path / "broken", **options)
    if stage == "conclude":  # Before it the control is still to come.
        stop_at(0, monkeypatch)
    assert unnorm.remove(out=tmp_path / "broken", resume=True)["verified"]
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")


def test_a_first_step_without_text_tells_the_controller_nothing(tmp_path: Path) -> None:
    kls = iter([None, 0.6, None, 0.6])
    controller = FidelityController(end=0.0)
    guard, model = GuardCallback(controller, lambda: next(kls)), torch.nn.Linear(1, 1)
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=100), TrainerControl()
    guard.on_train_begin(arguments, state, control, model=model)
    seen = []
    for _ in range(4):
        state.global_step += 1
        model.weight.grad = torch.ones(1, 1)
        guard.on_pre_optimizer_step(arguments, state, control, model=model)
        guard.on_step_end(arguments, state, control, model=model)
        seen.append(controller.running_kl)
    assert seen == [None, *[pytest.approx(0.6)] * 3]
    assert controller.set_back == 0
    assert guard.state()["attributes"]["kl"] == 0.6


def test_a_refused_step_without_text_counts(tmp_path: Path) -> None:
    controller = FidelityController(end=0.5, position=0.4)
    guard, model = GuardCallback(controller, lambda: None), torch.nn.Linear(1, 1)
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=100), TrainerControl()
    guard.on_train_begin(arguments, state, control, model=model)
    model.weight.grad = torch.full((1, 1), math.nan)
    guard.on_pre_optimizer_step(arguments, state, control, model=model)
    guard.on_step_end(arguments, state, control, model=model)
    assert controller.set_back == 1


def test_weights_that_may_come_back_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    guard, model = GuardCallback(), torch.nn.Linear(1, 1)
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=100), TrainerControl()
    guard.on_train_begin(arguments, state, control, model=model)
    model.weight.data.fill_(3.0)
    guard.on_save(arguments, state, control, model=model)
    assert guard.good["weight"].item() == 3.0
