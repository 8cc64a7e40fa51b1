"""Proof, from a run directory alone, that the model in it is norm-free and is the one that was trained."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.errors import first_few
from unnorm.folding.checkpoint import load, load_sites, load_unfolded
from unnorm.folding.fold import FoldedWeights, empty_twin
from unnorm.hooks import recorded, replaced_inputs
from unnorm.isolation import isolated
from unnorm.modeling import modeling_unnorm
from unnorm.modeling.modeling_unnorm import AffineMap
from unnorm.models.linear import is_linear, linear_weight
from unnorm.models.load import texts_begin_with
from unnorm.models.probe import trace_inputs
from unnorm.paths import named_path
from unnorm.proof.blockwise import float64_logits, in_float64
from unnorm.run_directory import MODEL
from unnorm.sites.find import norm_modules, norm_modules_and_idle, unembedding_name
from unnorm.sites.norm_behaviour import centered, norm_operations
from unnorm.sites.reading import read_weight
from unnorm.sites.residual import split_output, writer_of
from unnorm.sites.site import NormSite
from unnorm.sites.tracing import stream_sources

FLOAT64_LIMIT = 1e-10
FLOAT32_LIMIT = 1e-4
WEIGHT_LIMIT = 1e-6
"""For weights in float32, whose rounding alone is 6e-8 relative to each."""
_PARTS_AT_ONCE = 64

_PROBE_SHAPE = (2, 16)
_OVERFLOWS = "logits are not finite: without its norms the model overflows, and there is nothing to compare"


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


@isolated
def verify(directory: str | Path) -> list[Check]:
    """Prove that a run's twin is norm-free, exactly folded, linearly read, a plain sum, with unnorm's modeling file.

    Args:
        directory: a finished run.

    Returns:
        One row for each check: two on norms that remain (one, if some were kept with `--keep`), then the fold in
        float64, every weight of the checkpoint, its logits, the reads, the sum of contributions, and the modeling file
        that comes with the checkpoint. A failed check is a row whose `passed` is False, not an error.

    Raises:
        UnnormError: the directory holds no finished run, or files of it are missing or damaged.
    """
    directory = named_path(directory)
    sites, _ = load_sites(directory)
    twin = load(directory)
    unfolded = load_unfolded(directory)
    return [
        *check_twin(twin, unfolded, sites, texts_begin_with(directory / MODEL)),
        check_modeling_file(directory / MODEL, twin),
    ]


def check_twin(
    twin: PreTrainedModel, unfolded: PreTrainedModel, sites: Sequence[NormSite], begin: int | None = None
) -> list[Check]:
    """The rows of `verify` for models in memory: the twin, and the model with stand-ins that it was folded from.

    Logits are compared on random tokens, after `begin` if the model's texts begin with that token.
    """
    ids = trace_inputs(twin, *_PROBE_SHAPE, begin)
    norm_free = [_no_norm_modules(twin), _no_norm_operations(twin, ids)]
    return [
        *([_only_kept_norms(twin, ids)] if _kept(twin) else norm_free),
        _fold_float64(unfolded, sites, ids),
        _weights(twin, unfolded, sites),
        _fold_float32(twin, unfolded, ids),
        _reads_affine(twin, sites, ids),
        _contributions_add_up(twin, ids),
    ]


def _kept(twin: PreTrainedModel) -> list[str]:
    """Norms kept with `--keep`; none for a stock model, which a checkpoint may have been swapped for."""
    return getattr(twin.config, "kept_norms", None) or []


def _row(name: str, value: float, limit: float, detail: str) -> Check:
    return Check(name, value <= limit, value, limit, detail)


def _no_norm_modules(twin: PreTrainedModel) -> Check:
    left, idle = norm_modules_and_idle(twin)
    besides = f"; norms in parts that text does not run: {first_few(idle)}" if idle else ""
    what = ", ".join(left) or "number of modules whose output ignores input scale"
    return _row("no module is a norm", len(left), 0, what + besides)


def _only_kept_norms(twin: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Check:
    left, kept = norm_modules(twin), _kept(twin)
    places = {place for _, place in norm_operations(twin, ids) if not _is_in(place, kept)}
    besides = f"; left too, since no module of its own is one: norms in {first_few(sorted(places))}" if places else ""
    return _row("norms left are those kept", len(set(left) ^ set(kept)), 0, f"kept: {', '.join(kept)}{besides}")


def _is_in(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@torch.no_grad()
def _no_norm_operations(twin: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Check:
    found = sorted({operation for operation, _ in norm_operations(twin, ids)})
    return _row(
        "no operation of a norm runs", len(found), 0, ", ".join(found) or "number of such operations in a forward pass"
    )


@torch.no_grad()
def _fold_float64(unfolded: PreTrainedModel, sites: Sequence[NormSite], ids: Int[Tensor, "batch position"]) -> Check:
    expected = float64_logits(unfolded, ids)
    weights = FoldedWeights(unfolded, sites, torch.float64)
    error = (float64_logits(empty_twin(unfolded, sites, weights), ids, weights) - expected).abs().max()
    detail = "largest difference of logits" if expected.isfinite().all() else _OVERFLOWS
    limit = FLOAT64_LIMIT * max(1.0, float(expected.abs().nan_to_num().max()))  # As in the proof at load.
    return _row("folded = unfolded, float64", _number(error), limit, detail)


@torch.no_grad()
def _weights(twin: PreTrainedModel, unfolded: PreTrainedModel, sites: Sequence[NormSite]) -> Check:
    """Every tensor of the checkpoint against a new fold in float64; the logits of a few tokens depend on only some."""
    name = "weights = those of the fold"
    stored, folded = twin.state_dict(), FoldedWeights(unfolded, sites, torch.float64)
    if odd := sorted(stored.keys() ^ set(folded)):
        return Check(name, False, math.inf, WEIGHT_LIMIT, f"on one side alone: {first_few(odd)}")
    # In the twin's order, in which weight and bias, which are folded together, are neighbours.
    errors = {key: _relative_error(value, folded[key]) for key, value in stored.items()}
    worst = max(errors, key=lambda key: errors[key])
    return _row(name, errors[worst], WEIGHT_LIMIT, f"relative; worst of {len(errors)}: {worst}")


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest finite entry; infinite entries are neurons without a limit."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double(), expected.double()
    largest = expected.abs().where(expected.isfinite(), 0).amax().clamp_min(torch.finfo(torch.float64).tiny)
    return _number(((found - expected).abs() / largest).where(found != expected, 0).amax())


@torch.no_grad()
def _fold_float32(twin: PreTrainedModel, unfolded: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Check:
    expected = unfolded(input_ids=ids).logits
    error = (twin(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
    detail = "relative to the largest logit" if expected.isfinite().all() else _OVERFLOWS
    return _row("checkpoint = unfolded, float32", _number(error), FLOAT32_LIMIT, detail)


@torch.no_grad()
def _reads_affine(twin: PreTrainedModel, sites: Sequence[NormSite], ids: Int[Tensor, "batch position"]) -> Check:
    """f(ax + by) = a f(x) + b f(y) + (1 - a - b) f(0) for the readers of every site, at random residuals.

    For a map that stayed in place, f is that map; sites folded into their writer have no reader left to check.
    """
    sites = [site for site in sites if site.folds_into != "writer"]
    generator = torch.Generator().manual_seed(0)
    with recorded(twin, [site.name for site in sites]) as record:
        twin(input_ids=ids, use_cache=False)
    shape = {name: x.shape for name, (x, _) in record.items()}

    def residuals() -> dict[str, Tensor]:
        # Token lengths differ by orders of magnitude, so that no norm could pass.
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        return {name: draw(*size) * torch.exp(2 * draw(*size[:-1], 1)) for name, size in shape.items()}

    x, y, a, b = residuals(), residuals(), 0.7, -1.9
    with in_float64(twin):
        f_x, f_y, f_0, f_mixed = (
            _read(twin, sites, ids, at) for at in (x, y, {n: 0 * x[n] for n in x}, {n: a * x[n] + b * y[n] for n in x})
        )
    errors = {
        reader: _number((f_mixed[reader] - (a * f_x[reader] + b * f_y[reader] + (1 - a - b) * f_0[reader])).abs().max())
        / max(float(f_mixed[reader].abs().max()), torch.finfo(torch.float64).tiny)  # All zeros is affine too.
        for reader in f_mixed
    }
    if not errors:
        return _row("every read is affine", 0.0, FLOAT64_LIMIT, "all norms went into what wrote their input")
    worst = max(errors, key=lambda reader: errors[reader])
    return _row("every read is affine", errors[worst], FLOAT64_LIMIT, f"relative; worst of {len(errors)}: {worst}")


def _read(
    twin: PreTrainedModel, sites: Sequence[NormSite], ids: Tensor, residuals: dict[str, Tensor]
) -> dict[str, Float[Tensor, "batch position out"]]:
    """What the readers of every site compute from the given residuals."""

    def put(name: str) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            # A norm called twice, for queries and for keys, may get two shapes; then only the last call is checked.
            at = residuals[name].to(x.device)
            return at if at.shape == x.shape else torch.zeros_like(x)

        return edit

    keep = [name for site in sites for name in _looked_at(twin, site)]
    edits = {site.name: put(site.name) for site in sites}
    with replaced_inputs(twin, edits), recorded(twin, keep, copies=True) as record:
        twin(input_ids=ids, use_cache=False)
    return {name: _first(output) for name, (_, output) in record.items()}


def _looked_at(twin: PreTrainedModel, site: NormSite) -> Iterator[str]:
    """A site's readers; the site itself for experts, which read only some tokens each and are not linear in them."""
    if site.folds_into != "readers":
        yield site.name
        return
    for name in site.readers:
        read = read_weight(twin.get_submodule(name))
        is_matrix = read is not None and twin.get_submodule(name).get_parameter(read.weight).ndim == 2
        yield name if is_matrix else site.name


