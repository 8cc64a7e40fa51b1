"""One training run, either of the model that loses its norms or of the control that keeps them."""

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from unnorm import processes
from unnorm.data import batches, evenly_spaced
from unnorm.errors import UnnormError, is_out_of_memory, short
from unnorm.models.probe import trace_inputs
from unnorm.models.running import evaluating, without_noise
from unnorm.models.sizes import vocabulary_size
from unnorm.progress import Watch
from unnorm.run_directory import CHECKPOINTS, METRICS
from unnorm.runs.plan import Plan
from unnorm.taper.recipes import Optimization
from unnorm.training.callbacks import (
    InterruptCallback,
    MetricsCallback,
    Removal,
    ScheduleCallback,
)
from unnorm.training.distillation import DistillationTrainer
from unnorm.training.first_tokens import FirstTokens
from unnorm.training.losses import distillation_losses, next_token_loss
from unnorm.training.token_clip import clipping_tokens

QUICK_BLOCKS = 16
"""Validation blocks in each quick evaluation."""
CHECKPOINTS_PER_RUN = 10
LOG_LINES = 100


@dataclass(frozen=True)
class Outcome:
    """How a training run ended.

    Attributes:
        steps: optimizer steps done, including those of interrupted parts.
        tokens: training tokens they took.
        skipped_steps: steps that the guard refused.
        interrupted: whether Ctrl-C or SIGTERM stopped it, with a checkpoint to resume from.
        diverged: whether it was given up because the guard refused too many steps in a row.
        unfinished: sites that are still norms because the KL budget held them up, with their alpha.
        kl_limit: the KL above which the taper waited at the end, in nats per token; None without a controller.
        rows: all rows of `metrics.jsonl`.
    """

    steps: int
    tokens: int
    skipped_steps: int
    interrupted: bool
    diverged: bool
    unfinished: dict[str, float]
    kl_limit: float | None
    rows: list[dict[str, Any]]


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    removal: Removal | None,
    optimization: Optimization,
    plan: Plan,
    train_blocks: Dataset,
    validation_blocks: Dataset,
    directory: Path,
    seed: int,
    watch: Watch,
    report_to: Sequence[str] = (),
    first_tokens: bool = True,
) -> Outcome:
    """Train `model` in place for `plan.steps` steps, resuming from the last checkpoint in `directory` if there is one.

    Args:
        model: the model with its stand-ins, or the plain original to train the control.
        teacher: the original, frozen; the target of distilling recipes and the reference of the quick evaluations.
        removal: what to remove and when; None trains the control with next-token loss.
        optimization: the recipe's loss and optimizer settings.
        plan: sizes, precision and device.
        train_blocks: rows of `input_ids`; repeated if they hold fewer tokens than the plan. Rows whose `stress` is true
            are trained on, but do not count in the logged losses or in the KL that holds up the taper.
        validation_blocks: `QUICK_BLOCKS` of them, evenly spaced, are used in the quick evaluations.
        directory: the run directory, which gets `metrics.jsonl` and `checkpoints/`.
        seed: seed for the order of the blocks.
        watch: called with every row of metrics.
        report_to: transformers' names of experiment trackers.
        first_tokens: whether to train on single tokens too (`FirstTokens`), where tokens may run away.

    Raises:
        UnnormError: memory or disk ran out, or an experiment tracker failed.
    """
    checkpoints = directory / CHECKPOINTS
    trainer = _trainer(
        model,
        args=_arguments(model, optimization, plan, checkpoints, seed, report_to),
        train_dataset=_as_many(train_blocks, plan.steps * plan.batch_size),
        teacher=teacher if removal is not None and optimization.distil else None,
        optimization=optimization,
        removal=removal,
        plan=plan,
        first_tokens=first_tokens,
    )
    quick_blocks = evenly_spaced(validation_blocks, QUICK_BLOCKS)

    def evaluate() -> dict[str, float]:
        values = quick_evaluation(model, teacher, quick_blocks, plan)
        due = trainer.control.should_log
        trainer.log({f"eval_{key}": value for key, value in values.items()})  # For trackers.
        trainer.control.should_log = due  # Logging takes the step's own log line for done.
        return values

    metrics = MetricsCallback(directory / METRICS, plan, watch, evaluate, removal)
    interrupt = InterruptCallback(trainer.guard)
    schedule = ScheduleCallback(removal, model) if removal is not None else None
    callbacks: list[TrainerCallback] = [*([schedule] if schedule else []), metrics, interrupt]
    for callback in callbacks:
        trainer.add_callback(callback)
    last = processes.agree(lambda: last_checkpoint(checkpoints))
    errors = _as_unnorm_errors(plan, checkpoints, report_to)
    clipping = clipping_tokens(model, model.get_output_embeddings()) if trainer.bounded else nullcontext()
    # Distillation needs the function, not a noisy version. Next-token loss (of the control and the published recipes)
    # is minimized with the model's own dropout, as in its pretraining and in the papers' code: a control without it
    # would learn what dropout had kept from the model.
    noise = without_noise(model, keep_dropout=trainer.teacher is None)
    with interrupt.listening(), noise, trainer.matching_reads(), clipping, errors, _run_of_its_own():
        trainer.train(resume_from_checkpoint=last)
    interrupted = interrupt.is_asked(trainer.args.device) and not trainer.guard.diverged
    outcome = _outcome(trainer, removal, plan, metrics.rows, interrupted)
    if schedule is not None and not interrupted:
        schedule.finish()
    return outcome


