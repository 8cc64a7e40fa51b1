"""The state shared by all stages of one run, and its directory."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.calibration.limits import set_limits
from unnorm.calibration.scales import CALIBRATION_BLOCKS
from unnorm.data import HeldOut, evenly_spaced
from unnorm.errors import UnnormError
from unnorm.evaluation import Evaluation, evaluate_model
from unnorm.modeling.modeling_unnorm import limits_of
from unnorm.models.sizes import trained_parameters
from unnorm.paths import check_can_be_made, named_path, nearest_existing
from unnorm.progress import Watch, say
from unnorm.runs.config import RemoveConfig
from unnorm.runs.lock import LOCK
from unnorm.runs.plan import Plan
from unnorm.sites.site import NormSite
from unnorm.taper.norms import TaperedNorm, use_bounds
from unnorm.taper.recipes import RECIPES, Recipe

CHECKPOINT_COPIES, SAVED_COPIES = 3, 2
"""Disk that a checkpoint with optimizer state, and the twin with and without stand-ins, take: in float32 copies of the
model. Two checkpoints are there while one replaces the other."""


@dataclass(frozen=True)
class Run:
    """The state shared by all stages of one run; `weights` is the digest of the original's."""

    directory: Path
    config: RemoveConfig
    plan: Plan
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: list[NormSite]
    weights: str
    train_blocks: Dataset
    stress_blocks: Dataset | None
    validation_blocks: Dataset
    held_out: HeldOut
    watch: Watch

    @property
    def recipe(self) -> Recipe:
        """The recipe named in the settings."""
        return RECIPES[self.config.recipe]

    def say(self, text: str, tokens: int | None = None) -> None:
        """Announce a stage, and the number of tokens it will take."""
        say(self.watch, text, tokens)


def hold_down(run: Run, student: PreTrainedModel, stand_ins: dict[str, TaperedNorm]) -> None:
    """Keep tokens from running away: bounds at the norms' sites, and limits on the neurons of quadratic MLPs."""
    use_bounds(stand_ins.values())
    if not run.config.neuron_limits or limits_of(student):
        return
    calibration = evenly_spaced(run.train_blocks, CALIBRATION_BLOCKS)
    if limited := set_limits(student, run.original, run.sites, stand_ins, calibration):
        run.say(f"set limits on the neurons of {len(limited)} quadratic MLPs")


def evaluate_on_held_out(run: Run, model: PreTrainedModel, name: str, blocks: Dataset | None = None) -> Evaluation:
    """Evaluate a model on all or some held-out blocks, against the original unless it is the original."""
    original = None if model is run.original else run.original
    blocks = run.validation_blocks if blocks is None else blocks
    run.say(f"evaluating: {name}", len(blocks) * run.plan.context)
    return evaluate_model(
        model,
        blocks,
        original,
        name,
        run.config.data,
        run.plan.micro_batch,
        tokenizer=run.tokenizer,
        watch=run.watch,
    )


def open_directory(config: RemoveConfig, resume: bool) -> Path:
    """The run directory, which is not created yet.

    Raises:
        UnnormError: it is not empty and the run is not resumed, or it can't be created.
    """
    directory = _unused_name(f"unnorm-{Path(config.model).name}") if config.out is None else named_path(config.out)
    if not resume and directory.exists() and (not directory.is_dir() or set(directory.iterdir()) - {directory / LOCK}):
        raise UnnormError(f"'{directory}' is not empty. Choose another --out, or resume the run in it: --resume.")
    check_can_be_made(directory)
    return directory


def _unused_name(name: str) -> Path:
    numbered = (Path(name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in numbered if not path.exists())


def needed_disk(model: PreTrainedModel, control: bool) -> int:
    """Bytes that a run's checkpoints and saved models take at most; a tied unembedding counts, as it may be untied.

    A control is trained while the twin's checkpoint and both saved forms are still there.
    """
    copies = 2 * CHECKPOINT_COPIES + SAVED_COPIES + (CHECKPOINT_COPIES if control else 0)
    return copies * 4 * trained_parameters(model)


def check_disk(directory: Path, model: PreTrainedModel, control: bool) -> None:
    """Raise an UnnormError if the disk has no room for what the run may write; files already in it count as free."""
    parent = nearest_existing(directory)
    needed = needed_disk(model, control)
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free + written
    if free < needed:
        raise UnnormError(
            f"Not enough disk space: the run may need {needed / 1e9:.1f} GB, but '{parent}' has {free / 1e9:.1f} GB "
            "for it. Free some space, or choose a larger disk with --out."
        )
