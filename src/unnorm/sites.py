"""Norm sites: what they are, how they are found by running the model, and the proof that the finding is right."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import Node
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.norms import linear_weight

Kind = Literal["layernorm", "rmsnorm"]
Role = Literal["attention", "mlp", "attention+mlp", "final"]

# Autograd nodes that hand a tensor on unchanged but for its shape or dtype.
_HANDS_ON: tuple[str, ...] = (
    "View",
    "UnsafeView",
    "Reshape",
    "Slice",
    "Select",
    "Transpose",
    "Permute",
    "Alias",
    "Squeeze",
)
_HANDS_ON += ("Unsqueeze", "Expand", "Clone", "ToCopy", "NativeDropout", "T")
_ADDS = ("Add", *_HANDS_ON)

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
        role: what its readers belong to.
        readers: paths of the linear layers that read its output, and nothing else does.
        writers: paths of the modules whose outputs add up to its input.
    """

    name: str
    kind: Kind
    eps: float
    width: int
    role: Role
    readers: tuple[str, ...]
    writers: tuple[str, ...]

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
        own = {key: values[key] for key in cls.__dataclass_fields__}
        return cls(**{**own, "readers": tuple(own["readers"]), "writers": tuple(own["writers"])})


@dataclass
class _Trace:
    """One forward pass: what went in and out of each leaf module, and which autograd node made it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    made_by: dict[Node, str]


def find_sites(model: PreTrainedModel) -> list[NormSite]:
    """Every norm site of a decoder-only language model, in the order in which a forward pass meets them.

    Norms are known by behaviour: a leaf module whose output does not change when its input is scaled. One
    traced pass shows which linear layers read each norm's output and which modules wrote its input.

    Raises:
        UnnormError: there is no norm, or one whose output no linear layer reads (post-norm models).
    """
    trace = _trace(model)
    names = _norm_names(model, trace)
    if not names:
        raise UnnormError(
            f"{type(model).__name__} has no normalization layers: no module's output is independent of its "
            "input's scale. There is nothing to remove."
        )
    sites = [_site(model, trace, name) for name in names]
    for site in sites:
        for name in names:
            if name in site.writers:
                raise _not_pre_norm(model, name)
    return sites


def norm_modules(model: PreTrainedModel) -> list[str]:
    """Paths of all leaf modules that normalize, by behaviour; none in an LN-free model."""
    return _norm_names(model, _trace(model))


def affine_parameters(module: nn.Module, site: NormSite) -> tuple[Tensor, Tensor | None]:
    """Gain and bias that a norm applies, as the model holds them (so that training goes on from them).

    The gain is `weight`, `1 + weight` or all ones, whichever explains what the module computes.

    Raises:
        UnnormError: none of them does.
    """
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    like = weight if weight is not None else next(iter(module.parameters()), torch.ones(()))
    ones = torch.ones(site.width, dtype=like.dtype, device=like.device)
    candidates = [ones] if weight is None else [weight, 1 + weight]
    x = _probe(site.width, like)
    with torch.no_grad():
        y = module(x)
        for gain in candidates:
            if torch.allclose(y, _norm(x, site) * gain + (0 if bias is None else bias), rtol=1e-3, atol=1e-3):
                return gain, bias
    raise UnnormError(
        f"The norm '{site.name}' ({type(module).__name__}) is not gain * x / scale(x) + bias with a gain of "
        "weight or 1 + weight. It can't be removed."
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

    Tracing can't tell a fused projection's parts, so their layout is declared here.
    """
    features: dict[str, int] = {}
    for reader in site.readers:
        leaf = reader.rpartition(".")[2]
        out = linear_weight(model.get_submodule(reader)).shape[0]
        if leaf in _FUSED_QKV_THIRDS:
            features[reader] = out // 3
        elif leaf.startswith(("q_", "k_")) or leaf in ("query", "key"):
            features[reader] = 0
        elif leaf in _VALUE_PROJECTIONS:
            features[reader] = out
        else:
            return None
    return features if site.role == "attention" else None


def _norm_names(model: PreTrainedModel, trace: _Trace) -> list[str]:
    return [name for name in trace.inputs if is_norm(model.get_submodule(name), trace.inputs[name].shape[-1])]


def _norm(x: Float[Tensor, "*batch width"], site: NormSite) -> Float[Tensor, "*batch width"]:
    if site.centered:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + site.eps)


