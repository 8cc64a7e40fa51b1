"""Linear layers, whichever way their class stores the weight."""

from jaxtyping import Float
from torch import Tensor, nn


def linear_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """A view of a linear layer's weight as (out, in), whichever way the class stores it."""
    weight = module.get_parameter("weight")
    return weight.T if is_conv1d(module) else weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch, or GPT-2's kind in transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's kind of linear layer, which stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"