def _outcome(
    trainer: DistillationTrainer, removal: Removal | None, plan: Plan, rows: list[dict[str, Any]], interrupted: bool
) -> Outcome:
    """How training ended; sites that are still norms are known only before the schedule completes the removal."""
    steps = int(trainer.state.global_step)
    controller = None if removal is None else removal.controller
    is_late = controller is not None and not controller.arrived and not interrupted
    return Outcome(
        steps=steps,
        tokens=steps * plan.step_tokens,
        skipped_steps=trainer.guard.skipped,
        interrupted=interrupted,
        diverged=trainer.guard.diverged,
        unfinished=removal.alphas() if removal is not None and is_late else {},
        kl_limit=None if controller is None else controller.limit,
        rows=rows,
    )


def _trainer(
    model: PreTrainedModel,
    args: TrainingArguments,
    train_dataset: Dataset,
    teacher: PreTrainedModel | None,
    optimization: Optimization,
    removal: Removal | None,
    plan: Plan,
    first_tokens: bool,
) -> DistillationTrainer:
    with _cache_setting_kept(model):
        trainer = DistillationTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=_collate,
            teacher=teacher,
            optimization=optimization,
            removal=removal,
        )
    if trainer.bounded and first_tokens:
        batch_tokens = plan.micro_batch * plan.context
        trainer.learn_first_tokens(FirstTokens(vocabulary_size(model), batch_tokens, args.device))
    if plan.records_steps:
        trainer.record_steps()
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _cache_setting_kept(model: PreTrainedModel) -> Iterator[None]:
    """Restore `use_cache`, which constructing a Trainer turns off for good; some configs do not have it."""
    use_cache = vars(model.config).get("use_cache")
    yield
    if use_cache is None:
        vars(model.config).pop("use_cache", None)
    else:
        model.config.use_cache = use_cache


