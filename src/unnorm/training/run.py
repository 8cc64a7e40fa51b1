"""One training run: of the model that loses its norms, or of the control that keeps them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from unnorm import processes
from unnorm.calibrate import batches, evaluating, spread
from unnorm.config import Plan
from unnorm.errors import UnnormError
from unnorm.losses import (
    RUNAWAY,
    Penalty,
    distillation_losses,
    massive_unevenness,
    next_token_loss,
    read_mismatch,
    scale_penalty,
    unevenness,
)
from unnorm.norms import TaperedNorm
from unnorm.schedule import Recipe
from unnorm.sites import vocabulary_size
from unnorm.training.callbacks import (
    GuardCallback,
    InterruptCallback,
    MetricsCallback,
    Removal,
    ScheduleCallback,
    Watcher,
)
from unnorm.training.first_tokens import DRAWN, LEARNED, first_token_losses
from unnorm.training.recorded_step import RecordedStep
from unnorm.training.token_clip import clipping_tokens

QUICK_BLOCKS = 16
"""Validation blocks in the quick evaluations along the way."""
CHECKPOINTS = 5
LOG_LINES = 100
READS_SHARE = 0.7
"""Share of the run in which reads are matched; what they cost of the final KL is then made good.

Steps by which the taper is late do not count: what it waits for is what matching brings about."""

MASSIVE_SCALE = 3.0
"""A token is massive at a site where its scale in the original is this many times the constant."""

STRESS_TEMPERATURE = 2.0
"""Stress blocks are distilled at it: worst losses are of tokens that the teacher gives next to no probability."""


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimizer that belong to a recipe.

    Attributes:
        least_lr: share of the peak learning rate at the end of the cosine; 0 stands for a straight line to zero.
        warmup: share of the steps with rising learning rate.
        weight_decay: AdamW's.
        betas: AdamW's.
        distil: minimize KL to the teacher's logits; else next-token loss.
        label_weight: weight of the next-token loss beside KL.
        penalty: what else is minimized at the final norm; see `scale_penalty`.
        penalty_weight: its weight.
        read_weight: weight of `read_mismatch`, averaged over all sites; it falls to 0 over the first `READS_SHARE`.
        massive_even_weight: weight of `massive_unevenness`, averaged over all bounded sites. It brings massive
            activations, once scaled down, to the constant scale.
        even_weight: weight of `unevenness`, averaged over all bounded sites, times alpha^4: while much is still held
            down it would only stand in the way. Once all are removed KL says the same of ordinary tokens, and those
            alone count that are beyond `RUNAWAY`, first tokens among them (`first_token_losses`).
    """

    least_lr: float
    warmup: float
    weight_decay: float
    betas: tuple[float, float]
    distil: bool
    label_weight: float = 0.0
    penalty: Penalty | None = None
    penalty_weight: float = 0.0
    read_weight: float = 0.0
    massive_even_weight: float = 0.0
    even_weight: float = 0.0


OPTIMIZATION: dict[Recipe, Optimization] = {
    "taper": Optimization(
        0.0,
        0.05,
        0.0,
        (0.9, 0.98),
        distil=True,
        label_weight=0.05,
        read_weight=10.0,
        massive_even_weight=10.0,
        even_weight=1000.0,
    ),
    # arXiv 2409.13710 and 2507.02559: weight decay 0.01, 20 of 300 steps of warm-up, a cosine to half the peak.
    "sequential": Optimization(0.5, 20 / 300, 0.01, (0.9, 0.999), distil=False),
    # The weight is that of 2507.02559's published configuration.
    "sequential-aux": Optimization(0.5, 20 / 300, 0.01, (0.9, 0.999), False, penalty="spread", penalty_weight=0.1),
    "tapernorm": Optimization(0.1, 0.05, 0.01, (0.9, 0.95), False, penalty="target", penalty_weight=0.1),
}


@dataclass(frozen=True)
class Outcome:
    """How a training run ended.

    Attributes:
        steps: optimizer steps done, of interrupted parts too.
        tokens: training tokens they took.
        seconds: their time.
        skipped_steps: steps that the guard did not let through.
        interrupted: stopped by Ctrl-C or SIGTERM, with a checkpoint to go on from.
        diverged: given up, because the guard refused too many steps in a row.
        unfinished: sites that are still norms, and their alpha: the KL budget held them up.
        rows: all rows of `metrics.jsonl`.
    """

    steps: int
    tokens: int
    seconds: float
    skipped_steps: int
    interrupted: bool
    diverged: bool
    unfinished: dict[str, float]
    rows: list[dict[str, Any]]