@torch.no_grad()
def _contributions_add_up(twin: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> Check:
    """Embeddings, heads, MLPs and biases, each passed through the unembedding on its own, sum to the logits.

    There may be linear maps before the unembedding: those that stayed in place of a post-norm model's norms, or OPT's
    `project_out`. If the final norm was kept, the contributions sum to what that norm reads.
    """
    last = unembedding_name(twin)
    sources, reader = _linear_sources(twin, last)
    name = "contributions add up to " + ("the logits" if reader == last else f"what {reader} reads")
    not_a_sum = Check(name, False, float("inf"), FLOAT64_LIMIT, f"what '{reader}' reads is not a plain sum")
    if not _is_sum(sources, reader):
        return not_a_sum
    written = {name for found in sources.values() for name in found}
    with in_float64(twin), recorded(twin, [*written, reader], copies=True) as record:
        twin(input_ids=ids, use_cache=False)
    read, output = record[reader]
    expected = output if reader == last else _with_batch(read, *ids.shape)
    if expected.shape[:-1] != ids.shape:
        return not_a_sum  # ProphetNet unembeds several streams at once.
    parts = _contributions(twin, sources, reader, record, ids)
    # Large models have a thousand parts, and each goes through the whole unembedding: first and last positions only.
    ends, batch = [0, ids.shape[1] - 1], ids.shape[0]
    rows = [(part if part.ndim < 3 else part[:, ends]).expand(batch, len(ends), -1) for part in parts]
    together = (torch.stack(rows[at : at + _PARTS_AT_ONCE]) for at in range(0, len(rows), _PARTS_AT_ONCE))
    unembedding = twin.get_submodule(last)
    total: Any = sum((_linear(unembedding, some) if reader == last else some).sum(0) for some in together)
    bias = unembedding.bias if reader == last else None
    total = total if bias is None else total + bias
    expected = expected[:, ends]
    if total.shape != expected.shape:
        return not_a_sum
    error = _number((total - expected).abs().max() / expected.abs().max())
    bias_too = "" if bias is None else " and the unembedding's bias"
    return _row(name, error, FLOAT64_LIMIT, f"relative; {len(parts)} contributions{bias_too}")


def _linear_sources(twin: PreTrainedModel, last: str) -> tuple[dict[str, dict[str, float]], str]:
    """`stream_sources` of the unembedding and of every linear map, and the last reader of the residual stream.

    The last reader is the unembedding, or the final norm if it was kept.
    """
    maps = [name for name, module in twin.named_modules() if is_linear(module) or isinstance(module, AffineMap)]
    sources = stream_sources(twin, [last, *maps, *_kept(twin)])
    kept = {name: sources.pop(name) for name in _kept(twin) if name in sources}
    for name in sources.get(last, ()):
        if name in kept and len(sources[last]) == 1:
            return sources | {name: kept[name]}, name
    return sources, last


def _is_sum(sources: dict[str, dict[str, float]], reader: str) -> bool:
    """Whether what a module reads is a sum, possibly one that linear maps were applied to."""
    found = sources.get(reader, {})
    return len(found) > 1 or any(_is_sum(sources, name) for name in found)


def _contributions(
    twin: PreTrainedModel,
    sources: dict[str, dict[str, float]],
    reader: str,
    record: dict[str, tuple[Tensor, Any]],
    ids: Int[Tensor, "batch position"],
) -> list[Float[Tensor, "..."]]:
    """The terms that add up to what `reader` reads; a linear map of a sum is split into its terms' maps and a bias."""
    parts: list[Tensor] = []
    for name, factor in sources[reader].items():
        if _is_sum(sources, name):
            module = twin.get_submodule(name)
            mapped = [_linear(module, part) for part in _contributions(twin, sources, name, record, ids)]
            parts += [factor * part for part in (*mapped, *([] if module.bias is None else [module.bias.double()]))]
        else:
            z, output = record[name]
            written = split_output(twin, writer_of(twin, name, factor), z, _first(output))
            parts += [_with_batch(part, *ids.shape) for part in written]
    return parts


def _linear(module: nn.Module, x: Float[Tensor, "*token in"]) -> Float[Tensor, "*token out"]:
    """A linear layer or an affine map, applied without its bias."""
    if isinstance(module, AffineMap):
        return centered(x, module.centered) * module.weight.double()
    return x @ linear_weight(module).double().T


def check_modeling_file(checkpoint: Path, twin: PreTrainedModel) -> Check:
    """Check the checkpoint's own modeling file: `trust_remote_code=True` runs that one, not this package's."""
    name, own = "its modeling file is unnorm's", Path(modeling_unnorm.__file__)
    module = own.stem
    expected = {
        "AutoConfig": f"{module}.{type(twin.config).__name__}",
        "AutoModelForCausalLM": f"{module}.{type(twin).__name__}",
    }
    wrong = []
    if not (checkpoint / own.name).is_file():
        wrong.append(f"there is no {own.name}")
    elif (checkpoint / own.name).read_text(encoding="utf-8", errors="replace") != own.read_text(encoding="utf-8"):
        wrong.append(f"{own.name} is not this version's; `unnorm.load(DIR).save_pretrained(DIR/model)` writes that")
    if getattr(twin.config, "auto_map", None) != expected:
        wrong.append("config.json names other classes to load")
    wrong += _tokenizers_code_elsewhere(checkpoint)
    others = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*.py"))
    besides = first_few([other for other in others if other != own.name])
    ran = f"number of differences from the code that trust_remote_code=True runs{besides and f', besides {besides}'}"
    return _row(name, len(wrong), 0, "; ".join(wrong) or ran)


def _tokenizers_code_elsewhere(checkpoint: Path) -> list[str]:
    """What the tokenizer's settings name as its code, if that is not beside them."""
    path = checkpoint / "tokenizer_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
        classes = [name for of in named.values() for name in (of if isinstance(of, list) else [of]) if name]
    except (OSError, ValueError, AttributeError):
        return []
    gone = [name for name in classes if "--" in name or not (checkpoint / f"{name.partition('.')[0]}.py").is_file()]
    return [f"tokenizer_config.json names code that is not beside it: {first_few(gone)}"] if gone else []


def _with_batch(part: Float[Tensor, "..."], batch: int, length: int) -> Float[Tensor, "..."]:
    """Restore a batch dimension: OPT's MLP merges batch and position, Blenderbot's position embedding has no batch."""
    if part.ndim == 2 and len(part) == batch * length:
        return part.view(batch, length, -1)
    return part[None] if part.ndim == 2 and len(part) == length else part


def _first(output: Any) -> Tensor:
    """A module's first output; a router returns several, its logits first."""
    return output if isinstance(output, Tensor) else output[0]


def _number(value: Tensor) -> float:
    """A float in which NaN counts as infinitely wrong."""
    return float(torch.nan_to_num(value.double(), nan=float("inf")))
