"""Facts in a run's result that can no longer be measured at its end."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unnorm.errors import UnnormError, short
from unnorm.run_directory import RESULT, finished_result


@dataclass(frozen=True)
class Facts:
    """What was measured and done before and during training, kept in the run directory until the run is finished.

    Attributes:
        naive_loss: loss after naive removal, in nats per token; NaN where it overflows.
        naive_kl: KL(original ‖ naive removal), in nats per token; NaN where it overflows.
        massive_neurons: neurons that were scaled down, one row each; see `unnorm.calibration.massive.Neuron`.
        skipped_steps: steps that the guard refused.
        earlier_seconds: total time of the finished runs that this run continues from.
        earlier_text_tokens: tokens of distinct text that those runs read.
        earlier_data: the sources of that text, in order, where they are not this run's; naive removal was measured on
            the first of them.
    """

    naive_loss: float
    naive_kl: float
    massive_neurons: list[dict[str, Any]]
    skipped_steps: int = 0
    earlier_seconds: float = 0.0
    earlier_text_tokens: int = 0
    earlier_data: list[str] = field(default_factory=list)

    @property
    def runs_away(self) -> bool:
        """Whether tokens can run away without norms, so that training has to hold them down.

        So it is where massive activations were scaled down, and where naive removal overflows.
        """
        return bool(self.massive_neurons) or not math.isfinite(self.naive_loss)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def read_facts(path: Path) -> Facts:
    """Facts as saved by a run.

    Raises:
        UnnormError: the file is damaged.
    """
    return facts_from(read_note(path), path)


def facts_from(values: Any, path: Path) -> Facts:
    """Facts from the contents of a file.

    Raises:
        UnnormError: they are not those of facts.
    """
    try:
        return Facts(**values)
    except TypeError as error:
        raise UnnormError(f"'{path}' is damaged ({short(error)}). Do the run again.") from error


def read_note(path: Path) -> Any:
    """The contents of a JSON file that a run left for its continuation.

    Raises:
        UnnormError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnnormError(f"'{path}' is damaged ({short(error)}). Do the run again.") from error


def facts_of(directory: Path) -> Facts:
    """Facts of a finished run, with its total time as `earlier_seconds` for the run that continues from it.

    Raises:
        UnnormError: the result file is missing or damaged.
    """
    result = finished_result(directory)
    try:
        naive = {key: math.nan if result[key] is None else float(result[key]) for key in ("naive_loss", "naive_kl")}
        return Facts(
            **naive,
            massive_neurons=list(result["massive_neurons"]),
            skipped_steps=int(result["skipped_steps"]),
            earlier_seconds=float(result["seconds"]),
            earlier_text_tokens=int(result.get("earlier_text_tokens") or 0),
            earlier_data=list(result.get("earlier_data") or ()),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise UnnormError(f"'{directory / RESULT}' is damaged. Do the run again.") from error
