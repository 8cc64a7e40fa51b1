"""A model in memory: its mode, precision and copies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
T = TypeVar("T")

_JITTER = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}
"""Attributes of modules that put noise on what routers read: Mixtral's and MiniMax's, PhiMoE's, DBRX's."""


def cast_as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast a model to another dtype, with the same result as loading it in that dtype.

    Non-persistent buffers keep their precision: rotary frequencies in bfloat16 would rotate late positions by wrong
    angles.
    """
    computed = [(module, key, module._buffers[key]) for module in model.modules() for key in _computed_buffers(module)]
    model.to(dtype)
    for module, key, buffer in computed:
        module._buffers[key] = buffer
    return model


def _computed_buffers(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set & module._buffers.keys()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode inside the context; afterwards its mode is as before."""
    before = [(module, module.training) for module in model.modules()]  # Some may be frozen in another mode.
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def in_evaluation_mode(function: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """Make a function of a model run it without dropout, whatever mode the model is in."""

    @wraps(function)
    def call(model: M, *args: P.args, **kwargs: P.kwargs) -> T:
        with evaluating(model):
            return function(model, *args, **kwargs)

    return call  # type: ignore[return-value]  # The model may also be given by its keyword.


@contextmanager
def without_noise(model: PreTrainedModel, keep_dropout: bool = False) -> Iterator[None]:
    """Turn off, inside the context, what makes a model random in training: dropout, layer drop and routers' jitter.

    With `keep_dropout` the first of these stays as the model's config has it. Depending on the family, the number is in
    an `nn.Dropout`, an attribute of another module, or the config. PhiMoE also samples its experts in training, which
    nothing turns off.
    """
    before: list[tuple[object, str, float]] = []
    if not keep_dropout:
        before += [(module, "p", module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for holder in (model.config, model.config.get_text_config(), *model.modules()):
        noise = {key: value for key, value in vars(holder).items() if _is_noise(key, keep_dropout) and _is_share(value)}
        before += [(holder, key, value) for key, value in noise.items()]
    try:
        for holder, key, _ in before:
            setattr(holder, key, 0.0)
        yield
    finally:
        for holder, key, value in before:
            setattr(holder, key, value)


def _is_noise(name: str, keep_dropout: bool) -> bool:
    """Leaving out layers is noise in any case: the parameters in use would change from step to step."""
    return name in _JITTER or "layerdrop" in name or ("drop" in name and not keep_dropout)


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


def fuse_activations(model: PreTrainedModel) -> None:
    """Run GPT-2's GELU as one torch operation, not transformers' eight: same function, saves a tenth of a CPU step."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "NewGELUActivation":
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def copy_model(model: PreTrainedModel, share: bool = False) -> PreTrainedModel:
    """An independent copy in the same dtype and on the same device.

    With `share` only the modules are copied: the parameters are new objects over the same memory.
    """
    # The memo of `deepcopy`: what is in here is used instead of a copy.
    taken: dict[int, torch.Tensor] = {}
    if share:
        taken = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    for module in model.modules():  # Some families keep states of the last pass, which can't be copied with a graph.
        kept = (value for value in vars(module).values() if isinstance(value, torch.Tensor) and value.grad_fn)
        taken |= {id(value): value.detach() for value in kept}
    copy = deepcopy(model, taken)
    # Copying a config leaves this out, since it depends on the machine.
    copy.config._experts_implementation = model.config._experts_implementation
    return copy.eval()
