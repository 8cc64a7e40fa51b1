"""The names of a run's files, and reading its result."""

import json
import os
from contextlib import suppress
from pathlib import Path
from shlex import quote
from subprocess import list2cmdline
from typing import Any

from unnorm.errors import UnnormError

CONFIG_FILE = "config.yaml"
MODEL, UNFOLDED = "model", "unfolded"
"""The LN-free twin; the trained model before folding, in the original's class."""
SITES = "sites.json"
"""The former norm sites and their constant scales."""
LIMITS = "limits.safetensors"
"""Neuron limits, in `UNFOLDED`."""
CONTROL = "control"
RESULT, REPORT, CARD = "result.json", "report.html", "README.md"
"""Numbers; the HTML report; the model card, in `MODEL`."""
METRICS, EARLIER = "metrics.jsonl", "earlier.jsonl"
"""Metrics of the run's own training, and of the earlier runs whose twin it continues from."""

# Deleted when the run is finished.
CHECKPOINTS, DATA = "checkpoints", "data"
LAYOUT = "layout.json"
"""In `CHECKPOINTS`: what was decided before the first step and is needed to load the checkpoints' weights."""
LOGS = "runs"
"""TensorBoard's logs, if it is used: in `CHECKPOINTS`, where the Trainer puts them, until the run is finished."""
HELD_OUT = "held_out.txt"
"""In `DATA`, written once all blocks are: how validation text was held out."""
ORIGINAL = "original.sha256"
"""In `DATA`: digest of the original's weights, as a resumed run must find them again."""
FACTS = "facts.json"
"""In `DATA`, written once the twin is saved: what was measured and done before and during training."""
CONTROL_DONE = "control.txt"
"""In `DATA`, written once the control is saved."""


def short_name(source: str) -> str:
    """Display name of a model or of data: the last part of an absolute path, which resumed runs use for local ones."""
    return Path(source).name if Path(source).is_absolute() else source


def named_path(source: str | Path) -> Path:
    """A name as a path, whether or not it exists; `~` is expanded unless its user is unknown.

    Raises:
        UnnormError: it is neither a name nor a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise UnnormError(f"Give a name or a path, not a {type(source).__name__}.")
    return Path(os.path.expanduser(source))  # noqa: PTH111 (pathlib's raises where there is no such user)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, since its existence is the sign that what it describes is complete.

    Raises:
        UnnormError: the disk is full or can't be written to.
    """
    unfinished = path.with_name(f".{path.name}")
    end = "\n" if text and not text.endswith("\n") else ""
    try:
        # File names that are not UTF-8 are escaped.
        unfinished.write_text(text + end, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise UnnormError(f"Could not write '{path}': {error}. Free some space, or make it writable.") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics, one per line; none if there is no file.

    A last line that was cut short, by a kill or a full disk, is skipped.

    Raises:
        UnnormError: another line is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise UnnormError(
                    f"Line {number} of '{path}' is damaged. Delete that line, or do the run again."
                ) from error
    return rows


def resume_command(directory: Path) -> str:
    """The shell command that resumes a run."""
    return f"unnorm remove --resume --out {quoted(directory)}"


def quoted(path: Path | str) -> str:
    """A path as an argument of the machine's shell."""
    return list2cmdline([str(path)]) if os.name == "nt" else quote(str(path))


def nearest_existing(directory: Path) -> Path:
    """The directory itself if it exists, otherwise its nearest parent that does."""
    return next(path for path in (directory, *directory.absolute().parents) if path.exists())


def check_can_be_made(directory: Path) -> None:
    """Raise an UnnormError if a directory can't be created or, where it exists, written to."""
    try:
        str(directory).encode()
    except UnicodeEncodeError as error:
        raise UnnormError(f"{str(directory)!r} is not UTF-8. Choose another --out.") from error
    place = nearest_existing(directory)
    if not place.is_dir():
        raise UnnormError(f"'{directory}' can't be created: '{place}' is a file. Choose another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UnnormError(f"Nothing can be written to '{place}'. Choose another --out.")


def finished_result(directory: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        UnnormError: the file is missing or damaged.
    """
    try:
        result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        return {**result}
    except OSError as error:
        raise UnnormError(
            f"The run in '{directory}' is not finished: there is no readable {RESULT}. Finish it with: "
            f"{resume_command(directory)}"
        ) from error
    except (ValueError, TypeError) as error:
        raise UnnormError(f"'{directory / RESULT}' is damaged. Do the run again.") from error
