"""Any token of the vocabulary may come first, and there is only one first position a block.

A model with massive activations treats whatever stands there apart, and without norms some tokens grow there from layer
to layer until they overflow. They are few (220 of SmolLM2-135M's 49,152), so a block hardly ever starts with one.
"""

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.losses import RUNAWAY, distillation_losses, unevenness
from unnorm.norms import TaperedNorm

DRAWN = 1 / 2
"""Tokens of the vocabulary that are looked at alone, for each token of a batch."""
LEARNED = 1 / 32
"""Of them those that run furthest are trained on, for each token of a batch."""


def first_token_losses(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    stand_ins: Collection[TaperedNorm],
    drawn: Int[Tensor, "drawn 1"],
    count: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Of the `count` tokens that run furthest of those drawn, each alone: KL to the teacher, and unevenness.

    Args:
        model: in training mode, with its norms removed, so that a ceiling keeps everything finite.
        teacher: the original.
        stand_ins: the model's own, which must keep log scales.
        drawn: ids of tokens.
        count: how many of them are to learn.

    Returns:
        Mean KL(teacher || model) in nats, and the mean over all sites of `unevenness` beyond `RUNAWAY`.
    """
    with torch.no_grad():
        model.base_model(input_ids=drawn, use_cache=False)
        runs = torch.stack([departure.abs().amax(-1) for departure in _departures(stand_ins, len(drawn))])
        ids = drawn[runs.amax(0).topk(min(count, len(drawn))).indices]
        teacher_logits = teacher(input_ids=ids, use_cache=False).logits
    kl, *_ = distillation_losses(model(input_ids=ids, use_cache=False).logits, teacher_logits, ids)
    departures = _departures(stand_ins, len(ids))
    uneven = [unevenness(departure, departure.new_zeros(()), RUNAWAY) for departure in departures]
    return kl, torch.stack(uneven).mean()


def _departures(stand_ins: Collection[TaperedNorm], tokens: int) -> list[Float[Tensor, "token _"]]:
    """How far each token's log scale was from the constant's in the last pass, at each site."""
    kept = [(stand_in.kept_log_scale, stand_in.log_constant[0]) for stand_in in stand_ins]
    return [(log_scale - constant).view(tokens, -1) for log_scale, constant in kept if log_scale is not None]