class DistillationTrainer(Trainer):
    """Trainer whose loss is KL to the teacher's logits, or next-token loss where there is no teacher.

    A penalty at the final norm comes on top, if the recipe has one.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None,
        optimization: Optimization,
        removal: Removal | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.optimization = teacher, optimization
        self.removal = removal
        self.end_of_text = None if removal is None else removal.end_of_text
        self.controller = None if removal is None else removal.controller
        self.penalized: TaperedNorm | None = None
        if removal is not None and optimization.penalty is not None:
            self.penalized = list(removal.stand_ins.values())[-1]
            self.penalized.keep_log_scale = True
        self.stand_ins = removal.stand_ins if removal is not None and optimization.read_weight else {}
        self.teacher_reads: dict[str, Tensor] = {}
        self.massive: dict[str, Tensor | None] = {}
        self.bounded = [stand_in for stand_in in self.stand_ins.values() if stand_in.interpolation == "bounded"]
        self.sums = torch.zeros(3, device=self.args.device)
        self.step_kl = torch.zeros(2, device=self.args.device)
        self.last_kl = 0.0
        self.recorded: RecordedStep | None = None

    def record_steps(self) -> None:
        """From now on, replay steps from a record."""

        def step(inputs: dict[str, Tensor]) -> Tensor:
            return cast(Tensor, Trainer.training_step(self, self.model_wrapped, inputs))

        assert self.model is not None
        self.recorded = RecordedStep(step, list(self.model.parameters()))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Loss of a batch of `input_ids`, (batch, position); sums up what the next log line shows, of `text` rows.

        What else changes from step to step comes with the batch, see `_with_step`: a recorded step is not asked again.
        """
        ids, is_text = inputs["input_ids"], inputs["text"]
        output = model(input_ids=ids, use_cache=False)
        if self.teacher is None:
            loss = next_token_loss(output.logits, ids)
            shown = torch.stack([loss.detach(), torch.full_like(loss, math.nan), torch.ones_like(loss)])
        else:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits
            loss, text_kl, token_loss = distillation_losses(
                output.logits, teacher_logits, ids, is_text, STRESS_TEMPERATURE, self.optimization.label_weight
            )
            shown = torch.stack([token_loss, text_kl, torch.ones_like(text_kl)])
            shown = (is_text.sum() * shown).masked_fill(~is_text.any(), 0.0)
            self.step_kl += shown[1:]
            if "read_share" in inputs:
                loss = loss + inputs["read_share"] * self.optimization.read_weight * self._read_mismatch()
            if self.bounded:
                loss = loss + self._unevenness()
            if "first_tokens" in inputs:
                loss = loss + self._first_token_loss(model, inputs["first_tokens"], len(ids.flatten()))
        self.sums += shown
        if self.penalized is not None:
            loss = loss + self._penalty(self.penalized, ids)
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch; on a GPU replayed from a record, where that is possible."""
        inputs = self._with_step(model, inputs)
        if self.recorded is None:
            return cast(Tensor, super().training_step(model, inputs, num_items_in_batch))
        phase = None if self.removal is None else self.removal.phase
        return self.recorded(phase, self._prepare_inputs(inputs))

    def _with_step(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch, with the weight of matching reads and tokens that are looked at alone, where there are any."""
        inputs = dict(inputs)
        if share := self._inner_share():
            inputs["read_share"] = torch.tensor(share)
        if self.bounded and self.bounded[0].removed:
            vocabulary = vocabulary_size(self.accelerator.unwrap_model(model, keep_torch_compile=False))
            shape = self.args.world_size, max(1, round(DRAWN * inputs["input_ids"].numel())), 1
            inputs["first_tokens"] = torch.randint(vocabulary, shape)[self.args.process_index]
        return inputs

    @contextmanager
    def matching_reads(self) -> Iterator[None]:
        """Keep what the norms of the teacher and their stand-ins give in each training pass, if the loss needs it."""

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                self.teacher_reads[name] = output
                stand_in = self.stand_ins[name]
                # Once the norms are gone the weight of few tokens is only in the way of all others.
                told_apart = self.bounded and not stand_in.removed
                self.massive[name] = stand_in.departure(args[0]) > math.log(MASSIVE_SCALE) if told_apart else None

            return hook

        teacher = self.teacher
        handles = [teacher.get_submodule(name).register_forward_hook(keep(name)) for name in self.stand_ins if teacher]
        for stand_in in self.stand_ins.values():
            stand_in.keep_output = True
        for stand_in in self.bounded:
            stand_in.keep_log_scale = True
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for stand_in in self.stand_ins.values():
                stand_in.keep_output, stand_in.kept_output = False, None
            for stand_in in self.bounded:
                stand_in.keep_log_scale, stand_in.kept_log_scale = False, None
            self.teacher_reads.clear()
            self.massive.clear()

    def _inner_share(self) -> float:
        """What is left of the weights of what is matched inside the model."""
        if not self.stand_ins:
            return 0.0
        step, steps = self.state.global_step, max(1, self.state.max_steps)
        late = 0 if self.controller is None else self.controller.late(step, steps)
        return max(0.0, 1 - (step - late) / steps / READS_SHARE)

    def _read_mismatch(self) -> Float[Tensor, ""]:
        mismatches = []
        for name, stand_in in self.stand_ins.items():
            assert stand_in.kept_output is not None
            mismatches.append(read_mismatch(stand_in.kept_output, self.teacher_reads[name], self.massive[name]))
        return torch.stack(mismatches).mean()

    def _unevenness(self) -> Float[Tensor, ""]:
        uneven = []
        for name, stand_in in self.stand_ins.items():
            if stand_in.kept_log_scale is None:
                continue
            scale = stand_in.kept_log_scale, stand_in.log_constant[0]
            massive = self.massive[name]
            if massive is None:
                uneven.append(self.optimization.even_weight * unevenness(*scale, RUNAWAY))
            else:
                uneven.append(
                    self.optimization.even_weight * stand_in.alpha.mean() ** 4 * unevenness(*scale)
                    + self.optimization.massive_even_weight * massive_unevenness(*scale, massive)
                )
        return torch.stack(uneven).mean()

    def _first_token_loss(
        self, model: nn.Module, drawn: Int[Tensor, "drawn 1"], batch_tokens: int
    ) -> Float[Tensor, ""]:
        """Of tokens alone, each counted like one of the batch. Overwrites the log scales that are kept."""
        assert self.teacher is not None
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        count = max(1, round(LEARNED * batch_tokens))
        with self.accelerator.autocast():
            kl, uneven = first_token_losses(plain, self.teacher, self.bounded, drawn, count)
        return LEARNED * (kl + self.optimization.even_weight * uneven)

    def held(self) -> float | None:
        """Share of the last batch's tokens that bounds held down, over all sites and processes; None without bounds."""
        shares = [share for stand_in in self.bounded if (share := stand_in.held) is not None]
        if not shares:
            return None
        mean = torch.stack(shares).mean()
        share, count = processes.total(torch.stack([mean, torch.ones_like(mean)])).tolist()
        return float(share / count)

    def _penalty(self, norm: TaperedNorm, ids: Int[Tensor, "batch position"]) -> Float[Tensor, ""]:
        assert norm.kept_log_scale is not None and self.optimization.penalty is not None
        special = torch.zeros_like(ids, dtype=torch.bool) if self.end_of_text is None else ids == self.end_of_text
        special[:, 0] = True
        penalty = scale_penalty(norm.kept_log_scale, special, norm.log_constant[0], self.optimization.penalty)
        return self.optimization.penalty_weight * penalty

    def take_step_kl(self) -> float:
        """Mean KL on text since the last call, over all processes; as it was, where all rows were stress blocks."""
        sums = processes.total(self.step_kl)
        self.step_kl.zero_()
        kl, count = sums.tolist()
        self.last_kl = float(kl / count) if count else self.last_kl
        return self.last_kl

    def take_means(self) -> dict[str, float]:
        """Means of loss and KL on text since the last call, over all processes; none, where there was no text."""
        sums = processes.total(self.sums)
        self.sums.zero_()
        loss, kl, count = sums.tolist()
        if not count:
            return {}
        return {"loss": loss / count} if math.isnan(kl) else {"loss": loss / count, "kl": kl / count}


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    removal: Removal | None,
    recipe: Recipe,
    plan: Plan,
    train_blocks: Dataset,
    validation_blocks: Dataset,
    directory: Path,
    seed: int,
    watch: Watcher,
    report_to: Sequence[str] = (),
) -> Outcome:
    """Train `model` in place for `plan.steps` steps, going on from the last checkpoint in `directory` if there is one.

    Args:
        model: the model with its stand-ins, or the plain original to train the control.
        teacher: the original, frozen; the loss of distilling recipes, and the yardstick of the quick evaluations.
        removal: what to remove and when; None trains the control with next-token loss.
        recipe: sets the optimizer.
        plan: sizes, precision and device.
        train_blocks: rows of `input_ids`; gone over again if they are fewer than the plan's tokens. Rows whose
            `stress` is true are trained on, but do not count in the losses that are shown and that hold the taper.
        validation_blocks: `QUICK_BLOCKS` of them, evenly spaced, show how it goes.
        directory: gets `metrics.jsonl` and `checkpoints/`.
        seed: of the order of the blocks.
        watch: told every row of metrics.
        report_to: transformers' names of experiment trackers.

    Raises:
        UnnormError: memory or disk ran out.
    """
    optimization = OPTIMIZATION[recipe]
    trainer = DistillationTrainer(
        model=model,
        args=_arguments(optimization, plan, directory / "checkpoints", seed, report_to),
        train_dataset=train_blocks,
        data_collator=_collate,
        teacher=teacher if removal is not None and optimization.distil else None,
        optimization=optimization,
        removal=removal,
    )
    if plan.records_steps:
        trainer.record_steps()
    trainer.remove_callback(PrinterCallback)
    quick_blocks = spread(validation_blocks, QUICK_BLOCKS)
    metrics = MetricsCallback(
        directory / "metrics.jsonl",
        plan,
        watch,
        lambda: quick_evaluation(model, teacher, quick_blocks, plan),
        trainer.take_means,
        removal,
    )
    interrupt = InterruptCallback()
    schedule = ScheduleCallback(removal, model) if removal is not None else None
    guard = GuardCallback(removal.controller if removal is not None else None, trainer.take_step_kl, trainer.held)
    callbacks: list[TrainerCallback | None] = [schedule, guard, interrupt, metrics]
    for callback in callbacks:
        if callback is not None:
            trainer.add_callback(callback)
    checkpoints = directory / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    use_cache = model.config.use_cache
    clipping = clipping_tokens(model, model.get_output_embeddings()) if trainer.bounded else nullcontext()
    with interrupt.listening(), trainer.matching_reads(), clipping:
        try:
            trainer.train(resume_from_checkpoint=last)
        except torch.OutOfMemoryError as error:
            raise UnnormError(
                f"Out of memory with {plan.micro_batch} blocks of {plan.context} tokens at once. "
                "Use a smaller --batch-size or --context."
            ) from error
        except (OSError, SafetensorError) as error:
            raise UnnormError(
                f"Could not write a checkpoint to '{checkpoints}': {error}. Free some space and go on with --resume."
            ) from error
    model.config.use_cache = use_cache  # The Trainer turns it off for good.
    steps = int(trainer.state.global_step)
    unfinished = {}
    if schedule is not None and removal is not None and not interrupt.asked:
        unfinished = {} if removal.controller is None or removal.controller.arrived else removal.alphas()
        schedule.finish()
    return Outcome(
        steps=steps,
        tokens=steps * plan.step_tokens,
        seconds=metrics.seconds,
        skipped_steps=guard.skipped,
        interrupted=interrupt.asked,
        diverged=guard.diverged,
        unfinished=unfinished,
        rows=metrics.rows,
    )


