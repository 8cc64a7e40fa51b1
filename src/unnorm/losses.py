"""What is minimized: next-token loss, or distillation from the teacher."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def next_token_loss(
    logits: Float[Tensor, "batch position vocab"], input_ids: Int[Tensor, "batch position"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token after the first, in nats per predicted token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten().long())


def distillation_losses(
    logits: Float[Tensor, "batch position vocab"],
    teacher_logits: Float[Tensor, "batch position vocab"],
    input_ids: Int[Tensor, "batch position"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean KL(teacher || model), and the next-token loss without a gradient, from one softmax of the model's logits.

    Both in nats per token. Every position counts for KL, the last too: unlike the next-token loss it needs no label.
    """
    log_q = F.log_softmax(logits.float(), dim=-1)
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)
    kl = F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), reduction="batchmean", log_target=True)
    picked = log_q.detach()[:, :-1].gather(-1, input_ids[:, 1:, None].long())
    return kl, -picked.mean()
