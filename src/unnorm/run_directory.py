"""The names of a run's files, and reading its result."""

import json
import os
from pathlib import Path
from typing import Any

from unnorm.errors import UnnormError
from unnorm.paths import quoted

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


def model_within(path: Path) -> Path:
    """The twin in a run directory; any other path itself."""
    return path if (path / "config.json").is_file() or not (path / MODEL).is_dir() else path / MODEL


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
    """The shell command that resumes a run, with as many processes and as much trust as it has."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    command = "unnorm" if launched == 1 else f"torchrun --nproc-per-node {launched} -m unnorm"
    settings = directory / CONFIG_FILE
    saved = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
    trusts = "\ntrust_remote_code: true" in saved
    return f"{command} remove --resume --out {quoted(directory)}{' --trust-remote-code' if trusts else ''}"


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
