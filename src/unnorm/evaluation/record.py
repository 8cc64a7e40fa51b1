"""Measurements on disk, each written as soon as it is made, so that an interrupted evaluation can be resumed."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from unnorm.errors import UnnormError
from unnorm.evaluation.results import Results
from unnorm.json_text import digest, json_text
from unnorm.paths import check_can_be_made, named_path, write_text

MEASUREMENTS, RESULTS, PAGE = "measurements", "evaluation.json", "evaluation.html"

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """Directory in which measurements are kept; None keeps nothing."""

    directory: Path | None

    @classmethod
    def open(cls, directory: str | Path | None) -> "Record":
        """Open a new or existing record.

        Raises:
            UnnormError: the path holds something other than an evaluation, or the directory can't be made.
        """
        if directory is None:
            return cls(None)
        path = named_path(directory)
        if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / MEASUREMENTS).is_dir())):
            raise UnnormError(f"'{path}' holds something other than an evaluation. Choose another --out.")
        check_can_be_made(path)
        return cls(path)

    def recall(self, kind: type[T], key: dict[str, Any], measure: Callable[[], T]) -> T:
        """The measurement recorded under this key, otherwise the result of `measure`, which is written at once.

        Args:
            kind: dataclass of the measurement, or a list of one.
            key: everything the measurement depends on, as plain values.
            measure: makes the measurement.

        Raises:
            UnnormError: the directory can't be written to.
        """
        if self.directory is None:
            return measure()
        path = self.directory / MEASUREMENTS / f"{_slug(key)}.json"
        known = _read(path, kind, key)
        if known is not None:
            return known
        measured = measure()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnnormError(f"Could not write to '{self.directory}': {error}.") from error
        values = TypeAdapter(kind).dump_python(measured, mode="json")
        write_text(path, json.dumps({"key": key, "measured": values, "sha256": digest(values)}))
        return measured

    def conclude(self, results: Results) -> None:
        """Write the results and the page."""
        if self.directory is None:
            return
        from unnorm.report.evaluation_page import render_evaluation

        write_text(self.directory / RESULTS, json_text(results.to_json()))
        write_text(self.directory / PAGE, render_evaluation(results))


def _read(path: Path, kind: type[T], key: dict[str, Any]) -> T | None:
    """The measurement in a file, or None if the file is missing, damaged or of another key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = found["key"] == key and found["sha256"] == digest(found["measured"])
        return TypeAdapter(kind).validate_python(found["measured"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def _slug(key: dict[str, Any]) -> str:
    """A readable file name that is unique to the key."""
    words = "--".join(re.sub(r"[^\w.-]+", "_", str(key[name])).strip("_.")[-40:] for name in ("model", "on"))
    return f"{words}--{digest(key)[:12]}"
