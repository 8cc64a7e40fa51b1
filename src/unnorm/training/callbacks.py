"""What happens around each optimizer step: the schedule, the guard, interruption, and the metrics."""

import json
import math
import signal
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from unnorm import processes
from unnorm.paths import write_text
from unnorm.progress import Watch
from unnorm.run_directory import read_rows
from unnorm.runs.plan import Plan
from unnorm.taper.norms import MOMENTUM, TaperedNorm, TokenMask
from unnorm.taper.schedule import FidelityController, Schedule

QUICK_EVALUATIONS = 12
"""Quick evaluations along a run, besides the one before its first step."""
MOST_BAD_STEPS = 25
"""Consecutive refused steps after which a run is given up."""
RESTORE_AFTER = 3
"""Consecutive refused steps after which the last good weights are restored."""
SNAPSHOTS = 50
"""Snapshots of good weights taken along a run."""
PATIENCE, LEAST_PATIENCE = 0.5, 100
"""Healing ends after this share of the run, and at least this many steps, without a gain in KL."""


@dataclass
class Removal:
    """What is being removed: the stand-ins, when each arrives, and where special tokens are marked.

    Without a controller the schedule's clock is the share of the run that is done. `final` is the stand-in of the final
    norm, None if that is kept. `phase` holds what a step decides in Python: whether the norms are removed, and which
    tokens are special.
    """

    stand_ins: dict[str, TaperedNorm]
    schedule: Schedule
    controller: FidelityController | None
    token_mask: TokenMask
    end_of_text: int | None
    final: TaperedNorm | None = None
    phase: Hashable = None

    def alphas(self) -> dict[str, float]:
        """Current alpha of each site, averaged over its paths."""
        return {name: float(stand_in.alpha.mean()) for name, stand_in in self.stand_ins.items()}

    def progress(self) -> dict[str, float]:
        """Mean alpha and number of removed sites; with a controller also how often it waited and went back so far."""
        alphas = self.alphas().values()
        removed = [bool((stand_in.alpha >= 1).all()) for stand_in in self.stand_ins.values()]
        values = {"alpha": sum(alphas) / len(alphas), "sites_removed": sum(removed), "sites": len(removed)}
        if self.controller is not None:
            values |= {"waited": self.controller.waited, "set_back": self.controller.set_back}
        return values


def saved_attributes(callback: ExportableState, state: TrainerState) -> dict[str, Any]:
    """What a callback's `state` stored in the checkpoint being resumed; empty at the start of a run."""
    saved: Any = (state.stateful_callbacks or {}).get(type(callback).__name__) if state.global_step else None
    return dict(saved["attributes"]) if isinstance(saved, dict) else {}


