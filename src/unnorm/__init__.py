"""unnorm: a pretrained transformer language model in, its twin without normalization layers out."""

import importlib
from typing import TYPE_CHECKING, Any

from unnorm.errors import RunInterruptedError, UnnormError

if TYPE_CHECKING:
    from unnorm.analysis.analyze import analyze
    from unnorm.calibrate import ScaleStatistics, stats
    from unnorm.checkpoint import load
    from unnorm.config import RemoveConfig
    from unnorm.evaluation import Evaluation, Results, evaluate
    from unnorm.exports.export import Exported, export
    from unnorm.exports.push import Pushed, push
    from unnorm.exports.transformer_lens import to_transformer_lens
    from unnorm.proof import Check, verify
    from unnorm.removal.heal import heal
    from unnorm.removal.remove import remove
    from unnorm.sites import NormSite
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
    "Check": "unnorm.proof",
    "Evaluation": "unnorm.evaluation",
    "Exported": "unnorm.exports.export",
    "NormSite": "unnorm.sites",
    "Pushed": "unnorm.exports.push",
    "RemoveConfig": "unnorm.config",
    "Results": "unnorm.evaluation",
    "ScaleStatistics": "unnorm.calibrate",
    "analyze": "unnorm.analysis.analyze",
    "audit": "unnorm.worst_case.audit",
    "evaluate": "unnorm.evaluation",
    "export": "unnorm.exports.export",
    "heal": "unnorm.removal.heal",
    "load": "unnorm.checkpoint",
    "push": "unnorm.exports.push",
    "remove": "unnorm.removal.remove",
    "stats": "unnorm.calibrate",
    "to_transformer_lens": "unnorm.exports.transformer_lens",
    "verify": "unnorm.proof",
}


def __getattr__(name: str) -> Any:
    """Import each name when it is first used, so that `unnorm --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'unnorm' has no attribute '{name}'")
