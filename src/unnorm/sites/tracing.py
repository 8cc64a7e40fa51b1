"""A traced forward pass: which module made each tensor, what uses it, and which sums form the residual stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.hooks import hooked
from unnorm.models.probe import trace_inputs
from unnorm.models.running import evaluating
from unnorm.sites.reading import is_experts

# Autograd nodes that pass a tensor on unchanged except for its shape or dtype.
HANDS_ON: tuple[str, ...] = (
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
HANDS_ON += ("Unsqueeze", "Expand", "Clone", "ToCopy", "NativeDropout", "T")
ADDS = ("Add", *HANDS_ON)
# The subset after which each row of the writer's weight still produces one feature of the norm's input.
RESHAPES = tuple(name for name in HANDS_ON if name not in ("Slice", "Select", "Index", "Expand", "NativeDropout"))

UNKNOWN = "?"
"""Stands for a source that can't be traced."""


@dataclass
class Trace:
    """One forward pass: inputs and outputs of leaf modules, the autograd nodes that made them, and the nodes' users.

    Attributes:
        inputs: the first input tensor of each leaf module.
        outputs: the output of each leaf module that returns a single tensor.
        made_by: for each node that is an output of a leaf module, that module.
        used_by: for each node, the nodes that take its result.
        blocks: for each node that is the (first) output of modules with children, the innermost of these.
        gated: leaf modules that take more than one tensor.
        ends: the nodes of all outputs of each leaf module, including those with several.
        begins: the nodes of all tensors that went into each leaf module.
        hidden: leaf modules that were called where no gradient flows, with the width of their input.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    made_by: dict[Node, str] = field(default_factory=dict)
    used_by: dict[Node, list[Node]] = field(default_factory=dict)
    blocks: dict[Node, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    hidden: dict[str, int] = field(default_factory=dict)
    ends: dict[str, list[Node]] = field(default_factory=dict)
    begins: dict[str, set[Node]] = field(default_factory=dict)


def traced(model: PreTrainedModel) -> Trace:
    """Run the model on a few token ids and keep its autograd graph; the model is left as it was.

    Raises:
        UnnormError: the model can't run on token ids alone.
    """
    trace = Trace()
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    with evaluating(model), _recording(model, trace), torch.inference_mode(False), torch.enable_grad():
        for parameter in frozen:  # Without a gradient there is no graph to walk.
            parameter.requires_grad_(True)
        try:
            logits = model(input_ids=trace_inputs(model), use_cache=False).logits
        except Exception as error:
            raise UnnormError(f"{type(model).__name__} can't run on token ids alone: {error}") from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    trace.used_by = _users(logits.grad_fn)
    return trace


def _users(last: Node) -> dict[Node, list[Node]]:
    """For every node that the last one depends on, the nodes that take its result."""
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
def _recording(model: nn.Module, trace: Trace) -> Iterator[None]:
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
            # A module that only passes its input through (dropout, identity) makes nothing.
            if output.grad_fn is not tensors[0].grad_fn:
                trace.made_by[output.grad_fn] = name

        return hook

    def record_block(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output  # MoE layers add router logits.
            if isinstance(first, Tensor) and first.grad_fn is not None:
                trace.blocks.setdefault(first.grad_fn, name)

        return hook

    # Experts count as leaves: they hold their weights themselves, and have a child only for the activation.
    leaves = {n: m for n, m in model.named_modules() if not any(True for _ in m.children()) or is_experts(m)}
    blocks = {name: m for name, m in model.named_modules() if name and name not in leaves}
    handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in leaves.items()]
    handles += [m.register_forward_hook(record_block(name)) for name, m in blocks.items()]
    with hooked(handles):
        yield


def residual_sources(model: PreTrainedModel, reader: str) -> dict[str, float] | None:
    """Modules whose outputs, each times a factor, add up to what `reader` reads; None if that is not such a sum.

    Factors differ from 1 in families that multiply embeddings or sublayer outputs by a constant.
    """
    return stream_sources(model, [reader]).get(reader)


def stream_sources(model: PreTrainedModel, readers: Sequence[str]) -> dict[str, dict[str, float]]:
    """`residual_sources` of several modules, from one pass; those that do not read such a sum are left out."""
    trace = traced(model)
    sources = {name: _summands(trace, trace.inputs[name].grad_fn) for name in readers if name in trace.inputs}
    return {name: factors for name, factors in sources.items() if factors is not None}


def _summands(trace: Trace, node: Node | None) -> dict[str, float] | None:
    if node is None:
        return None
    if node in trace.made_by:
        return {trace.made_by[node]: 1.0}
    factor = _factor(node)
    # The constant in a product has no node.
    parents = [parent for parent, _ in node.next_functions if parent is not None] if factor else []
    terms = [_summands(trace, parent) for parent in parents]
    if not terms or None in terms:
        return {trace.blocks[node]: 1.0} if node in trace.blocks else None
    total: dict[str, float] = {}
    for name, share in (item for term in terms if term for item in term.items()):
        total[name] = total.get(name, 0.0) + factor * share
    return total


def _factor(node: Node | None) -> float:
    """The factor that a node applies to its input by adding, passing on or scaling; 0 for any other kind of node."""
    if node is None:
        return 0.0
    if _operation(node) in ADDS:
        return 1.0
    other = getattr(node, "_saved_other", None)
    if _operation(node) not in ("Mul", "Div") or other is None or other.numel() != 1 or other.requires_grad:
        return 0.0
    return float(other) if _operation(node) == "Mul" else 1 / float(other)


def sources_of(trace: Trace, node: Node | None, through: tuple[str, ...]) -> list[str]:
    """Modules whose outputs a tensor is made of, found by walking back through the kinds of node in `through`."""
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
            found[UNKNOWN] = None
    order = list(trace.outputs)
    return sorted(found, key=lambda name: order.index(name) if name in order else -1)


def goes_only_to(trace: Trace, name: str, users: Sequence[str]) -> bool:
    """Whether a module's output goes into the given modules and nowhere else (as far as gradients flow)."""
    inside = {node for user in users for node in _inside(trace, user)}
    made = trace.outputs[name].grad_fn
    waiting = list(trace.used_by.get(made, ())) if made is not None else []
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        if _operation(node) not in HANDS_ON:
            return False
        waiting.extend(trace.used_by[node])
    return True


def _inside(trace: Trace, name: str) -> set[Node]:
    """The nodes of a module's own computation."""
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
