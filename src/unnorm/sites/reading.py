"""Where a module keeps the weights that read its input: linear layers, routers, and experts stacked in one tensor."""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unnorm.models.linear import is_conv1d, is_linear


@dataclass(frozen=True)
class ReadWeight:
    """The parameter that reads a module's input.

    Attributes:
        weight: its name; the shape is (out, in), or (expert, out, in).
        bias: the name of the bias added to its product, whether or not the module has one.
        turned: whether it is stored as (…, in, out).
        takes_bias: whether the module adds a bias, or would if it had one.
    """

    weight: str
    bias: str
    turned: bool
    takes_bias: bool


def read_weight(module: nn.Module) -> ReadWeight | None:
    """The only weight that reads the module's input; None if there is none, or something else may read it too."""
    if is_experts(module):
        experts = "gate_up_proj" if module.has_gate else "up_proj"
        return ReadWeight(experts, f"{experts}_bias", bool(module.is_transposed), bool(module.has_bias))
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return None
    plain = is_linear(module)
    has_bias = getattr(module, "bias", None) is not None
    read = ReadWeight("weight", "bias", is_conv1d(module), plain or has_bias)
    if _ndim(module, "weight") == 3:
        return read
    return read if _ndim(module, "weight") == 2 and (plain or _is_linear(module)) else None


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer of experts stacked in 3-D tensors, as marked by transformers' decorator."""
    names = ("gate_up_proj", "up_proj")
    return hasattr(module, "is_transposed") and any(_ndim(module, name) == 3 for name in names)


def _ndim(module: nn.Module, name: str) -> int:
    weight = getattr(module, name, None)
    return weight.ndim if isinstance(weight, nn.Parameter) else 0


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether the first output of a module with a matrix, such as a router, is its product, exact even in float64."""
    double = deepcopy(module).cpu().double()  # Apple GPUs have no float64.
    weight, bias = double.get_parameter("weight"), getattr(double, "bias", None)
    x = torch.linspace(-1.7, 1.7, 6 * weight.shape[1], dtype=torch.float64)
    x = x.sin().view(6, weight.shape[1])
    try:
        y = double(x)
        y = y if isinstance(y, Tensor) else y[0]
        return torch.allclose(y.view(6, -1), F.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
    except Exception:  # Whatever it is, it is not a linear layer.
        return False