class ScheduleCallback(TrainerCallback):
    """Sets every alpha before each step, averages the constants over all processes, and completes the removal."""

    def __init__(self, removal: Removal, model: PreTrainedModel) -> None:
        self.removal = removal
        self.mask_position_0 = self.mask_end_of_text = False
        self.hook = model.register_forward_pre_hook(self._mark_special, with_kwargs=True)
        for stand_in in removal.stand_ins.values():
            stand_in.estimating = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for stand_in in self.removal.stand_ins.values():
            stand_in.momentum = MOMENTUM ** (1 / args.gradient_accumulation_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        controller = self.removal.controller
        self.apply(state.global_step / max(1, state.max_steps) if controller is None else controller.position)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._share_constants()  # Before one process writes a checkpoint.

    def apply(self, progress: float) -> None:
        """Put the model in its state at `progress`, a position on the schedule's clock."""
        schedule = self.removal.schedule
        for name, alphas in schedule.alphas(progress).items():
            for path, alpha in zip(self.removal.stand_ins[name].alpha, alphas, strict=True):
                path.fill_(alpha)
        self.mask_position_0 = progress < schedule.special_position_0
        self.mask_end_of_text = progress < schedule.special_end_of_text
        # All at once, so that a compiled model recompiles once rather than for every site.
        removed = progress >= schedule.end
        for stand_in in self.removal.stand_ins.values():
            stand_in.estimating, stand_in.removed = not removed, removed
        self.removal.phase = removed, self.mask_position_0, self.mask_end_of_text

    def finish(self) -> None:
        """Complete the removal and detach from the model."""
        self.apply(1.0)
        self.removal.token_mask.mask = None
        self.hook.remove()

    def _mark_special(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = None
        if self.mask_position_0:
            ids: Tensor = kwargs["input_ids"]
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[:, 0] = True
            if self.mask_end_of_text and self.removal.end_of_text is not None:
                mask = mask | (ids == self.removal.end_of_text)
        self.removal.token_mask.mask = mask

    def _share_constants(self) -> None:
        stand_ins = list(self.removal.stand_ins.values())
        constants = processes.mean(torch.stack([stand_in.log_constant for stand_in in stand_ins]))
        for stand_in, constant in zip(stand_ins, constants, strict=True):
            stand_in.log_constant.copy_(constant)


class GuardCallback(TrainerCallback, ExportableState):
    """Clips gradients, never lets a non-finite or exploding step be applied, and runs the fidelity controller.

    Gradients explode when their norm is over 1000 times the median of recent steps, or 1000 times the clip if that
    median is smaller: distillation starts at zero loss, so its gradients rise from zero. One or two such steps in a row
    come of odd input, from which a twin must learn all the more, and are applied, clipped; the third is refused. After
    several refused steps in a row the last good weights are restored: those at which the next step's gradients were
    sound. `norm` is the gradient norm of the last step before clipping.
    """

    CLIP, EXPLODES, EXPLOSIONS, REMEMBERED = 1.0, 1000.0, 3, 50

    def __init__(
        self,
        controller: FidelityController | None = None,
        take_kl: Callable[[], float | None] = lambda: 0.0,
        held: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Guard a run.

        Args:
            controller: advanced at every step.
            take_kl: returns the KL of the last step over all processes; None if it had no text.
            held: returns the share of its tokens that bounds held down; None if nothing is bounded.
        """
        self.controller, self.take_kl, self.held = controller, take_kl, held
        self.norm, self.norms = 0.0, list[float]()
        self.kl: float | None = None
        self.skipped = self.in_a_row = self.exploded = 0
        self.good: dict[str, Tensor] = {}
        self.to_remember = True

    @property
    def diverged(self) -> bool:
        """Whether so many steps in a row were refused that the run was given up."""
        return self.in_a_row >= MOST_BAD_STEPS

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as transformers stores it."""
        names = ("norms", "kl", "skipped", "in_a_row", "exploded")
        controller = {} if self.controller is None else asdict(self.controller)
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names} | {"controller": controller}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if attributes := saved_attributes(self, state):
            controller = attributes.pop("controller")
            vars(self).update(attributes)
            if self.controller is not None:
                budget = self.controller.kl_budget
                vars(self.controller).update(controller)
                if budget != self.controller.kl_budget:  # Its speed was reduced under another budget.
                    self.controller.kl_budget, self.controller.speed = budget, 1.0
        self._remember(model)
        self.to_remember = True  # Again once known to be sound; until then there is nothing else.

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        norm = self.norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), self.CLIP))
        sound = math.isfinite(norm) and norm <= self._most()
        self.exploded = 0 if sound else self.exploded + 1
        if sound:
            self.norms = [*self.norms, norm][-self.REMEMBERED :]
            if self.to_remember:
                self._remember(model)
        if sound or (math.isfinite(norm) and self.exploded < self.EXPLOSIONS):
            self.in_a_row = 0
            return
        # Optimizers skip parameters that have no gradient.
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row % RESTORE_AFTER == 0:
            self._restore(model)
        if self.diverged:
            control.should_training_stop = True

    @property
    def usual_norm(self) -> float:
        """Median gradient norm of recent steps, before clipping; infinite before the first one."""
        return sorted(self.norms)[len(self.norms) // 2] if self.norms else math.inf

    def _most(self) -> float:
        """Largest gradient norm of a step that does not explode."""
        return self.EXPLODES * max(self.usual_norm, self.CLIP)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        controller, healthy = self.controller, not self.in_a_row
        if controller is not None:
            set_back = controller.set_back
            kl = self.take_kl()
            self.kl = self.kl if kl is None else kl
            # An applied step without text says nothing about the bad step before it.
            silent = kl is None and healthy and controller.bad_in_a_row > 0
            if (self.kl is not None or not healthy) and not silent:
                known = math.nan if self.kl is None else self.kl
                controller.advance(known, not healthy, state.max_steps, self.held())
            healthy = healthy and controller.set_back == set_back
            # A twin being healed further starts at its best KL and gets back to it only as the learning rate falls.
            if not controller.only_heals and controller.stale > max(PATIENCE * state.max_steps, LEAST_PATIENCE):
                control.should_training_stop = True
        if healthy and state.global_step % max(1, state.max_steps // SNAPSHOTS) == 0:
            self.to_remember = True
        if self.in_a_row:  # The last applied step's weights may be what spoils the gradients.
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.to_remember = True  # As a run resumed from this checkpoint does.

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if self.in_a_row and not self.diverged:  # No step is left to tell whether the last applied one broke them.
            self._restore(model)

    @torch.no_grad()
    def _remember(self, model: nn.Module) -> None:
        self.to_remember = False
        for name, value in _learned(model):
            if name in self.good:  # Written over, as a second copy might not fit.
                self.good[name].copy_(value)
            else:
                self.good[name] = value.detach().to("cpu", copy=True)

    @torch.no_grad()
    def _restore(self, model: nn.Module) -> None:
        for name, value in _learned(model):
            value.copy_(self.good[name])


def _learned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights, and the constant scales, which are estimated during training."""
    yield from model.named_parameters()
    yield from ((name, value) for name, value in model.named_buffers() if name.endswith("log_constant"))


class InterruptCallback(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step, saves a checkpoint and stops; a second signal stops at once.

    While steps are refused the weights may be broken, so it waits until a step is sound or the guard gives up the run.
    """

    def __init__(self, guard: GuardCallback) -> None:
        self.guard = guard
        self.asked = self.signalled = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.is_asked(args.device) and not self.guard.in_a_row:
            control.should_save = control.should_training_stop = True

    def is_asked(self, device: torch.device) -> bool:
        """Whether any process was told to stop; all processes must call this together."""
        self.asked = bool(processes.total(torch.tensor(float(self.asked), device=device)) > 0)
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals for as long as training runs."""

        def ask(number: int, _: Any) -> None:
            if self.signalled:  # Not `asked`: another process may have been told first.
                raise KeyboardInterrupt
            self.asked = self.signalled = True

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # Only the main thread may set handlers; elsewhere they stay unchanged.
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def seconds_of_steps(row: dict[str, Any]) -> float:
    """Seconds spent on the steps up to a row of metrics, excluding quick evaluations."""
    return float(row["tokens"] / row["tokens_per_second"]) if row["tokens"] else 0.0


class MetricsCallback(TrainerCallback):
    """Writes `metrics.jsonl`, one row per log line or quick evaluation, and passes each row to the watcher.

    `seconds` is all elapsed time; `tokens_per_second` excludes quick evaluations.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        watch: Watch,
        evaluate: Callable[[], dict[str, float]],
        removal: Removal | None,
    ) -> None:
        self.path, self.plan, self.watch, self.removal = path, plan, watch, removal
        self.evaluate = evaluate
        self.rows: list[dict[str, Any]] = []
        self.seconds_before = self.started = self.measuring = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rows = (
            [row for row in read_rows(self.path) if row["step"] <= state.global_step] if state.global_step else []
        )
        if self.rows:
            self.seconds_before = self.rows[-1]["seconds"]
            self.measuring = self.seconds_before - seconds_of_steps(self.rows[-1])
        self.started = time.perf_counter()
        if state.is_world_process_zero:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        if not self.rows:
            self._quick(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The guard has run by now, so an early end of healing is known here; Ctrl-C is not, so nothing is measured.
        last = state.global_step >= state.max_steps or control.should_training_stop
        if last or state.global_step % max(1, state.max_steps // QUICK_EVALUATIONS) == 0:
            self._quick(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if "learning_rate" in logs:
            measured = {key: logs[key] for key in logs if key in {"loss", "kl", "grad_norm"}}
            self._add(state, "train", {**measured, "lr": logs["learning_rate"]})

    @property
    def seconds(self) -> float:
        """Training time so far, including earlier, interrupted parts."""
        return self.seconds_before + time.perf_counter() - self.started

    def _quick(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            before = time.perf_counter()
            values = self.evaluate()
            self.measuring += time.perf_counter() - before
            self._add(state, "validation", values)

    def _add(self, state: TrainerState, kind: str, values: dict[str, Any]) -> None:
        row: dict[str, Any] = {
            "step": state.global_step,
            "kind": kind,
            "tokens": state.global_step * self.plan.step_tokens,
        }
        row |= {**values, "seconds": self.seconds}
        if self.removal is not None:
            row |= self.removal.progress()
        row["tokens_per_second"] = row["tokens"] / max(row["seconds"] - self.measuring, 1e-9)
        self.rows.append(row)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.watch(row)