def _probe(width: int, like: Tensor) -> Float[Tensor, "2 3 width"]:
    """Tokens of variance near 1 at any width, so that eps hardly counts."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.linspace(-1.7, 1.7, width)[torch.randperm(width, generator=generator)] for _ in range(6)]
    return torch.stack(rows).view(2, 3, width).to(like)


@torch.no_grad()
def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module normalizes: same shape out as in, the same for 8 times the input, but not for another one."""
    like = next(iter(module.parameters()), torch.ones(()))
    if not like.is_floating_point():
        return False
    x = _probe(width, like)
    try:
        y, scaled = module(x), module(8 * x)
    except Exception:  # A module that can't take such an input is no norm.
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        return False
    alike = torch.allclose(y, scaled, rtol=1e-3, atol=1e-2 * float(y.abs().max()))
    differs = not torch.allclose(module(x.flip(-1)), y, rtol=1e-2)
    return alike and differs


@torch.no_grad()
def _kind(module: nn.Module, width: int) -> Kind:
    x = _probe(width, next(iter(module.parameters()), torch.ones(())))
    return "layernorm" if torch.allclose(module(x), module(x + 1), atol=1e-2) else "rmsnorm"


def _eps(module: nn.Module) -> float:
    for name in ("eps", "variance_epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return 0.0


def _site(model: PreTrainedModel, trace: _Trace, name: str) -> NormSite:
    module = model.get_submodule(name)
    width = trace.inputs[name].shape[-1]
    readers = tuple(other for other in trace.inputs if _reads(model, trace, other, name))
    if not readers:
        raise _not_pre_norm(model, name)
    writers = [w for w in _sources(trace, trace.inputs[name].grad_fn, _ADDS) if w != _UNKNOWN]
    role = _role(model, readers)
    return NormSite(name, _kind(module, width), _eps(module), width, role, readers, tuple(writers))


def _not_pre_norm(model: PreTrainedModel, name: str) -> UnnormError:
    return UnnormError(
        f"The output of the norm '{name}' ({type(model).__name__}) goes into the residual stream, not to linear layers "
        "alone. Norms that come after a sublayer (post-norm) can't be folded into a reader; only pre-norm models "
        "are handled."
    )


def _reads(model: PreTrainedModel, trace: _Trace, reader: str, norm: str) -> bool:
    if getattr(model.get_submodule(reader), "weight", torch.empty(0)).ndim != 2:
        return False
    return _sources(trace, trace.inputs[reader].grad_fn, _HANDS_ON) == [norm]


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
        elif node.name().removesuffix("0").removesuffix("Backward") in through:
            waiting.extend(parent for parent, _ in node.next_functions)
        else:
            found[_UNKNOWN] = None
    order = list(trace.outputs)
    return sorted(found, key=lambda name: order.index(name) if name in order else -1)


def _role(model: PreTrainedModel, readers: tuple[str, ...]) -> Role:
    unembedding = model.get_output_embeddings()
    if any(model.get_submodule(reader) is unembedding for reader in readers):
        return "final"
    in_attention = [inside_attention(model, reader) for reader in readers]
    if all(in_attention):
        return "attention"
    return "attention+mlp" if any(in_attention) else "mlp"


def inside_attention(model: PreTrainedModel, name: str) -> bool:
    """Whether a module is part of an attention layer, by its parents' classes."""
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    return any("attention" in type(parent).__name__.lower() for parent in parents)


def trace_inputs(model: PreTrainedModel, batch: int = 1, length: int = _TRACE_TOKENS) -> Int[Tensor, "batch length"]:
    """Token ids that any causal model takes: seeded, random, within the vocabulary."""
    vocab = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (batch, length), generator=generator).to(model.device)


def _trace(model: PreTrainedModel) -> _Trace:
    trace = _Trace({}, {}, {})
    was_training = model.training
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    model.eval()
    with _recording(model, trace), torch.enable_grad():
        for parameter in frozen:  # Without a gradient there is no graph to walk.
            parameter.requires_grad_(True)
        try:
            model(input_ids=trace_inputs(model), use_cache=False)
        except Exception as error:
            raise UnnormError(f"{type(model).__name__} can't run on token ids alone: {error}") from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    model.train(was_training)
    return trace


@contextmanager
def _recording(model: nn.Module, trace: _Trace) -> Iterator[None]:
    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if not tensors or not isinstance(output, Tensor) or output.grad_fn is None:
                return
            trace.inputs[name], trace.outputs[name] = tensors[0], output
            # A module that only hands its input on (dropout, identity) made nothing.
            if output.grad_fn is not tensors[0].grad_fn:
                trace.made_by[output.grad_fn] = name

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
