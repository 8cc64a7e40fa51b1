"""The guard: steps that must not be applied, weights that come back, and when a run ends."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import unnorm
from tests.conftest import Saved, stdlib_text
from tests.running import SETTINGS, ctrl_c_at
from unnorm.errors import RunInterruptedError
from unnorm.models.running import copy_model
from unnorm.removal import start
from unnorm.taper.schedule import FidelityController
from unnorm.training import distillation, loop
from unnorm.training.callbacks import (
    LEAST_PATIENCE,
    MOST_BAD_STEPS,
    PATIENCE,
    RESTORE_AFTER,
    GuardCallback,
)
from unnorm.training.losses import distillation_losses


def step(guard: GuardCallback, model: nn.Linear, gradient: float, tmp_path: Path) -> TrainerControl:
    """One step as the Trainer takes it: the guard looks at the gradient, then SGD with learning rate 1."""
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=1), TrainerControl()
    state.global_step = 1
    model.weight.grad = torch.full((1, 1), gradient)
    guard.on_pre_optimizer_step(arguments, state, control, model=model)
    if model.weight.grad is not None:
        model.weight.data -= model.weight.grad
    guard.on_step_end(arguments, state, control, model=model)
    return control


def guarded(tmp_path: Path) -> tuple[GuardCallback, nn.Linear]:
    guard, model = GuardCallback(), nn.Linear(1, 1, bias=False)
    guard.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=model)
    return guard, model


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guard_refuses_bad_steps_only(bad: float, tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    for gradient in (1e-9, 1e-3, 0.5, 30.0):
        step(guard, model, gradient, tmp_path)
        assert model.weight.grad is not None
        assert float(model.weight.grad) == pytest.approx(min(gradient, guard.CLIP), rel=1e-4)
    before = model.weight.item()
    control = step(guard, model, bad, tmp_path)
    assert model.weight.item() == before
    assert guard.skipped == 1
    assert not control.should_training_stop


def test_guard_gives_up_after_many_bad_steps_in_a_row(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    stops = [step(guard, model, math.nan, tmp_path).should_training_stop for _ in range(MOST_BAD_STEPS)]
    assert stops == [False] * (MOST_BAD_STEPS - 1) + [True]


def test_guard_brings_the_last_good_weights_back(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    step(guard, model, 0.5, tmp_path)
    good = model.weight.item()
    step(guard, model, 0.5, tmp_path)  # At those weights its gradient was sound; what it makes of them may not be.
    model.weight.data += 100  # Weights at which no gradient is finite any more.
    for _ in range(RESTORE_AFTER):
        assert model.weight.item() != good
        step(guard, model, math.nan, tmp_path)
    assert model.weight.item() == good


def test_guard_brings_the_last_good_constants_back(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    model.register_buffer("log_constant", torch.zeros(2))
    step(guard, model, 0.5, tmp_path)
    model.log_constant += 9
    for _ in range(RESTORE_AFTER):
        step(guard, model, math.nan, tmp_path)
    assert model.log_constant.tolist() == [0, 0]


def test_nothing_is_saved_while_steps_are_refused(tmp_path: Path) -> None:
    """What the step before them made of the weights may be the reason."""
    guard, model = guarded(tmp_path)
    arguments, state = TrainingArguments(str(tmp_path)), TrainerState(max_steps=100)
    for gradient, saved in ((0.5, True), (math.nan, False), (math.nan, False), (0.5, True)):
        step(guard, model, gradient, tmp_path)
        guard.on_step_end(arguments, state, control := TrainerControl(should_save=True), model=model)
        assert control.should_save is saved


def breaking(step: int, broken: Path) -> Any:
    """An interrupt callback that makes one update break the model, once; the file `broken` is there from then on."""

    class Breaks(loop.InterruptCallback):
        def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
            if state.global_step + 1 == step and not broken.exists():
                broken.touch()
                with torch.no_grad():
                    more["model"].transformer.h[1].mlp.c_proj.weight *= 1e30

    return Breaks


@pytest.mark.parametrize("broken_at", [9, 10, 12, 29])
def test_an_update_that_breaks_the_model_is_taken_back(
    broken_at: int, tiny_model: PreTrainedModel, saved: Saved, tmp_path: Path
) -> None:
    """Whenever it comes: on steps at which weights are remembered or saved as well."""
    text = stdlib_text("os")
    (tmp_path / "a.txt").write_text(text)
    saved(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "InterruptCallback", breaking(broken_at, tmp_path / "broken"))
        result = unnorm.remove(
            str(tmp_path / "model"), data=str(tmp_path / "a.txt"), tokens=30 * 64, batch_size=1, context=64,
            out=tmp_path / "run", kl_budget=100, device="cpu", dtype="float32", recipe="tapernorm",
        )  # fmt: skip
    assert (tmp_path / "broken").exists()
    assert result["skipped_steps"] == min(RESTORE_AFTER, 30 - broken_at) and result["verified"]
    assert result["lnfree_loss"] < 2 * result["teacher_loss"]


def test_weights_are_remembered_at_few_steps_of_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, model = GuardCallback(), nn.Linear(1, 1)
    arguments, control, remembered = TrainingArguments(str(tmp_path)), TrainerControl(), list[int]()
    state = TrainerState(max_steps=200)
    monkeypatch.setattr(
        guard, "_remember", lambda _: remembered.append(state.global_step) or setattr(guard, "to_remember", False)
    )
    guard.on_train_begin(arguments, state, control, model=model)
    for state.global_step in range(1, 201):
        model.weight.grad = torch.full((1, 1), 0.1)
        guard.on_pre_optimizer_step(arguments, state, control, model=model)
        guard.on_step_end(arguments, state, control, model=model)
    assert 50 <= len(remembered) <= 52


def test_a_resumed_guard_goes_on_as_it_was(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    guard.controller = FidelityController(end=0.4)
    for gradient in (0.1, 0.2, 1e6, math.nan):
        step(guard, model, gradient, tmp_path)
    state = TrainerState(stateful_callbacks=[guard])
    state.global_step = 3
    again = GuardCallback(FidelityController(end=0.4))
    again.on_train_begin(TrainingArguments(str(tmp_path)), state, TrainerControl(), model=model)
    assert again.controller == guard.controller
    assert (again.norms, again.skipped, again.in_a_row, again.exploded) == (guard.norms, 1, 1, 2)


@pytest.mark.parametrize(("steps", "most"), [(20, LEAST_PATIENCE), (1000, int(1000 * PATIENCE))])
@pytest.mark.parametrize("end", [0.4, 0.0])
def test_guard_ends_healing_that_gains_nothing_more(end: float, steps: int, most: int, tmp_path: Path) -> None:
    controller = FidelityController(end=end, position=1.0)
    guard, model = GuardCallback(controller, lambda: 0.1), nn.Linear(1, 1)
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=steps), TrainerControl()
    for _ in range(most + 1):  # The first of them is the best.
        guard.on_step_end(arguments, state, control, model=model)
        assert not control.should_training_stop
    guard.on_step_end(arguments, state, control, model=model)
    assert control.should_training_stop is (end > 0)


def test_a_step_of_nan_is_not_applied(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    calls = 0

    def sometimes_nan(*args: Any) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += torch.is_grad_enabled()
        kl, *shown = distillation_losses(*args)
        return kl * (math.nan if torch.is_grad_enabled() and calls in (4, 5) else 1.0), *shown

    monkeypatch.setattr(distillation, "distillation_losses", sometimes_nan)
    result = unnorm.remove(
        model=str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", tokens=30_000, device="cpu", batch_size=8
    )
    assert (result["skipped_steps"], result["set_backs"]) == (2, 2)
    assert math.isfinite(result["lnfree_loss"])


def test_a_batch_that_overflows_on_the_way_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """As a massive activation does it: infinite scales in the forward pass, while constants are still estimated."""
    calls = 0

    def overflow(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return embedded * 1e30 if torch.is_grad_enabled() and calls in (4, 5) else embedded

    def with_overflows(*args: Any, **options: Any) -> PreTrainedModel:
        model = copy_model(*args, **options)
        model.get_input_embeddings().register_forward_hook(overflow)
        return model

    monkeypatch.setattr(start, "copy_model", with_overflows)
    result = unnorm.remove(
        model=str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", tokens=30_000, device="cpu", batch_size=8
    )
    assert result["skipped_steps"] == 2
    assert math.isfinite(result["lnfree_loss"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(math.isfinite(row.get("kl") or math.nan) for row in rows) > len(rows) / 2


def always_nan(*arguments: Any) -> tuple[torch.Tensor, ...]:
    minimized, *shown = distillation_losses(*arguments)
    return minimized * math.nan, *shown


def test_divergence_ends_the_run_with_a_message(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(distillation, "distillation_losses", always_nan)
    with pytest.raises(unnorm.UnnormError, match="diverged"):
        unnorm.remove(
            model=str(tiny_model_dir), data=str(text_file), out=tmp_path, tokens=20_000, device="cpu", batch_size=8
        )


def test_a_run_in_which_nothing_was_learned_is_no_result(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Too few steps to diverge, all of them refused: the twin would be that of no training."""
    monkeypatch.setattr(distillation, "distillation_losses", always_nan)
    with pytest.raises(unnorm.UnnormError, match="Nothing was learned: each of the 2 steps had gradients"):
        unnorm.remove(
            model=str(tiny_model_dir), data=str(text_file), out=tmp_path, tokens=128, context=64, batch_size=1,
            device="cpu",
        )  # fmt: skip


