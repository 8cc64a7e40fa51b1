"""Token ids to try a model on."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.models.sizes import context_length, vocabulary_size

_TRACE_TOKENS = 8


def trace_inputs(
    model: PreTrainedModel, batch: int = 1, length: int = _TRACE_TOKENS, begin: int | None = None
) -> Int[Tensor, "batch length"]:
    """Seeded random token ids that any causal model takes: within its vocabulary, no longer than its context.

    Args:
        model: the model.
        batch: number of sequences.
        length: tokens in each, at most the model's context.
        begin: the token that the model's texts begin with, put first (`begin_of_text`). Models that have one are lost
            without it: what they then compute is so sensitive that rounding hides everything else.
    """
    vocab = vocabulary_size(model)
    length = min(length, context_length(model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (batch, length), generator=generator, device="cpu")
    if begin is not None and begin < vocab:
        ids[:, 0] = begin
    return ids.to(model.device)
