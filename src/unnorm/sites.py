"""Norm sites: what they are, how they are found by running the model, and the proof that the finding is right."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.norms import is_conv1d, is_linear, linear_weight
from unnorm.reading import is_experts, read_weight

Kind = Literal["layernorm", "rmsnorm"]
Role = Literal["attention", "mlp", "attention+mlp", "final", "embedding"]
FoldsInto = Literal["readers", "writer", "in place"]

# Autograd nodes that hand a tensor on unchanged but for its shape or dtype.
_HANDS_ON: tuple[str, ...] = (
    "View",
    "UnsafeView",
    "Reshape",
    "Slice",
    "Select",
    "Index",
    "Transpose",
    "Permute",
    "Alias",
    "Squeeze",
)
_HANDS_ON += ("Unsqueeze", "Expand", "Clone", "ToCopy", "NativeDropout", "T")
_ADDS = ("Add", *_HANDS_ON)
# Those of them after which every row of the writer's weight still makes one feature of the norm's input.
_RESHAPES = tuple(name for name in _HANDS_ON if name not in ("Slice", "Select", "Index", "Expand", "NativeDropout"))

# What ATen calls the operations that norms are made of, and nothing else in these models is.
_NORM_OPERATIONS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "rsqrt", "var", "std", "var_mean", "norm"}

_FUSED_QKV_THIRDS = ("c_attn",)
_VALUE_PROJECTIONS = ("v_proj", "value")
_TRACE_TOKENS = 8
_UNKNOWN = "?"


@dataclass(frozen=True)
class NormSite:
    """One norm module, with what it reads and who reads it.

    Attributes:
        name: the module's path in the original model.
        kind: `layernorm` (removes the mean) or `rmsnorm`.
        eps: added to the variance or mean square, inside the root.
        width: features it normalizes over.
        role: what its readers belong to, or, without readers, what it is part of.
        readers: paths of the linear layers that read its output.
        writers: paths of the modules whose outputs add up to its input.
        folds_into: the weights that take its constant map up: its readers', where nothing else reads its output
            (pre-norm); its one writer's, where nothing else reads that (query/key norms, norms after a sublayer or
            after the embedding); or none, so that the map stays `in place` as a module.
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

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in `sites.json`."""
        return {**asdict(self), "readers": list(self.readers), "writers": list(self.writers)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "NormSite":
        """A site from its row in `sites.json`, other keys left aside."""
        own = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        return cls(**{**own, "readers": tuple(own["readers"]), "writers": tuple(own["writers"])})


@dataclass
class _Trace:
    """One forward pass: what went in and out of each leaf module, which autograd node made it, and who uses that.

    Attributes:
        inputs: of each leaf module.
        outputs: of each leaf module.
        made_by: the module that a node is the output of.
        used_by: the nodes that take a node's result.
        blocks: the innermost module with parts of its own that a node is the output of.
        gated: leaf modules that take more than one tensor.
        ends: the nodes of each leaf module's outputs, of those with several too.
        begins: the nodes of all tensors that went into each leaf module.
        hidden: leaf modules that were called where no gradient flows, with the width of what went in.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    made_by: dict[Node, str]
    used_by: dict[Node, list[Node]]
    blocks: dict[Node, str]
    gated: set[str]
    hidden: dict[str, int]
    ends: dict[str, list[Node]]
    begins: dict[str, set[Node]]


def find_sites(model: PreTrainedModel, in_place: bool = False, keep: str | None = None) -> list[NormSite]:
    """Every norm site of a decoder-only language model, in the order in which a forward pass meets them.

    Norms are known by behaviour: a leaf module whose output does not change when its input is scaled. One
    traced pass shows which linear layers read each norm's output and which modules wrote its input, and so which
    weights can take its constant map up.

    Args:
        model: the model, in any dtype.
        in_place: allow sites that fold into no weight; each keeps its constant map as a module.
        keep: regular expression; norms with a match in their path are left out and stay norms.

    Raises:
        UnnormError: there is no norm, or none that is not to be kept, or (unless `in_place`) one that folds into no
            weight (post-norm models).
    """
    trace = _trace(model)
    names = _norm_names(model, trace)
    if not names:
        raise _no_norms(model)
    for name in names:
        if name in trace.hidden:  # Not to be kept either: what is beside it may read other norms, untraced as well.
            raise UnnormError(
                f"The norm '{name}' ({type(model.get_submodule(name)).__name__}) is called where no gradient flows, so "
                "what is read there can't be traced. That would need modeling code without gradient functions of its "
                "own."
            )
    names = _without_kept(names, keep)
    for name in names:
        if name in trace.gated:
            raise _gated(model, name)
    sites = [_site(model, trace, name) for name in names]
    for site in sites:
        if site.folds_into == "in place" and not in_place:
            raise _not_foldable(model, site)
    return [_with_folded_writers(site, sites) for site in sites]


