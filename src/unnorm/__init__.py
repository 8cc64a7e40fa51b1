"""unnorm: turns a pretrained transformer language model into a twin without normalization layers."""

import importlib
from typing import TYPE_CHECKING, Any

from unnorm.auto_classes import register_on_demand
from unnorm.errors import RunInterruptedError, UnnormError

if TYPE_CHECKING:
    from unnorm.analysis.analyze import analyze
    from unnorm.calibration.scales import ScaleStatistics, stats
    from unnorm.evaluation import Evaluation, Results, evaluate
    from unnorm.exports.export import Exported, export
    from unnorm.exports.push import Pushed, push
    from unnorm.exports.transformer_lens import to_transformer_lens
    from unnorm.folding.checkpoint import load
    from unnorm.proof.verify import Check, verify
    from unnorm.removal.heal import heal
    from unnorm.removal.remove import remove
    from unnorm.runs.config import RemoveConfig
    from unnorm.sites.site import NormSite
    from unnorm.worst_case.audit import audit

__version__ = "0.1.0"
__all__ = [
    "Check",
    "Evaluation",
    "Exported",
    "NormSite",
    "Pushed",
    "RemoveConfig",
    "Results",
    "RunInterruptedError",
    "ScaleStatistics",
    "UnnormError",
    "__version__",
    "analyze",
    "audit",
    "evaluate",
    "export",
    "heal",
    "load",
    "push",
    "remove",
    "stats",
    "to_transformer_lens",
    "verify",
]

_HOMES = {
    "Check": "unnorm.proof.verify",
    "Evaluation": "unnorm.evaluation",
    "Exported": "unnorm.exports.export",
    "NormSite": "unnorm.sites.site",
    "Pushed": "unnorm.exports.push",
    "RemoveConfig": "unnorm.runs.config",
    "Results": "unnorm.evaluation",
    "ScaleStatistics": "unnorm.calibration.scales",
    "analyze": "unnorm.analysis.analyze",
    "audit": "unnorm.worst_case.audit",
    "evaluate": "unnorm.evaluation",
    "export": "unnorm.exports.export",
    "heal": "unnorm.removal.heal",
    "load": "unnorm.folding.checkpoint",
    "push": "unnorm.exports.push",
    "remove": "unnorm.removal.remove",
    "stats": "unnorm.calibration.scales",
    "to_transformer_lens": "unnorm.exports.transformer_lens",
    "verify": "unnorm.proof.verify",
}

register_on_demand()


if not TYPE_CHECKING:  # A type checker would take any name for one of these.

    def __getattr__(name: str) -> Any:
        """Import each name on first use, so that `unnorm --help` does not wait for torch."""
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'unnorm' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return __all__
