"""What is minimized: next-token loss or distillation from the teacher, and what published recipes add to it."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Penalty = Literal["spread", "target"]

_CACHED, _CACHED_GPU = 2**17, 2**26
"""Logits that are worked on at once."""


def next_token_loss(
    logits: Float[Tensor, "batch position vocab"], input_ids: Int[Tensor, "batch position"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token after the first, in nats per predicted token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten().long())


def token_losses(
    logits: Float[Tensor, "batch position vocab"], input_ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch predicted"]:
    """Loss of each token after the first, in nats."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")


def distillation_losses(
    logits: Float[Tensor, "batch position vocab"],
    teacher_logits: Float[Tensor, "batch position vocab"],
    input_ids: Int[Tensor, "batch position"],
    shown: Bool[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean KL(teacher || model) with its gradient; and, to show, the same and the next-token loss of some blocks.

    All in nats per token, from one softmax of the model's logits. Every position counts for KL, the last too: unlike
    the next-token loss it needs no label.

    Args:
        logits: the model's.
        teacher_logits: the teacher's.
        input_ids: what both were given.
        shown: which blocks count for what is shown; NaN comes of none, all of them of None.
    """
    labels = F.pad(input_ids[:, 1:].long(), (0, 1), value=-1)
    kl, token_kl, token_loss = _Distillation.apply(logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels.flatten())
    token_kl, token_loss = (x.view(input_ids.shape) for x in (token_kl, token_loss))
    if shown is not None:
        token_kl, token_loss = token_kl[shown], token_loss[shown]
    return kl, token_kl.mean(), token_loss[:, :-1].mean()


class _Distillation(torch.autograd.Function):
    """KL with its gradient, which is (q - p) / rows, computed together and a few rows at a time.

    Nothing as large as the logits is made but the gradient, and what is worked on stays in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "row vocab"],
        teacher_logits: Float[Tensor, "row vocab"],
        labels: Int[Tensor, " row"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " row"], Float[Tensor, " row"]]:
        rows, vocab = logits.shape
        precision = torch.promote_types(logits.dtype, torch.float32)
        kl, loss = (torch.empty(rows, dtype=precision, device=logits.device) for _ in range(2))
        gradient = torch.empty_like(logits)
        at_once = max(1, (_CACHED if logits.device.type == "cpu" else _CACHED_GPU) // vocab)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            log_q = F.log_softmax(logits[part].to(precision), dim=-1)
            log_p = F.log_softmax(teacher_logits[part].to(precision), dim=-1)
            loss[part] = -log_q.gather(-1, labels[part, None].clamp(min=0)).squeeze(-1)
            p = log_p.exp()
            kl[part] = torch.linalg.vecdot(p, log_p - log_q)
            gradient[part] = log_q.exp_().sub_(p).div_(rows)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, loss)
        return kl.mean(), kl, loss

    @staticmethod
    def backward(ctx: Any, grad_kl: Float[Tensor, ""], *_: Any) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_kl.to(gradient.dtype), None, None


def scale_penalty(
    log_scale: Float[Tensor, "batch position"],
    special: Bool[Tensor, "batch position"],
    log_constant: Float[Tensor, ""],
    penalty: Penalty,
) -> Float[Tensor, ""]:
    """Mean squared distance of a site's scales from one number, in the square of the residual stream's units.

    - `spread` (arXiv 2507.02559, at the final norm): from the mean scale of the batch's ordinary tokens.
    - `target` (TaperNorm, arXiv 2602.10408, at the final norm): from the constant scale, fixed once it is.

    Args:
        log_scale: log scale of every token.
        special: position 0 and end-of-text tokens, which don't count for the mean but are drawn to it.
        log_constant: log of the site's constant scale.
        penalty: which.
    """
    scale = log_scale.exp()
    ordinary = (~special).to(scale.dtype)
    mean = (scale.detach() * ordinary).sum() / ordinary.sum()
    return (scale - (mean if penalty == "spread" else log_constant.exp())).square().mean()


def read_mismatch(
    read: Float[Tensor, "*token width"], teacher_read: Float[Tensor, "*token width"]
) -> Float[Tensor, ""]:
    """Squared distance between what a site's readers get and what they got from the teacher's norm.

    As a share of the teacher's, |read - teacher_read|^2 / |teacher_read|^2 over all tokens, so that sites of any width
    and gain count alike.
    """
    teacher_read = teacher_read.to(read.dtype)
    return (read - teacher_read).square().sum() / teacher_read.square().sum()
