"""What a run's result says that can't be measured at its end any more."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What was measured and done before the first step and in training, kept beside a run until it is finished.

    Attributes:
        naive_loss: nats per token, with constants and no training; NaN where it overflows.
        naive_kl: likewise, KL to the original.
        massive_neurons: rows of neurons that were scaled down; see `unnorm.calibration.massive.Neuron`.
        skipped_steps: steps that the guard refused.
        earlier_seconds: time that finished runs took before this one went on from them.
        earlier_text_tokens: tokens of different text that they read.
    """

    naive_loss: float
    naive_kl: float
    massive_neurons: list[dict[str, Any]]
    skipped_steps: int = 0
    earlier_seconds: float = 0.0
    earlier_text_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
