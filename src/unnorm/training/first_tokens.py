"""While a twin heals, any token of the vocabulary may stand at position 0, and there is only one position 0 a block.

A model with massive activations treats whatever stands there apart, and without norms some tokens grow there from layer
to layer until they overflow: of SmolLM2-135M's 49,152 tokens 5,452 did. So, once its norms are gone, such a model is
also distilled on random tokens by themselves, each a sequence of one. Before that, norms hold them, and what they would
teach is far from what the taper needs: with them from the first step on it waited three times as often.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unnorm import processes
from unnorm.losses import distillation_losses
from unnorm.sites import vocabulary_size

FIRST_TOKENS = 1 / 8
"""How many there are for each token of the batch."""
FIRST_WEIGHT = 0.2
"""Their weight beside the batch's loss."""
LOST = 30.0
"""KL in nats from which on a token is left out: it is near overflow, and its gradient with it."""


def first_token_loss(student: PreTrainedModel, teacher: PreTrainedModel, count: int) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) after a random token alone, in nats, over `count` tokens less those that are lost.

    Zero, with no gradient, where all of them are.
    """
    # Generators are alike on all processes: each takes its own part.
    of_all = torch.randint(vocabulary_size(teacher), (processes.count(), count, 1))
    ids = of_all[processes.rank()].to(teacher.device)
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids, use_cache=False).logits
        kept = _kl(student(input_ids=ids, use_cache=False).logits, teacher_logits) < LOST
    if not kept.any():
        return teacher_logits.new_zeros((), dtype=torch.float32)
    logits = student(input_ids=ids[kept], use_cache=False).logits
    return distillation_losses(logits, teacher_logits[kept], ids[kept])[0]


def _kl(
    logits: Float[Tensor, "token 1 vocab"], teacher_logits: Float[Tensor, "token 1 vocab"]
) -> Float[Tensor, " token"]:
    """KL of each token, NaN where logits are not finite."""
    log_q, log_p = (F.log_softmax(x[:, 0].float(), dim=-1) for x in (logits, teacher_logits))
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)
