"""Computing in float64 without a float64 copy of the model: weights are widened one transformer block at a time."""

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
    """Inside the context the model computes in float64; afterwards it is as it was.

    Each transformer block gets float64 weights just before it runs and its own back right after; modules outside the
    blocks (embeddings, unembedding) have float64 weights throughout. Widening is exact, so the result is that of a
    full float64 copy.

    Args:
        model: a model in any precision, or one whose parameters are on the meta device.
        weights: used instead of the model's own, by their names in its state dict.
    """
    taken: dict[nn.Module, list[tuple[dict[str, Any], str, Any]]] = {}
    paths = {module: name for name, module in model.named_modules()}

    def take(top: nn.Module, parts: Iterable[nn.Module]) -> None:
        wide: dict[int, Tensor] = {}  # By id of the original tensor, so that tied weights are widened once.
        for part in parts:
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for held in tables:
                for name, tensor in held.items():
                    key = f"{paths[part]}.{name}".lstrip(".")
                    own = tensor if weights is None else weights.get(key, tensor)
                    if own is None or not own.is_floating_point() or (own is tensor and own.dtype == torch.float64):
                        continue
                    taken.setdefault(top, []).append((held, name, tensor))
                    if weights is not None or id(own) not in wide:
                        wide[id(own)] = own.double()
                    double = wide[id(own)]
                    held[name] = nn.Parameter(double, False) if held is part._parameters else double

    def give_back(top: nn.Module) -> None:
        for held, name, tensor in taken.pop(top, []):
            held[name] = tensor

    blocks, others = _parts(model)
    experts = model.config._experts_implementation
    handles = [block.register_forward_pre_hook(lambda block, _: take(block, block.modules())) for block in blocks]
    handles += [block.register_forward_hook(lambda block, *_: give_back(block), always_call=True) for block in blocks]
    take(model, others)
    model.config._experts_implementation = "eager"  # The fused experts do not support float64.
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
    """Logits in float64, of the model with its own weights or with `weights` instead."""
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
