"""What a norm site is."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["layernorm", "rmsnorm"]
Role = Literal["attention", "mlp", "attention+mlp", "final", "embedding"]
FoldsInto = Literal["readers", "writer", "in place"]


@dataclass(frozen=True)
class NormSite:
    """One norm module, with its writers and readers.

    Attributes:
        name: the module's path in the original model.
        kind: `layernorm` (removes the mean) or `rmsnorm`.
        eps: added to the variance or mean square, inside the square root.
        width: number of features it normalizes over.
        role: what its readers belong to; without readers, what the norm itself is part of.
        readers: paths of the linear layers that read its output.
        writers: paths of the modules whose outputs add up to its input.
        folds_into: which weights absorb its constant map: its readers', if nothing else reads its output (pre-norm);
            its only writer's, if nothing else reads that writer's output (query/key norms, norms after a sublayer or
            after the embedding); or none, and the map stays `in place` as a module.
    """

    name: str
    kind: Kind
    eps: float
    width: int
    role: Role
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    folds_into: FoldsInto = "readers"

    @property
    def centered(self) -> bool:
        """Whether the mean is removed before dividing."""
        return self.kind == "layernorm"

    @property
    def folded_into(self) -> tuple[str, ...]:
        """Paths of the modules whose weights absorb the constant map; none if it stays in place."""
        return {"readers": self.readers, "writer": self.writers, "in place": ()}[self.folds_into]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as written to `sites.json`."""
        return {**asdict(self), "readers": list(self.readers), "writers": list(self.writers)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "NormSite":
        """A site from its row in `sites.json`; other keys are ignored."""
        own = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        return cls(**{**own, "readers": tuple(own["readers"]), "writers": tuple(own["writers"])})
