"""Facts in a run's result that can no longer be measured at its end."""

from dataclasses import asdict, dataclass, field
from typing import Any


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

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
