"""Computing in float64 without a copy of the model in float64: one block's weights at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def in_float64(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """The model computes in float64 while this lasts; between blocks it is as it was.

    Each transformer block, and each module outside of the blocks, gets its weights in float64 just before it runs and
    its own back right after. Widening is exact, so this computes what a whole copy in float64 would.

    Args:
        model: a model in any precision, or one whose parameters are on the meta device.
        weights: what to take instead of the model's own, by their names in its state dict.
    """
    taken: dict[nn.Module, list[tuple[dict[str, Any], str, Any]]] = {}
    paths = {module: name for name, module in model.named_modules()}

    def take(module: nn.Module, deep: bool) -> None:
        kept = taken.setdefault(module, [])
        for part in module.modules() if deep else (module,):
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    key = f"{paths[part]}.{name}".lstrip(".")
                    own = tensor if weights is None else weights.get(key, tensor)
                    if own is None or not own.is_floating_point() or (own is tensor and own.dtype == torch.float64):
                        continue
                    kept.append((held, name, tensor))
                    wide = own.double()
                    held[name] = nn.Parameter(wide, False) if held is part._parameters else wide

    def give_back(module: nn.Module) -> None:
        for held, name, tensor in taken.pop(module, []):
            held[name] = tensor

    shells, units = _parts(model)
    experts = model.config._experts_implementation
    handles = [unit.register_forward_pre_hook(lambda module, _: take(module, True)) for unit in units]
    handles += [unit.register_forward_hook(lambda module, *_: give_back(module), always_call=True) for unit in units]
    for shell in shells:
        take(shell, False)
    model.config._experts_implementation = "eager"  # The fused experts know no float64.
    try:
        yield
    finally:
        model.config._experts_implementation = experts
        for handle in handles:
            handle.remove()
        for module in list(taken):
            give_back(module)


@torch.no_grad()
def float64_logits(
    model: PreTrainedModel, ids: Int[Tensor, "batch position"], weights: Mapping[str, Tensor] | None = None
) -> Float[Tensor, "batch position vocab"]:
    """Logits in float64, of the model or of one like it with other `weights`."""
    with in_float64(model, weights):
        return model(input_ids=ids, use_cache=False).logits


def _parts(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules whose children are told apart, and those that go whole: blocks, and what lies outside of them."""
    blocks = set(model._no_split_modules or ())
    shells: list[nn.Module] = []
    units: list[nn.Module] = []
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        children = list(module.children())
        if children and type(module).__name__ not in blocks:
            shells.append(module)
            waiting.extend(children)
        elif module not in units:
            units.append(module)
    return shells, units
