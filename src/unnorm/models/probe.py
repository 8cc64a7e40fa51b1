"""Token ids to try a model on."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.models.sizes import context_length, vocabulary_size

_TRACE_TOKENS = 8


def trace_inputs(model: PreTrainedModel, batch: int = 1, length: int = _TRACE_TOKENS) -> Int[Tensor, "batch length"]:
    """Seeded random token ids that any causal model takes: within its vocabulary, no longer than its context."""
    vocab = vocabulary_size(model)
    length = min(length, context_length(model))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (batch, length), generator=generator, device="cpu").to(model.device)
