"""What a healing run takes over from the finished run whose twin it trains further."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unnorm import processes
from unnorm.errors import UnnormError
from unnorm.folding.checkpoint import load, load_unfolded
from unnorm.paths import write_text
from unnorm.removal.facts import Facts, facts_of
from unnorm.removal.run import Run, hold_down
from unnorm.run_directory import CONTROL, EARLIER, METRICS, RESULT, finished_result, read_rows
from unnorm.runs.config import run_settings
from unnorm.taper.norms import TaperedNorm
from unnorm.training.callbacks import seconds_of_steps


def take_up_twin(run: Run) -> tuple[PreTrainedModel, dict[str, TaperedNorm], Facts]:
    """The unfolded twin of the finished run, its stand-ins, and the facts of that run.

    Raises:
        UnnormError: files of the finished run are missing or damaged, or it has other sites.
    """
    directory = run.config.twin
    assert directory is not None
    result, facts = finished_result(directory), facts_of(directory)
    was, now = run_settings(directory), run.config.to_saved()  # With absolute paths.
    same = not facts.earlier_data and all(was.get(key) == now[key] for key in ("data", "text_field", "split"))
    facts = replace(
        facts,
        skipped_steps=0,
        earlier_text_tokens=int(result.get("text_tokens") or 0),
        earlier_data=[] if same else [*facts.earlier_data, str(was.get("data"))],
    )
    student = load_unfolded(directory)
    stand_ins = {name: module for name, module in student.named_modules() if isinstance(module, TaperedNorm)}
    if set(stand_ins) != {site.name for site in run.sites}:
        raise UnnormError(
            f"The run in '{directory}' removed different norms than these settings ask for: see its --keep."
        )
    for stand_in in stand_ins.values():
        stand_in.log_constant = stand_in.log_constant.to(stand_in.gain.dtype)
    student.to(run.plan.device)  # Only now: the constants were loaded in float64, which Apple GPUs lack.
    if facts.runs_away:
        hold_down(run, student, stand_ins)
    for stand_in in stand_ins.values():
        stand_in.alpha.fill_(1.0)
    _take_over_history(directory, run.directory)
    return student, stand_ins, facts


def take_up_control(run: Run) -> PreTrainedModel:
    """The finished run's control.

    Raises:
        UnnormError: its files are missing or damaged.
    """
    assert run.config.twin is not None
    control = load(run.config.twin / CONTROL).to(run.plan.device)
    _take_over_history(run.config.twin / CONTROL, run.directory / CONTROL)
    return control


def history(directory: Path) -> list[dict[str, Any]]:
    """Metrics rows of a run, preceded by those of the earlier runs that its twin comes from."""
    earlier, rows = (read_rows(directory / name) for name in (EARLIER, METRICS))
    if not earlier:
        return rows
    return [*earlier, *(_after(earlier[-1], row) for row in rows)]


def _after(last: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row of a later run, with step, tokens and seconds counted from the start of the first run."""
    spent = {key: last[key] + row[key] for key in ("step", "tokens", "seconds")}
    seconds = seconds_of_steps(last) + seconds_of_steps(row)
    return {**row, **spent, "tokens_per_second": spent["tokens"] / max(seconds, 1e-9)}


def spent_tokens(directory: Path) -> int:
    """Total tokens that the twin of a finished run was trained on."""
    return int(finished_result(directory).get("tokens") or 0)


def spent_seconds(directory: Path) -> float:
    """Training time so far of twin and control; of a finished run, its control's only: the result has the rest."""
    parts = [directory / CONTROL] + ([] if (directory / RESULT).is_file() else [directory])
    rows = (read_rows(part / METRICS) for part in parts)
    return sum(float(found[-1]["seconds"]) for found in rows if found)


def _take_over_history(finished: Path, directory: Path) -> None:
    def write() -> None:
        directory.mkdir(exist_ok=True)
        write_text(directory / EARLIER, "\n".join(map(json.dumps, history(finished))))

    processes.agree(write)
