"""Proof, from a run directory alone, that the model in it is norm-free and is the one that was trained."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from unnorm.checkpoint import load, load_sites, load_unfolded
from unnorm.fold import fold
from unnorm.norms import linear_weight
from unnorm.residual import recorded, replaced_inputs, residual_writers, split_output
from unnorm.sites import NormSite, norm_modules, trace_inputs, unembedding_name

FLOAT64_LIMIT = 1e-10
FLOAT32_LIMIT = 1e-4

# What ATen calls the operations that norms are made of, and nothing else in these models is.
_NORM_OPERATIONS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "rsqrt", "var", "std", "var_mean", "norm"}
_PROBE_SHAPE = (2, 16)


@dataclass(frozen=True)
class Check:
    """One row of the proof.

    Attributes:
        name: what is claimed.
        passed: whether it holds.
        value: what was measured.
        limit: the largest value that passes.
        detail: what `value` is, or what is wrong.
    """

    name: str
    passed: bool
    value: float
    limit: float
    detail: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def verify(directory: str | Path) -> list[Check]:
    """Prove a run directory: norm-free, folded exactly, read linearly, and a plain sum.

    Raises:
        UnnormError: it holds no finished run, or files of it are missing or damaged.
    """
    directory = Path(directory)
    sites, _ = load_sites(directory)
    twin = load(directory)
    unfolded = load_unfolded(directory)
    return check_twin(twin, unfolded, sites)


def check_twin(twin: PreTrainedModel, unfolded: PreTrainedModel, sites: Sequence[NormSite]) -> list[Check]:
    """The rows of `verify` for models in memory: the LN-free one, and the one with stand-ins that it came from."""
    twin64, unfolded64 = (_in_float64(model) for model in (twin, unfolded))
    ids = trace_inputs(twin, *_PROBE_SHAPE)
    norm_free = [_no_norm_modules(twin), _no_norm_operations(twin, ids)]
    return [
        *([_only_kept_norms(twin)] if twin.config.kept_norms else norm_free),
        _fold_float64(unfolded64, sites, ids),
        _fold_float32(twin, unfolded, ids),
        _reads_affine(twin64, sites, ids),
        _contributions_add_up(twin64, ids),
    ]


def _in_float64(model: PreTrainedModel) -> PreTrainedModel:
    copy = deepcopy(model).double()
    copy.config._experts_implementation = "eager"  # The fused experts know no float64.
    return copy


def _row(name: str, value: float, limit: float, detail: str) -> Check:
    return Check(name, value <= limit, value, limit, detail)


def _no_norm_modules(twin: PreTrainedModel) -> Check:
    left = norm_modules(twin)
    return _row("no module is a norm", len(left), 0, ", ".join(left) or "modules whose output ignores input scale")


def _only_kept_norms(twin: PreTrainedModel) -> Check:
    left, kept = norm_modules(twin), twin.config.kept_norms
    return _row("norms left are those kept", len(set(left) ^ set(kept)), 0, f"kept: {', '.join(kept)}")


class _Operations(TorchDispatchMode):
    """Records the names of the ATen operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _no_norm_operations(twin: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Check:
    with _Operations() as operations:
        twin(input_ids=ids, use_cache=False)
    found = sorted(
        name
        for name in operations.names
        if name.removeprefix("native_").removeprefix("_fused_").removeprefix("linalg_vector_") in _NORM_OPERATIONS
    )
    return _row("no operation of a norm runs", len(found), 0, ", ".join(found) or "operations of a forward pass")


@torch.no_grad()
def _fold_float64(unfolded: PreTrainedModel, sites: Sequence[NormSite], ids: Int[Tensor, "batch position"]) -> Check:
    folded = fold(unfolded, sites)
    error = (folded(input_ids=ids).logits - unfolded(input_ids=ids).logits).abs().max()
    return _row("folded = unfolded, float64", float(error), FLOAT64_LIMIT, "largest difference of logits")


@torch.no_grad()
def _fold_float32(twin: PreTrainedModel, unfolded: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Check:
    expected = unfolded(input_ids=ids).logits
    error = (twin(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
    return _row("checkpoint = unfolded, float32", _number(error), FLOAT32_LIMIT, "relative to the largest logit")


@torch.no_grad()
def _reads_affine(twin: PreTrainedModel, sites: Sequence[NormSite], ids: Int[Tensor, "batch position"]) -> Check:
    """f(ax + by) = a f(x) + b f(y) + (1 - a - b) f(0) for the readers of every site, at random residuals.

    Where a map stayed in place, f is that map; where it went into the writer there is nothing left to read.
    """
    sites = [site for site in sites if site.folds_into != "writer"]
    generator = torch.Generator().manual_seed(0)
    shape = {site.name: (*ids.shape, site.width) for site in sites}

    def residuals() -> dict[str, Tensor]:
        # Lengths from token to token differ by orders of magnitude, so that no norm could pass.
        lengths = torch.exp(2 * torch.randn(*ids.shape, 1, generator=generator, dtype=torch.float64))
        return {n: torch.randn(s, generator=generator, dtype=torch.float64) * lengths for n, s in shape.items()}

    x, y, a, b = residuals(), residuals(), 0.7, -1.9
    f_x, f_y, f_0, f_mixed = (
        _read(twin, sites, ids, at) for at in (x, y, {n: 0 * x[n] for n in x}, {n: a * x[n] + b * y[n] for n in x})
    )
    errors = {
        reader: _number((f_mixed[reader] - (a * f_x[reader] + b * f_y[reader] + (1 - a - b) * f_0[reader])).abs().max())
        / float(f_mixed[reader].abs().max())
        for reader in f_mixed
    }
    worst = max(errors, key=lambda reader: errors[reader])
    return _row("every read is affine", errors[worst], FLOAT64_LIMIT, f"relative; worst of {len(errors)}: {worst}")


def _read(
    twin: PreTrainedModel, sites: Sequence[NormSite], ids: Tensor, residuals: dict[str, Tensor]
) -> dict[str, Float[Tensor, "batch position out"]]:
    """What the readers of every site compute from the given residuals."""

    def put(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: residuals[name].to(x.device).view(x.shape)

    keep = [name for site in sites for name in (site.readers if site.folds_into == "readers" else (site.name,))]
    with replaced_inputs(twin, {site.name: put(site.name) for site in sites}), recorded(twin, keep) as record:
        twin(input_ids=ids, use_cache=False)
    return {name: output for name, (_, output) in record.items()}


@torch.no_grad()
def _contributions_add_up(twin: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Check:
    """Embeddings, heads, MLPs and biases, each through the unembedding alone, sum to what the unembedding gives."""
    name = "contributions add up to the logits"
    last = unembedding_name(twin)
    writers = residual_writers(twin, last)
    if writers is None:
        return Check(name, False, float("inf"), FLOAT64_LIMIT, "what the unembedding reads is not a plain sum")
    with recorded(twin, [*(writer.name for writer in writers), last]) as record:
        twin(input_ids=ids, use_cache=False)
    logits, unembedding = record[last][1], twin.get_submodule(last)
    parts = [part for writer in writers for part in split_output(twin, writer, *record[writer.name])]
    # OPT's MLP gives batch and position as one.
    parts = [part.view(*ids.shape, -1) if part.ndim == 2 else part for part in parts]
    total = sum(part @ linear_weight(unembedding).T for part in parts)
    total = total if unembedding.bias is None else total + unembedding.bias
    error = _number((total - logits).abs().max() / logits.abs().max())
    return _row(name, error, FLOAT64_LIMIT, f"relative; {len(parts)} contributions and the unembedding's bias")


def _number(value: Tensor) -> float:
    """A float in which NaN counts as infinitely wrong."""
    return float(torch.nan_to_num(value.double(), nan=float("inf")))
