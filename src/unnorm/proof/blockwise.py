"""Computing in float64 without a copy of the model in float64: one block's weights at a time."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.hooks import hooked


@contextmanager
def in_float64(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """The model computes in float64 while this lasts, and is as it was afterwards.

    Each transformer block gets its weights in float64 just before it runs and its own back right after; what lies
    outside of the blocks (embeddings, unembedding) has its own in float64 all the while. Widening is exact, so this
    computes what a whole copy in float64 would.

    Args:
        model: a model in any precision, or one whose parameters are on the meta device.
        weights: what to take instead of the model's own, by their names in its state dict.
    """
    taken: dict[nn.Module, list[tuple[dict[str, Any], str, Any]]] = {}
    paths = {module: name for name, module in model.named_modules()}

    def take(top: nn.Module, parts: Iterable[nn.Module]) -> None:
        wide: dict[int, Tensor] = {}  # By what it was made from, so that what is tied takes room once.
        for part in parts:
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for held in tables:
                for name, tensor in held.items():
                    key = f"{paths[part]}.{name}".lstrip(".")
                    own = tensor if weights is None else weights.get(key, tensor)
                    if own is None or not own.is_floating_point() or (own is tensor and own.dtype == torch.float64):
                        continue
                    taken.setdefault(top, []).append((held, name, tensor))
                    double = own.double() if weights is not None else wide.setdefault(id(own), own.double())
                    held[name] = nn.Parameter(double, False) if held is part._parameters else double

    def give_back(top: nn.Module) -> None:
        for held, name, tensor in taken.pop(top, []):
            held[name] = tensor

    blocks, others = _parts(model)
    experts = model.config._experts_implementation
    handles = [block.register_forward_pre_hook(lambda block, _: take(block, block.modules())) for block in blocks]
    handles += [block.register_forward_hook(lambda block, *_: give_back(block), always_call=True) for block in blocks]
    take(model, others)
    model.config._experts_implementation = "eager"  # The fused experts know no float64.
    try:
        with hooked(handles):
            yield
    finally:
        model.config._experts_implementation = experts
        for top in list(taken):
            give_back(top)


@torch.no_grad()
def float64_logits(
    model: PreTrainedModel, ids: Int[Tensor, "batch position"], weights: Mapping[str, Tensor] | None = None
) -> Float[Tensor, "batch position vocab"]:
    """Logits in float64, of the model or of one like it with other `weights`."""
    with in_float64(model, weights):
        return model(input_ids=ids, use_cache=False).logits


def _parts(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """Transformer blocks, and all modules that lie outside of them."""
    kinds = set(model._no_split_modules or ())
    blocks: list[nn.Module] = []
    others: list[nn.Module] = []
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if type(module).__name__ in kinds:
            blocks.append(module)
        else:
            others.append(module)
            waiting.extend(module.children())
    return blocks, others