@torch.no_grad()
def quick_evaluation(model: PreTrainedModel, teacher: PreTrainedModel, blocks: Dataset, plan: Plan) -> dict[str, float]:
    """Next-token loss of `model` and its KL to the teacher on a few blocks, in the run's precision."""
    totals = torch.zeros(2, dtype=torch.float64)
    with evaluating(model), torch.autocast(plan.device.partition(":")[0], torch.bfloat16, enabled=plan.bfloat16):
        for ids in batches(blocks, plan.micro_batch, model.device):
            logits = model(input_ids=ids, use_cache=False).logits
            teacher_logits = teacher(input_ids=ids, use_cache=False).logits
            pair = torch.stack(distillation_losses(logits, teacher_logits, ids)[1:])
            totals += len(ids) * pair.double().cpu()
    kl, loss = (totals / len(blocks)).tolist()
    return {"loss": loss, "kl": kl}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks, (batch, position), and which of them are text, (batch)."""
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "text": torch.tensor([not row.get("stress", False) for row in rows]),
    }


def _arguments(
    optimization: Optimization, plan: Plan, checkpoints: Path, seed: int, report_to: Sequence[str]
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=plan.lr,
        lr_scheduler_type="cosine_with_min_lr" if optimization.least_lr else "linear",
        lr_scheduler_kwargs={"min_lr_rate": optimization.least_lr} if optimization.least_lr else {},
        warmup_steps=math.ceil(optimization.warmup * plan.steps),
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.betas[0],
        adam_beta2=optimization.betas[1],
        max_grad_norm=0.0,  # The guard clips, so that it sees the norm before.
        bf16=plan.bfloat16,
        torch_compile=plan.compile,
        use_cpu=plan.device == "cpu",
        ddp_backend="gloo" if plan.device == "cpu" and plan.processes > 1 else None,
        ddp_broadcast_buffers=False,  # Constants are averaged instead; see ScheduleCallback.
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=max(1, math.ceil(plan.steps / CHECKPOINTS)),
        save_total_limit=1,
        logging_steps=max(1, plan.steps // LOG_LINES),
        report_to=list(report_to) or "none",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device.startswith("cuda"),
        disable_tqdm=True,
        log_level="error",
    )