def _as_many(blocks: Dataset, rows: int) -> Dataset:
    """Repeat the blocks if the run takes more of them: the end of an epoch would cut a batch short.

    Evenly, as text comes before stress blocks and a corpus before the original's own text.
    """
    return blocks if rows <= len(blocks) else blocks.select([row * len(blocks) // rows for row in range(rows)])


@contextmanager
def _run_of_its_own() -> Iterator[None]:
    """Finish the run that training began in wandb: otherwise the control's curves, and the next model's, go into it."""
    before = _wandb_run()
    try:
        yield
    finally:
        if before is None and _wandb_run() is not None:
            sys.modules["wandb"].finish()


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


@contextmanager
def _as_unnorm_errors(plan: Plan, checkpoints: Path, report_to: Sequence[str]) -> Iterator[None]:
    """Turn lack of memory or disk, and failing trackers, into errors that say what to do."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise UnnormError(
                f"Out of memory with {plan.micro_batch} blocks of {plan.context} tokens at once. "
                "Use a smaller --micro-batch or --context."
            ) from error
        if any(word in str(error) for word in ("deserializing", "PytorchStreamReader")):  # Of safetensors, of torch.
            raise UnnormError(
                f"The checkpoint in '{checkpoints}' is damaged ({short(error)}). Delete it, and --resume starts from "
                "the beginning."
            ) from error
        if isinstance(error, OSError | SafetensorError) or "inline_container" in str(error):  # torch.save, full disk
            raise UnnormError(
                f"Could not read or write a checkpoint in '{checkpoints}' ({short(error)}). Free some space and "
                "continue with --resume."
            ) from error
        tracker = type(error).__module__.partition(".")[0]
        if tracker not in report_to:
            raise
        raise UnnormError(
            f"{tracker} failed: {str(error).strip()} Fix that and continue with --resume, or train without it: "
            "--resume --report-to none."
        ) from error


@torch.no_grad()
def quick_evaluation(model: PreTrainedModel, teacher: PreTrainedModel, blocks: Dataset, plan: Plan) -> dict[str, float]:
    """KL to the teacher and the next-token loss of both models on a few blocks, in the run's precision."""
    totals = torch.zeros(3, dtype=torch.float64)
    with evaluating(model), torch.autocast(plan.device.partition(":")[0], torch.bfloat16, enabled=plan.bfloat16):
        for ids in batches(blocks, plan.micro_batch, model.device):
            logits = model(input_ids=ids, use_cache=False).logits
            teacher_logits = teacher(input_ids=ids, use_cache=False).logits
            _, kl, loss = distillation_losses(logits, teacher_logits, ids)
            of_teacher = next_token_loss(teacher_logits, ids)
            totals += len(ids) * torch.stack([kl, loss, of_teacher]).cpu().double()
    return dict(zip(("kl", "loss", "teacher_loss"), (totals / len(blocks)).tolist(), strict=True))


def last_checkpoint(checkpoints: Path) -> str | None:
    """The last complete checkpoint, if any; checkpoints cut short by a kill or a full disk are deleted."""
    for checkpoint in checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:  # The Trainer writes this file last.
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            is_whole = all((checkpoint / name).is_file() for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
        except (OSError, ValueError):
            is_whole = False
        if not is_whole:  # The Trainer would go on with a fresh optimizer.
            checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks, (batch, position), and which of them are text, (batch)."""
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "text": torch.tensor([not row.get("stress", False) for row in rows]),
    }


def leaves_out_parameters(model: PreTrainedModel) -> bool:
    """Whether text leaves some parameters without a gradient: a vision tower's, those of experts without a token."""
    with evaluating(model), torch.enable_grad():  # Without dropout or layer drop, which may leave out more.
        model(input_ids=trace_inputs(model), use_cache=False).logits.sum().backward()
    left_out = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    return left_out


def _arguments(
    model: PreTrainedModel,
    optimization: Optimization,
    plan: Plan,
    checkpoints: Path,
    seed: int,
    report_to: Sequence[str],
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=plan.lr,
        lr_scheduler_type="cosine_with_min_lr" if optimization.least_lr else "linear",
        lr_scheduler_kwargs={"min_lr_rate": optimization.least_lr} if optimization.least_lr else {},
        warmup_steps=min(math.ceil(optimization.warmup * plan.steps), plan.steps - 1),
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.betas[0],
        adam_beta2=optimization.betas[1],
        max_grad_norm=0.0,  # The guard clips, since it needs the norm before clipping.
        bf16=plan.bfloat16,
        torch_compile=plan.compile,
        tf32=False,  # With torch_compile it would be switched on for good, and the run's evaluation is in float32.
        use_cpu=plan.device == "cpu",
        ddp_backend="gloo" if plan.device == "cpu" and plan.processes > 1 else None,
        ddp_broadcast_buffers=False,  # Constants are averaged instead; see ScheduleCallback.
        ddp_find_unused_parameters=plan.processes > 1 and leaves_out_parameters(model),
        save_strategy="steps",
        save_steps=max(1, math.ceil(plan.steps / CHECKPOINTS_PER_RUN)),
        save_total_limit=1,
        logging_steps=max(1, plan.steps // LOG_LINES),
        report_to=list(report_to) or "none",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device.startswith("cuda"),
        disable_tqdm=True,
        log_level="error",
    )
    # With several devices the Trainer would use DataParallel, whose replicas have no reads or bounds; use `torchrun`.
    arguments._n_gpu = min(1, arguments.n_gpu)
    arguments.mixed_precision = "bf16" if plan.bfloat16 else "no"  # Else `accelerate launch` would choose it.
    return arguments
