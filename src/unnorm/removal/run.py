"""What all stages of one run share, and its directory."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.calibrate import CALIBRATION_BLOCKS
from unnorm.config import RemoveConfig, read_config_file
from unnorm.data import spread
from unnorm.errors import UnnormError
from unnorm.evaluation import Evaluation, evaluate_model
from unnorm.limits import set_limits
from unnorm.plan import Plan
from unnorm.progress import Watch, say
from unnorm.recipes import RECIPES, Recipe
from unnorm.run_directory import (
    BEFORE,
    CONFIG_FILE,
    CONTROL,
    DATA,
    RESULT,
    check_can_be_made,
    finished_result,
    nearest_existing,
)
from unnorm.sites import NormSite

DISK_COPIES = 8
"""Sizes of the model in float32 that a run may write: a checkpoint with optimizer state, the models it leaves."""

_MAY_CHANGE_ON_RESUME = {"device", "compile", "cuda_graph", "micro_batch", "report_to", "out", "kl_budget", "control"}


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


def limit(run: Run, student: PreTrainedModel) -> None:
    """Give the neurons of a run's model their limits, where its MLPs are quadratic."""
    calibration = spread(run.train_blocks, CALIBRATION_BLOCKS)
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


def saved_options(options: dict[str, Any]) -> dict[str, Any]:
    """The saved settings of the run to resume; those named again must be the same."""
    if options.get("out") is None:
        raise UnnormError("Which run? Name its directory: --resume --out DIR.")
    directory = Path(options["out"]).expanduser()
    if not (directory / CONFIG_FILE).is_file():
        raise UnnormError(f"'{directory}' holds no run to resume: there is no {CONFIG_FILE} in it.")
    saved = read_config_file(directory / CONFIG_FILE)
    finished = (directory / RESULT).exists()
    if finished:
        _check_control_is_left(directory, {**saved, **options})
    asked = RemoveConfig.create(**{**saved, **options}).to_saved()
    # What was left to be chosen is saved as it was chosen.
    asked |= {key: saved.get(key) for key in ("tokens", "batch_size", "lr") if asked[key] is None}
    if asked["dtype"] == "auto":
        asked["dtype"] = saved.get("dtype")
    if saved.get("twin") and not finished and not (directory / DATA / BEFORE).is_file():  # From then on it has its own.
        _check_healed(directory, Path(saved["twin"]), asked["control"])
    more = (asked["tokens"] or 0) > (saved.get("tokens") or math.inf)
    may_change = _MAY_CHANGE_ON_RESUME | ({"tokens"} if more else set())
    if finished:  # The control is to have what the twin had.
        may_change -= {"tokens", "kl_budget"}
    changed = [key for key in options if key not in may_change and asked[key] != saved.get(key)]
    if changed:
        was = ", ".join(f"{key} {saved.get(key)}" for key in changed)
        raise UnnormError(f"The run in '{directory}' was started with {was}. Leave that out, or start a new run.")
    return {**saved, **{key: options[key] for key in options if key in may_change}}


def not_saved(config: RemoveConfig, directory: Path) -> str:
    """What a resumed run was given anew, where it was stopped before it saved that, as its command has it."""
    saved = read_config_file(directory / CONFIG_FILE)
    may_be_new = {"tokens", *_MAY_CHANGE_ON_RESUME} - {"out", "report_to"}
    words = ""
    for key in filter(may_be_new.__contains__, RemoveConfig.model_fields):
        value, option = getattr(config, key), key.replace("_", "-")
        if value is None or value == saved.get(key):
            continue
        words += f" --{'' if value else 'no-'}{option}" if isinstance(value, bool) else f" --{option} {value}"
    return words


def _check_control_is_left(directory: Path, settings: dict[str, Any]) -> None:
    """Of a finished run only a control that is missing may be asked for."""
    has_one = finished_result(directory).get("control_loss") is not None
    if has_one or not settings.get("control"):
        raise UnnormError(
            f"The run in '{directory}' is finished: there is nothing to resume. `unnorm heal` trains its twin on"
            + ("." if has_one else ", and --resume --control trains the missing control.")
        )
    if settings.get("twin"):
        raise UnnormError(
            f"The twin in '{directory}' is that of another run, trained on, so a control would lack the first run's "
            "tokens. Leave --control out."
        )


def _check_healed(directory: Path, first: Path, control: bool) -> None:
    """The run whose twin is trained on must still be there, with its control if that is to go on as well."""
    if not first.is_dir():
        raise UnnormError(
            f"The run in '{directory}' heals the twin of the one in '{first}', which is no longer there. Put it back, "
            "or start anew: unnorm heal DIR"
        )
    if control:
        check_has_control(first)


def has_control(directory: Path) -> bool:
    """Whether a finished run has a control that `heal` can go on with."""
    return finished_result(directory).get("control_loss") is not None and (directory / CONTROL).is_dir()


def check_has_control(directory: Path) -> None:
    """Raise an UnnormError where a finished run has no control to go on with."""
    if not has_control(directory):
        raise UnnormError(
            f"The run in '{directory}' has no control to go on with. Go on without it (--no-control), or train "
            "it first: unnorm remove --resume --control --out DIR"
        )


def measured_before(directory: Path) -> dict[str, Any]:
    """What the result of a run says of the original, of its naive removal, and of the time it took.

    Raises:
        UnnormError: the file is missing or damaged.
    """
    result = finished_result(directory)
    try:
        naive = {key: math.nan if result[key] is None else float(result[key]) for key in ("naive_loss", "naive_kl")}
        taken_over = {key: result[key] for key in ("massive_neurons", "skipped_steps")}
        return {**naive, **taken_over, "earlier_seconds": float(result["seconds"])}
    except (TypeError, ValueError, KeyError) as error:
        raise UnnormError(f"'{directory / RESULT}' is damaged. Do the run again.") from error


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