def _without_kept(names: Sequence[str], keep: str | None) -> list[str]:
    if keep is None:
        return list(names)
    try:
        left = [name for name in names if not re.search(keep, name)]
    except re.error as error:
        raise UnnormError(f"--keep '{keep}' is no regular expression: {error}.") from error
    if len(left) == len(names):
        raise UnnormError(f"--keep '{keep}' matches none of the norms: {', '.join(names)}.")
    if not left:
        raise UnnormError(f"--keep '{keep}' matches every norm, so there is nothing to remove.")
    return left


def norm_modules(model: PreTrainedModel) -> list[str]:
    """Paths of all leaf modules that normalize, by behaviour; none in an LN-free model."""
    return _norm_names(model, _trace(model))


class _Operations(TorchDispatchMode):
    """Records the ATen operations of norms that run, each with the innermost module that it runs in."""

    def __init__(self, modules: ModuleTracker) -> None:
        super().__init__()
        self.modules = modules
        self.found: dict[tuple[str, str], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kind = name.removeprefix("native_").removeprefix("_fused_").removeprefix("linalg_vector_")
        is_sum = kind == "norm" and args[1:2] == (1,)  # Of a router's probabilities, in DBRX.
        if kind in _NORM_OPERATIONS and not is_sum:
            self.found[name, max(self.modules.parents, key=len).partition(".")[2]] = None
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def norm_operations(model: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> list[tuple[str, str]]:
    """Operations that norms are made of and that a forward pass runs, each with every module that it runs in."""
    with ModuleTracker() as modules, _Operations(modules) as operations:
        model(input_ids=ids, use_cache=False)
    return list(operations.found)


def residual_sources(model: PreTrainedModel, reader: str) -> dict[str, float] | None:
    """Modules whose outputs, each times its factor, add up to what a module reads; None if it is no such sum.

    Factors other than 1 are what some families multiply embeddings and sublayers by.
    """
    return stream_sources(model, [reader]).get(reader)


def stream_sources(model: PreTrainedModel, readers: Sequence[str]) -> dict[str, dict[str, float]]:
    """`residual_sources` of several modules, from one pass; those that read no such sum are left out."""
    trace = _trace(model)
    sources = {name: _summands(trace, trace.inputs[name].grad_fn) for name in readers}
    return {name: factors for name, factors in sources.items() if factors is not None}


def unembedding_name(model: PreTrainedModel) -> str:
    """Path of the unembedding."""
    unembedding = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is unembedding)


def _summands(trace: _Trace, node: Node | None) -> dict[str, float] | None:
    if node is None:
        return None
    if node in trace.made_by:
        return {trace.made_by[node]: 1.0}
    factor = _factor(node)
    # A number that something is multiplied by has no node.
    parents = [parent for parent, _ in node.next_functions if parent is not None] if factor else []
    terms = [_summands(trace, parent) for parent in parents]
    if not terms or None in terms:
        return {trace.blocks[node]: 1.0} if node in trace.blocks else None
    total: dict[str, float] = {}
    for name, share in (item for term in terms if term for item in term.items()):
        total[name] = total.get(name, 0.0) + factor * share
    return total


def _factor(node: Node | None) -> float:
    """What a node that adds, hands on, or multiplies by a number does to its input; 0 for any other node."""
    if node is None:
        return 0.0
    if _operation(node) in _ADDS:
        return 1.0
    other = getattr(node, "_saved_other", None)
    if _operation(node) not in ("Mul", "Div") or other is None or other.numel() != 1 or other.requires_grad:
        return 0.0
    return float(other) if _operation(node) == "Mul" else 1 / float(other)


def affine_parameters(module: nn.Module, site: NormSite) -> tuple[Tensor, Tensor | None]:
    """Gain and bias that a norm applies, as the model holds them (so that training goes on from them).

    The gain is `weight`, `1 + weight` or all ones, whichever explains what the module computes.

    Raises:
        UnnormError: none of them does.
    """
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    x = _probe(module, site.width)
    ones = torch.ones(site.width, dtype=x.dtype, device=x.device)
    candidates = [ones] if weight is None else [weight, 1 + weight]
    with torch.no_grad():
        y = module(x)
        for gain in candidates:
            if gain.shape == y.shape[-1:] and torch.allclose(
                y, _norm(x, site) * gain + (0 if bias is None else bias), rtol=1e-3, atol=1e-3
            ):
                return gain, bias
    raise UnnormError(
        f"The norm '{site.name}' ({type(module).__name__}) is not gain * x / scale(x) + bias with a gain of "
        f"weight or 1 + weight. It can't be removed. {_stays_with_keep(site.name)}"
    )


def gain_offset(module: nn.Module, site: NormSite) -> int:
    """What the norm adds to its stored weight to have its gain: 1 for Gemma's kind, else 0.

    Raises:
        UnnormError: neither explains what the module computes.
    """
    weight = getattr(module, "weight", None)
    return 0 if weight is None or affine_parameters(module, site)[0] is weight else 1


def value_features(model: nn.Module, site: NormSite) -> dict[str, int] | None:
    """For each reader of an attention site, how many of its last outputs are values; None if that isn't known.

    None also where something besides the readers takes the norm's output, which then must be one path. Tracing can't
    tell a fused projection's parts, so their layout is declared here.
    """
    if site.folds_into != "readers" or site.role != "attention":
        return None
    features: dict[str, int] = {}
    for reader in site.readers:
        leaf, module = reader.rpartition(".")[2], model.get_submodule(reader)
        out = linear_weight(module).shape[0]
        if leaf in _FUSED_QKV_THIRDS and is_conv1d(module):  # GPT-BigCode's of that name have other parts.
            features[reader] = out // 3
        elif leaf.startswith(("q_", "k_")) or leaf in ("query", "key"):
            features[reader] = 0
        elif leaf in _VALUE_PROJECTIONS:
            features[reader] = out
        else:
            return None
    return features


def _norm_names(model: PreTrainedModel, trace: _Trace) -> list[str]:
    widths = trace.hidden | {name: x.shape[-1] for name, x in trace.inputs.items()}
    return [name for name, width in widths.items() if is_norm(model.get_submodule(name), width, name in trace.gated)]


def _norm(x: Float[Tensor, "*batch width"], site: NormSite) -> Float[Tensor, "*batch width"]:
    if site.centered:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + site.eps)


