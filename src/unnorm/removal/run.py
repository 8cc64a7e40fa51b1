"""What all stages of one run share, and its directory."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.calibration.limits import set_limits
from unnorm.calibration.scales import CALIBRATION_BLOCKS
from unnorm.data import evenly_spaced
from unnorm.errors import UnnormError
from unnorm.evaluation import Evaluation, evaluate_model
from unnorm.progress import Watch, say
from unnorm.runs.config import RemoveConfig
from unnorm.runs.directory import check_can_be_made, nearest_existing
from unnorm.runs.plan import Plan
from unnorm.sites.site import NormSite
from unnorm.taper.recipes import RECIPES, Recipe

DISK_COPIES = 8
"""Sizes of the model in float32 that a run may write: a checkpoint with optimizer state, the models it leaves."""


@dataclass(frozen=True)
class Run:
    """What all stages of one run share."""

    directory: Path
    config: RemoveConfig
    plan: Plan
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: list[NormSite]
    train_blocks: Dataset
    stress_blocks: Dataset | None
    validation_blocks: Dataset
    held_out: str
    watch: Watch

    @property
    def recipe(self) -> Recipe:
        """The recipe that its settings name."""
        return RECIPES[self.config.recipe]

    def say(self, text: str, tokens: int | None = None) -> None:
        """Announce a stage, and the tokens it will take."""
        say(self.watch, text, tokens)


def limit_quadratic_mlps(run: Run, student: PreTrainedModel) -> None:
    """Give the neurons of a run's model their limits, where its MLPs are quadratic."""
    calibration = evenly_spaced(run.train_blocks, CALIBRATION_BLOCKS)
    if limited := set_limits(student, run.original, run.sites, calibration):
        run.say(f"neurons of {len(limited)} quadratic MLPs have limits now")


def evaluate_on_held_out(run: Run, model: PreTrainedModel, name: str, blocks: Dataset | None = None) -> Evaluation:
    """A model on the held-out blocks, or on some of them, beside the original unless it is that."""
    original = None if model is run.original else run.original
    return evaluate_model(
        model,
        run.validation_blocks if blocks is None else blocks,
        original,
        name,
        run.config.data,
        run.plan.micro_batch,
        tokenizer=run.tokenizer,
    )


def open_directory(config: RemoveConfig, resume: bool) -> Path:
    """Where the run goes; nothing is made yet.

    Raises:
        UnnormError: it holds something already, or can't be made.
    """
    directory = _unused_name(f"unnorm-{Path(config.model).name}") if config.out is None else config.out.expanduser()
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UnnormError(f"'{directory}' is not empty. Choose another --out, or go on with the run in it: --resume.")
    check_can_be_made(directory)
    return directory


def _unused_name(name: str) -> Path:
    numbered = (Path(name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in numbered if not path.exists())


def check_disk(directory: Path, model: PreTrainedModel) -> None:
    """Raise an UnnormError where the disk has no room for what the run may write, of which some may be there."""
    parent = nearest_existing(directory)
    needed = DISK_COPIES * 4 * sum(p.numel() for p in model.parameters())
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free + written
    if free < needed:
        raise UnnormError(
            f"Not enough disk: the run may need {needed / 1e9:.1f} GB and '{parent}' has {free / 1e9:.1f} GB for it. "
            "Free some space, or start the run in a roomier place by --out."
        )
