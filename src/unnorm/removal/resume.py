"""What resumed and healed runs take over from the saved settings and results, and what they may change."""

import math
from pathlib import Path
from typing import Any

from unnorm.errors import UnnormError
from unnorm.paths import named_path
from unnorm.run_directory import CONFIG_FILE, CONTROL, DATA, FACTS, ORIGINAL, RESULT, finished_result
from unnorm.runs.config import RemoveConfig, read_config_file

_MAY_CHANGE_ON_RESUME = {"device", "compile", "cuda_graph", "micro_batch", "report_to", "out", "kl_budget", "control"}


def saved_options(options: dict[str, Any]) -> dict[str, Any]:
    """The saved settings of the run to resume, updated with those options that may be changed.

    Raises:
        UnnormError: there is no such run, it has nothing left to do, or an option would change a fixed setting.
    """
    if options.get("out") is None:
        raise UnnormError("--resume needs the run's directory: add --out DIR.")
    directory = named_path(options["out"])
    if not (directory / CONFIG_FILE).is_file():
        raise UnnormError(f"'{directory}' holds no run to resume: there is no {CONFIG_FILE} in it.")
    saved = read_config_file(directory / CONFIG_FILE)
    if saved.get("trust_remote_code") and not options.get("trust_remote_code"):  # The run may be somebody else's.
        raise UnnormError(
            f"The run in '{directory}' was started with --trust-remote-code. Add it again, if you trust the code of "
            f"'{saved.get('model')}'."
        )
    finished = (directory / RESULT).exists()
    if finished:
        _check_control_is_left(directory, {**saved, **options})
    asked = RemoveConfig.create(**{**saved, **options}).to_saved()
    # Settings left to be chosen automatically were saved as chosen.
    asked |= {key: saved.get(key) for key in ("tokens", "batch_size", "lr") if asked[key] is None}
    if asked["dtype"] == "auto":
        asked["dtype"] = saved.get("dtype")
    more = (asked["tokens"] or 0) > (saved.get("tokens") or math.inf)
    # Once facts are saved, the run has a twin of its own, unless it is trained anew on more tokens.
    has_twin = (directory / DATA / FACTS).is_file() and not more
    if saved.get("twin") and not finished and not has_twin:
        _check_healed(directory, Path(saved["twin"]), asked["control"])
    may_change = _MAY_CHANGE_ON_RESUME | ({"tokens"} if more else set())
    if finished:  # The control must be trained with the same settings as the twin.
        may_change -= {"tokens", "kl_budget"}
    changed = [key for key in options if key not in may_change and asked[key] != saved.get(key)]
    if changed:
        was = ", ".join(f"{key} {saved.get(key)}" for key in changed)
        raise UnnormError(f"The run in '{directory}' was started with {was}. Leave that out, or start a new run.")
    return {**saved, **{key: options[key] for key in options if key in may_change}}


def check_same_original(config: RemoveConfig, directory: Path, weights: str) -> None:
    """Raise an UnnormError if the weights of the original are not those that this run, or the healed one, had."""
    known = {directory: _digest_in(directory)}
    if config.twin is not None:
        known[config.twin] = _digest_in(config.twin)
    changed = [run for run, digest in known.items() if digest not in (None, weights)]
    if changed:
        raise UnnormError(
            f"The weights of '{config.model}' have changed since the run in '{changed[0]}'. Put them back as they "
            "were, or start a new run."
        )


def _digest_in(directory: Path) -> str | None:
    """The original's digest as a run saved it; None before that, or if an earlier version did not."""
    if (directory / RESULT).is_file():
        found: str | None = finished_result(directory).get("original_sha256")
        return found
    path = directory / DATA / ORIGINAL
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def not_saved(config: RemoveConfig, directory: Path) -> str:
    """Changed settings, as command-line options, of a resumed run that was stopped before it saved them."""
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
    """Raise an UnnormError unless a finished run, itself not a healing run, is resumed to add a missing control."""
    has_one = has_control(directory)
    if has_one or not settings.get("control"):
        raise UnnormError(
            f"The run in '{directory}' is finished: there is nothing to resume. `unnorm heal` trains its twin further"
            + ("." if has_one else ", and --resume --control trains the missing control.")
        )
    if settings.get("twin"):
        raise UnnormError(
            f"The twin in '{directory}' was healed from another run's, so a control would lack the first run's tokens. "
            "Leave --control out."
        )


def _check_healed(directory: Path, first: Path, control: bool) -> None:
    """Raise an UnnormError if the run whose twin is healed is gone, or lacks a control to be trained further."""
    if not first.is_dir():
        raise UnnormError(
            f"The run in '{directory}' heals the twin of the one in '{first}', which is no longer there. Put it back, "
            f"or set its new path in '{directory / CONFIG_FILE}' (twin: …)."
        )
    if control:
        check_has_control(first)


def has_control(directory: Path) -> bool:
    """Whether a finished run has a control that `heal` can train further."""
    return finished_result(directory).get("control_loss") is not None and (directory / CONTROL).is_dir()


def check_has_control(directory: Path) -> None:
    """Raise an UnnormError if a finished run has no control that can be trained further."""
    if not has_control(directory):
        was_healed = read_config_file(directory / CONFIG_FILE).get("twin")  # To such a run none can be added.
        raise UnnormError(
            f"The run in '{directory}' has no control to train further. Heal without it (--no-control)"
            + ("." if was_healed else ", or train it first: unnorm remove --resume --control --out DIR")
        )
