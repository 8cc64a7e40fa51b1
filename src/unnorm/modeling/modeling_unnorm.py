"""Transformers classes for models whose norms have been folded away.

This file travels with every checkpoint (`trust_remote_code=True` loads it from there), so it needs torch and
transformers only. An LN-free model is its stock class with three differences, all named in its config:
an identity where each removed norm was, a bias on the linear layers that took over a norm's bias, and an
unembedding of its own.
"""

from collections.abc import Sequence

from torch import nn, zeros
from transformers import GPT2Config, GPT2LMHeadModel


def strip_norms(model: nn.Module, removed_norms: Sequence[str], added_biases: Sequence[str]) -> None:
    """Turn a stock model's modules into an LN-free model's, in place; the weights come from the checkpoint.

    Args:
        model: the stock model.
        removed_norms: paths of the norm modules; each becomes an `nn.Identity`.
        added_biases: paths of linear layers without a bias; each gets one, at zero.
    """
    for name in removed_norms:
        model.set_submodule(name, nn.Identity())
    for name in added_biases:
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight")
        linear.bias = nn.Parameter(zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))


class UnnormGPT2Config(GPT2Config):
    """GPT-2's config, plus which norms are gone and which biases were added for them."""

    model_type = "unnorm_gpt2"

    removed_norms: list[str] | None = None
    added_biases: list[str] | None = None
    tie_word_embeddings: bool = False


class UnnormGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 without LayerNorm: the residual stream is a plain sum, and every layer reads it linearly."""

    config_class = UnnormGPT2Config
    _tied_weights_keys = None

    def __init__(self, config: UnnormGPT2Config) -> None:
        super().__init__(config)
        strip_norms(self, config.removed_norms or [], config.added_biases or [])