def test_a_run_that_is_stopped_while_steps_are_refused_keeps_its_good_weights(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """What stood in the weights at that moment would be all that a resumed run goes on from."""

    class Stops(breaking(12, tmp_path / "broken")):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if (tmp_path / "broken").exists() and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                signal.raise_signal(signal.SIGINT)

    options: dict[str, Any] = {
        "model": str(tiny_model_dir), "data": str(text_file), "tokens": 30 * 64, "batch_size": 1, "context": 64,
        "out": tmp_path / "run", "device": "cpu", "dtype": "float32", "recipe": "tapernorm",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "InterruptCallback", Stops)
        with pytest.raises(RunInterruptedError, match="nothing is lost"):
            unnorm.remove(**options)
    result = unnorm.remove(resume=True, out=tmp_path / "run")
    assert result["skipped_steps"] == RESTORE_AFTER and result["verified"]


def test_a_run_that_is_stopped_and_diverges_has_diverged(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(distillation, "distillation_losses", always_nan)
    options: dict[str, Any] = {**SETTINGS, "tokens": 30 * 512, "watch": ctrl_c_at(1)}
    with pytest.raises(unnorm.UnnormError, match="The run diverged"):
        unnorm.remove(str(tiny_model_dir), data=str(text_file), out=tmp_path / "run", **options)


def test_a_stop_that_one_process_alone_heard_stops_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupt = loop.InterruptCallback(guarded(tmp_path)[0])
    assert not interrupt.is_asked(torch.device("cpu"))
    monkeypatch.setattr("unnorm.processes.total", lambda value: value + 1)
    assert interrupt.is_asked(torch.device("cpu")) and interrupt.asked
    with interrupt.listening():
        signal.raise_signal(signal.SIGTERM)  # Its own first one, which may come while the checkpoint is written.
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_signals_are_handled_as_before_once_a_run_ends(tmp_path: Path) -> None:
    interrupt = loop.InterruptCallback(guarded(tmp_path)[0])
    before = signal.getsignal(signal.SIGINT)
    with interrupt.listening():
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # The second one stops at once.
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


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


@pytest.mark.parametrize(("position", "expected"), [(0.2, 1), (0.5, 0)])
def test_a_spike_counts_once_though_steps_without_text_follow(position: float, expected: int, tmp_path: Path) -> None:
    kls = iter([0.1, 0.1, 0.8, None, None, 0.1])
    controller = FidelityController(end=0.4, position=position)
    guard, model = GuardCallback(controller, lambda: next(kls)), torch.nn.Linear(1, 1)
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=100), TrainerControl()
    guard.on_train_begin(arguments, state, control, model=model)
    for _ in range(6):
        model.weight.grad = torch.ones(1, 1)
        guard.on_pre_optimizer_step(arguments, state, control, model=model)
        guard.on_step_end(arguments, state, control, model=model)
    assert (controller.set_back, controller.bad_in_a_row) == (expected, 0)


def test_odd_input_is_learned_from_but_gradients_that_go_on_exploding_are_refused(tmp_path: Path) -> None:
    guard, model = guarded(tmp_path)
    guard.controller, guard.take_kl = FidelityController(position=0.4), lambda: 2.0  # Over its budget: it waits.
    refused, exploding, most = [], 1100.0, 900.0
    for gradient in (1.0, 1.0, most, *2 * [exploding], 1.0, *4 * [exploding], 1.0, exploding):
        before = model.weight.item(), guard.skipped
        step(guard, model, gradient, tmp_path)
        refused.append(guard.skipped > before[1])
        moved = 0.0 if refused[-1] else min(gradient, guard.CLIP)
        assert before[0] - model.weight.item() == pytest.approx(moved, rel=1e-4)
    assert refused == [False] * 8 + [True, True, False, False]
    assert guard.controller.set_back == 2
    assert max(guard.norms) == most  # What exploded does not count as usual.


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
    model.weight.grad = torch.full((1, 1), math.nan)
    guard.on_pre_optimizer_step(arguments, state, control, model=model)
    assert guard.good["weight"].item() != 3.0  # They are not known to be sound.
    model.weight.grad = torch.full((1, 1), 0.5)
    guard.on_pre_optimizer_step(arguments, state, control, model=model)
    assert guard.good["weight"].item() == 3.0
