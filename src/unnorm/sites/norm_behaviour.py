"""Norms by what they compute: recognizing them, and finding their kind, eps, gain and bias."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.models.linear import is_linear
from unnorm.sites.site import Kind, NormSite

# ATen names of the operations that norms are made of and that nothing else in these models uses.
_NORM_OPERATIONS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "rsqrt", "var", "std", "var_mean", "norm"}


@torch.no_grad()
def is_norm(module: nn.Module, width: int, gated: bool = False) -> bool:
    """Whether a module normalizes: same output shape, same output for 8 times the input, another for another input.

    A `gated` module is called with a second tensor of ones.
    """
    if not _like(module).is_floating_point() or is_linear(module):  # Limits may clamp all inputs of a linear layer.
        return False
    x = _probe(module, width)
    gate = [torch.ones_like(x)] if gated else []
    try:
        y, mirrored, scaled, other = (module(at, *gate) for at in (x, -x, 8 * x, x.flip(-1)))
    except Exception:  # A module that can't take such an input is no norm.
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        return False
    within = 1e-2 * float((y - mirrored).abs().max())  # The size of the outputs, which scales with the gain.
    return torch.allclose(y, scaled, rtol=0, atol=within) and not torch.allclose(y, other, rtol=0, atol=within)


@torch.no_grad()
def kind_of(module: nn.Module, width: int) -> Kind:
    """`layernorm` if a norm removes the mean before it divides, otherwise `rmsnorm`."""
    x = _probe(module, width)
    y = module(x)
    # The size of the outputs, which scales with the gain; the bias cancels.
    length = float((y - module(-x)).abs().max())
    return "layernorm" if torch.allclose(y, module(x + 1), rtol=0, atol=1e-2 * length) else "rmsnorm"


@torch.no_grad()
def eps_of(module: nn.Module, width: int) -> float:
    """The module's own eps; where it has none by a known name, an estimate from its outputs for short vectors."""
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


def affine_parameters(module: nn.Module, site: NormSite) -> tuple[Tensor, Tensor | None]:
    """Gain and bias that a norm applies, with the model's own values, from which training continues.

    The gain is `weight`, `1 + weight` or all ones, whichever reproduces the module's output.

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
        rounding = max(1e-3, 4 * torch.finfo(y.dtype).eps)
        for gain in candidates:
            if gain.shape != y.shape[-gain.ndim :]:
                continue
            expected = _norm(x, site) * gain + (0 if bias is None else bias)
            if torch.allclose(y, expected.to(y.dtype), rtol=rounding, atol=rounding):
                return gain, bias
    raise UnnormError(
        f"The norm '{site.name}' ({type(module).__name__}) is not gain * x / scale(x) + bias with a gain of "
        f"weight or 1 + weight. It can't be removed. {stays_with_keep(site.name)}"
    )


def gain_offset(module: nn.Module, site: NormSite) -> int:
    """What the norm adds to its stored weight to get its gain: 1 for Gemma's kind, otherwise 0.

    Raises:
        UnnormError: neither reproduces the module's output.
    """
    weight = getattr(module, "weight", None)
    return 0 if weight is None or affine_parameters(module, site)[0] is weight else 1


def stays_with_keep(name: str) -> str:
    """The hint, in messages about norms that can't be removed, of how to keep them."""
    return (
        f"With --keep '{re.sub('[0-9]+', '[0-9]+', re.escape(name))}$' such norms stay (join several patterns with |)."
    )


def _is_root_of_mean(kind: str, args: Sequence[Any]) -> bool:
    """Whether an operation takes the square root, or its inverse, of one number for each token, as Gemma 4's norms do.

    Roots of every feature are something else, such as RecurrentGemma's gates.
    """
    is_root = kind == "sqrt" or (kind == "pow" and isinstance(args[1], float) and abs(args[1]) == 0.5)
    return is_root and isinstance(args[0], Tensor) and args[0].ndim > 1 and args[0].shape[-1] == 1


class _Operations(TorchDispatchMode):
    """Records which norm operations of ATen run, each with the innermost module that it runs in."""

    def __init__(self, modules: ModuleTracker) -> None:
        super().__init__()
        self.modules = modules
        self.found: dict[tuple[str, str], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kind = name.removeprefix("native_").removeprefix("_fused_").removeprefix("linalg_vector_")
        is_sum = kind == "norm" and args[1:2] == (1,)  # DBRX sums a router's probabilities with it.
        if (kind in _NORM_OPERATIONS and not is_sum) or _is_root_of_mean(kind, args):
            self.found[name, max(self.modules.parents, key=len).partition(".")[2]] = None
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def norm_operations(model: PreTrainedModel, ids: Int[Tensor, "batch position"]) -> list[tuple[str, str]]:
    """The norm operations that a forward pass runs, each paired with every innermost module that it runs in."""
    with ModuleTracker() as modules, _Operations(modules) as operations:
        model(input_ids=ids, use_cache=False)
    return list(operations.found)


def _norm(x: Float[Tensor, "*batch width"], site: NormSite) -> Float[Tensor, "*batch width"]:
    x = centered(x, site.centered)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + site.eps)


def _like(module: nn.Module) -> Tensor:
    """A tensor with the dtype and the device that a module computes in."""
    return next(iter(module.parameters()), torch.ones(()))


def _probe(module: nn.Module, width: int) -> Float[Tensor, "2 3 *heads width"]:
    """Tokens of variance near 1 at any width, so that eps hardly counts; one copy per head where each has a gain."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.linspace(-1.7, 1.7, width)[torch.randperm(width, generator=generator)] for _ in range(6)]
    x = torch.stack(rows).view(2, 3, width).to(_like(module))
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == width:  # Cohere's query/key norms.
        x = x.unsqueeze(-2).expand(2, 3, *weight.shape)
    return x


def centered(x: Float[Tensor, "*token width"], removes_mean: bool) -> Float[Tensor, "*token width"]:
    """What a norm divides: x minus its mean for LayerNorm, x for RMSNorm."""
    return x - x.mean(-1, keepdim=True) if removes_mean else x


def log_scale_of(centered_x: Float[Tensor, "*token width"], eps: float) -> Float[Tensor, "*token 1"]:
    """Log of the scale, computed from what the norm divides (x already centered for LayerNorm)."""
    return 0.5 * torch.log(centered_x.square().mean(-1, keepdim=True) + eps)
