"""Linear layers, whichever way their class stores the weight."""

from jaxtyping import Float
from torch import Tensor, nn


def linear_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """A view of a linear layer's weight as (out, in), whichever way the class stores it."""
    weight = module.get_parameter("weight")
    return weight.T if is_conv1d(module) else weight


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, as torch or as GPT-2 in transformers has them."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's kind of linear layer, which keeps its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"