def _like(module: nn.Module) -> Tensor:
    """What has the dtype and the device that a module computes in."""
    return next(iter(module.parameters()), torch.ones(()))


def _probe(module: nn.Module, width: int) -> Float[Tensor, "2 3 *heads width"]:
    """Tokens of variance near 1 at any width, so that eps hardly counts; cut into heads, where each has a gain."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.linspace(-1.7, 1.7, width)[torch.randperm(width, generator=generator)] for _ in range(6)]
    x = torch.stack(rows).view(2, 3, width).to(_like(module))
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == width:  # Cohere's, of queries and keys.
        x = x.unsqueeze(-2).expand(2, 3, *weight.shape)
    return x


@torch.no_grad()
def is_norm(module: nn.Module, width: int, gated: bool = False) -> bool:
    """Whether a module normalizes: same shape out as in, the same for 8 times the input, but not for another one.

    One that is `gated` is called with a second tensor, all ones.
    """
    if not _like(module).is_floating_point() or is_linear(module):  # One whose inputs have limits may be all at them.
        return False
    x = _probe(module, width)
    gate = [torch.ones_like(x)] if gated else []
    try:
        y, scaled, other = module(x, *gate), module(8 * x, *gate), module(x.flip(-1), *gate)
    except Exception:  # A module that can't take such an input is no norm.
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        return False
    alike = torch.allclose(y, scaled, rtol=1e-3, atol=1e-2 * float(y.abs().max()))
    differs = not torch.allclose(other, y, rtol=1e-2)
    return alike and differs


@torch.no_grad()
def _kind(module: nn.Module, width: int) -> Kind:
    x = _probe(module, width)
    y = module(x)
    # As long as its outputs differ, whatever its gain and bias are.
    length = float((y - module(-x)).abs().max())
    return "layernorm" if torch.allclose(y, module(x + 1), rtol=0, atol=1e-2 * length) else "rmsnorm"


@torch.no_grad()
def _eps(module: nn.Module, width: int) -> float:
    """The module's own eps; where it has none by a known name, what its outputs for short vectors say."""
    for name in ("eps", "variance_epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    x = _probe(module, width)
    x = x - x.mean(-1, keepdim=True)
    at_zero = module(torch.zeros_like(x))
    long, short = (((module(length * x) - at_zero).norm() / x.norm()).item() for length in (1e3, 1e-3))
    mean_square = 1e-6 * x.square().mean().item()
    eps = max(0.0, mean_square * ((long / short) ** 2 - 1)) if short > 0 else 0.0
    return float(f"{eps:.2g}")


def _site(model: PreTrainedModel, trace: _Trace, name: str) -> NormSite:
    module = model.get_submodule(name)
    width = trace.inputs[name].shape[-1]
    readers = tuple(other for other in trace.inputs if _reads(model, trace, other, name))
    writers = tuple(w for w in _sources(trace, trace.inputs[name].grad_fn, _ADDS) if w != _UNKNOWN)
    role = _role(model, name, readers, writers)
    site = NormSite(name, _kind(module, width), _eps(module, width), width, role, readers, writers)
    return replace(site, folds_into=_folds_into(model, trace, site))


def _folds_into(model: PreTrainedModel, trace: _Trace, site: NormSite) -> FoldsInto:
    if site.readers and _goes_only_to(trace, site.name, site.readers):
        return "readers"
    sources = _sources(trace, trace.inputs[site.name].grad_fn, _RESHAPES)
    if len(sources) == 1 and sources[0] != _UNKNOWN and _goes_only_to(trace, sources[0], (site.name,)):
        writer = model.get_submodule(sources[0])
        if _is_matrix(writer) and _features(writer) % site.width == 0:
            return "writer"
    return "in place"


def _features(writer: nn.Module) -> int:
    return int(writer.weight.shape[1] if isinstance(writer, nn.Embedding) else linear_weight(writer).shape[0])


def _goes_only_to(trace: _Trace, name: str, users: Sequence[str]) -> bool:
    """Whether a module's output goes into the given modules and nowhere else (as far as gradients flow)."""
    inside = {node for user in users for node in _inside(trace, user)}
    made = trace.outputs[name].grad_fn
    waiting = list(trace.used_by.get(made, ())) if made is not None else []
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        if _operation(node) not in _HANDS_ON:
            return False
        waiting.extend(trace.used_by[node])
    return True


def _inside(trace: _Trace, name: str) -> set[Node]:
    """The nodes that a module's own computation made."""
    waiting: list[Node | None] = [*trace.ends[name]]
    inside: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in trace.begins[name] or node in inside:
            continue
        inside.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return inside


def _operation(node: Node) -> str:
    return node.name().removesuffix("0").removesuffix("Backward")


def _with_folded_writers(site: NormSite, sites: Sequence[NormSite]) -> NormSite:
    """With the writer named in place of each norm that folds into it."""
    folded = {other.name: other.writers[0] for other in sites if other.folds_into == "writer"}
    return replace(site, writers=tuple(folded.get(writer, writer) for writer in site.writers))


def _not_foldable(model: PreTrainedModel, site: NormSite) -> UnnormError:
    return UnnormError(
        f"The output of the norm '{site.name}' ({type(model).__name__}) does not go to linear layers alone (but into "
        "the residual stream, as in a post-norm model, or into an activation, or into a router that computes in "
        "another precision or has no bias to take up the norm's), and its input is not one linear layer's output. So "
        "its constant map can't be folded into a weight. With --in-place it stays where the norm was, as a fixed "
        "affine map."
    )


def _gated(model: PreTrainedModel, name: str) -> UnnormError:
    return UnnormError(
        f"The norm '{name}' ({type(model.get_submodule(name)).__name__}) takes a second tensor besides what it "
        "normalizes: a gate, as in state-space and linear-attention layers. What it gives is no function of its input "
        "alone, so no constant map can stand for it; that would take a gated map, folded on both sides of the gate. "
        f"{_stays_with_keep(name)}"
    )


def _stays_with_keep(name: str) -> str:
    return f"With --keep '{re.sub('[0-9]+', '[0-9]+', re.escape(name))}$' such norms stay, and the others are removed."


def _no_norms(model: PreTrainedModel) -> UnnormError:
    """What a model has instead of norms."""
    said = f"{type(model).__name__} has no normalization layers"
    if getattr(model.config, "removed_norms", None):
        count = len(model.config.removed_norms)
        return UnnormError(f"{said}: it is a twin whose {count} norms are gone already. There is nothing to remove.")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    for name, kind in kinds.items():
        if "BatchNorm" in kind:
            return UnnormError(
                f"{said} that depend on the token: '{name}' ({kind}) divides by statistics fixed in training, so it is "
                "an affine map already. Fold it with torch.nn.utils.fusion."
            )
        if "dyt" in kind.lower() or "dynamictanh" in kind.lower():
            return UnnormError(
                f"{said}: '{name}' ({kind}) squashes each feature by itself, whatever the scale of the token. To make "
                "it affine would take another taper, from its tanh to a line; that is not handled."
            )
    return UnnormError(
        f"{said}: no module's output is independent of its input's scale. There is nothing to remove. (Norms that are "
        "no modules of their own can't be removed.)"
    )


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _reads(model: PreTrainedModel, trace: _Trace, reader: str, norm: str) -> bool:
    if _sources(trace, trace.inputs[reader].grad_fn, _HANDS_ON) != [norm]:
        return False
    read = read_weight(model.get_submodule(reader))
    added = getattr(model.get_submodule(norm), "bias", None) is not None
    return read is not None and (read.takes_bias or not added)


def _sources(trace: _Trace, node: Node | None, through: tuple[str, ...]) -> list[str]:
    """Modules whose outputs a tensor is made of, walking back through the kinds of node named in `through`."""
    found: dict[str, None] = {}
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in trace.made_by:
            found[trace.made_by[node]] = None
        elif _operation(node) in through:
            waiting.extend(parent for parent, _ in node.next_functions)
        else:
            found[_UNKNOWN] = None
    order = list(trace.outputs)
    return sorted(found, key=lambda name: order.index(name) if name in order else -1)


def _role(model: PreTrainedModel, name: str, readers: Sequence[str], writers: Sequence[str]) -> Role:
    unembedding = model.get_output_embeddings()
    if any(model.get_submodule(reader) is unembedding for reader in readers):
        return "final"
    if not readers and all(isinstance(model.get_submodule(writer), nn.Embedding) for writer in writers):
        return "embedding"
    in_attention = [inside_attention(model, other) for other in (readers or (name, *writers))]
    if all(in_attention):
        return "attention"
    return "attention+mlp" if any(in_attention) and readers else "attention" if any(in_attention) else "mlp"


def inside_attention(model: PreTrainedModel, name: str) -> bool:
    """Whether a module is part of an attention layer, by its parents' classes."""
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    classes = [type(parent).__name__.lower() for parent in parents]
    # A layer is more than attention, also where it is called after that, as in Jamba.
    return any("attention" in kind and not kind.endswith("layer") for kind in classes)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the token embedding: ids are below it, and the tokenizer may have fewer."""
    return int(model.get_input_embeddings().weight.shape[0])


def trace_inputs(model: PreTrainedModel, batch: int = 1, length: int = _TRACE_TOKENS) -> Int[Tensor, "batch length"]:
    """Token ids that any causal model takes: seeded, random, within the vocabulary."""
    vocab = vocabulary_size(model)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (batch, length), generator=generator).to(model.device)


def _trace(model: PreTrainedModel) -> _Trace:
    trace = _Trace({}, {}, {}, {}, {}, set(), {}, {}, {})
    was_training = model.training
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    model.eval()
    with _recording(model, trace), torch.enable_grad():
        for parameter in frozen:  # Without a gradient there is no graph to walk.
            parameter.requires_grad_(True)
        try:
            logits = model(input_ids=trace_inputs(model), use_cache=False).logits
        except Exception as error:
            raise UnnormError(f"{type(model).__name__} can't run on token ids alone: {error}") from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    model.train(was_training)
    trace.used_by = _users(logits.grad_fn)
    return trace


def _users(last: Node) -> dict[Node, list[Node]]:
    """For every node that led to the last one, the nodes that take its result."""
    users: dict[Node, list[Node]] = {last: []}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            if parent not in users:
                users[parent] = []
                waiting.append(parent)
            users[parent].append(node)
    return users


@contextmanager
def _recording(model: nn.Module, trace: _Trace) -> Iterator[None]:
    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            outputs = output if isinstance(output, tuple) else (output,)
            ends = [v.grad_fn for v in outputs if isinstance(v, Tensor) and v.grad_fn is not None]
            if not tensors:
                return
            if ends:
                trace.ends[name] = ends
                trace.begins[name] = {v.grad_fn for v in tensors if v.grad_fn is not None}
                trace.inputs[name] = tensors[0]
            if not isinstance(output, Tensor):
                return
            if output.grad_fn is None:
                trace.hidden[name] = tensors[0].shape[-1] if tensors[0].ndim else 0
                return
            trace.outputs[name] = output
            if len(tensors) > 1:
                trace.gated.add(name)
            # A module that only hands its input on (dropout, identity) made nothing.
            if output.grad_fn is not tensors[0].grad_fn:
                trace.made_by[output.grad_fn] = name

        return hook

    def record_block(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                trace.blocks.setdefault(output.grad_fn, name)

        return hook

    # Experts have their weights themselves, and a child for their activation.
    leaves = {n: m for n, m in model.named_modules() if not any(True for _ in m.children()) or is_experts(m)}
    blocks = {name: m for name, m in model.named_modules() if name and name not in leaves}
    handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in leaves.items()]
    handles += [m.register_forward_hook(record_block(name)) for name, m in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
