"""Loss terms: next-token loss, distillation from the teacher, and what the recipes add to them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unnorm.taper.recipes import Penalty

EVEN_ENOUGH = 0.25
"""Distance between a log scale and the log constant, in either direction, up to which `unevenness` is zero."""

RUNAWAY = math.log(3.0)
"""The same distance once the norms are removed: tokens beyond it may grow from layer to layer; KL handles the rest."""

_CACHED, _CACHED_GPU = 2**18, 2**26
"""Logits processed at a time, on a CPU and on other devices."""


def next_token_loss(
    logits: Float[Tensor, "batch position vocab"], input_ids: Int[Tensor, "batch position"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token after the first, in nats per predicted token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten().long())


def distillation_losses(
    logits: Float[Tensor, "batch position vocab"],
    teacher_logits: Float[Tensor, "batch position vocab"],
    input_ids: Int[Tensor, "batch position"],
    is_text: Bool[Tensor, " batch"] | None = None,
    temperature: float = 1.0,
    label_weight: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss to minimize, with its gradient, and, for display, KL(teacher || model) and next-token loss on the text.

    The loss is the mean of T^2 KL(teacher^(1/T) || model^(1/T)), with T = 1 in blocks of text (Hinton et al. 2015,
    arXiv 1503.02531), plus `label_weight` times the next-token loss. KL covers every position including the last, since
    unlike the next-token loss it needs no label. All in nats per token.

    Args:
        logits: the model's.
        teacher_logits: the teacher's.
        input_ids: what both were given.
        is_text: which blocks are text. They are distilled at temperature 1, and the displayed KL and loss cover them
            alone (NaN if there are none). None: all are text.
        temperature: T of all other blocks. Above 1, tokens that the teacher gives almost no probability count more.
        label_weight: weight of the next-token loss.
    """
    labels = F.pad(input_ids[:, 1:].long(), (0, 1), value=-1)
    parts = list(_parts(logits, is_text, temperature))
    minimized, kl, loss = _Distillation.apply(logits, teacher_logits, labels, parts, label_weight)
    if is_text is None:
        return minimized, kl.mean(), loss[:, :-1].mean()
    kl, loss = (of.mean(1).masked_fill(~is_text, 0.0).sum() / is_text.sum() for of in (kl, loss[:, :-1]))
    return minimized, kl, loss


_Part = tuple[slice, float | Float[Tensor, "row 1"]]


def _parts(
    logits: Float[Tensor, "batch position vocab"], is_text: Bool[Tensor, " batch"] | None, temperature: float
) -> Iterator[_Part]:
    """Slices of rows (one row per token) to process at a time, with their temperature."""
    batch, positions, vocab = logits.shape
    if logits.device.type != "cpu":
        yield from _parts_unasked(batch, positions, vocab, is_text, temperature)
        return
    at_once = max(1, _CACHED // vocab)
    for block, of_text in enumerate([True] * batch if is_text is None else is_text.tolist()):
        start, end = block * positions, (block + 1) * positions
        for row in range(start, end, at_once):
            yield slice(row, min(row + at_once, end)), 1.0 if of_text else temperature


def _parts_unasked(
    batch: int, positions: int, vocab: int, is_text: Bool[Tensor, " batch"] | None, temperature: float
) -> Iterator[_Part]:
    """The same for a GPU, without copying `is_text` to the CPU, which would have to wait for the GPU."""
    at_once = max(1, _CACHED_GPU // vocab)
    of_rows: Tensor | None = None
    if is_text is not None:
        temperatures = torch.full_like(is_text, temperature, dtype=torch.float32).masked_fill(is_text, 1.0)
        of_rows = temperatures.repeat_interleave(positions)[:, None]
    for row in range(0, batch * positions, at_once):
        part = slice(row, row + at_once)
        yield part, 1.0 if of_rows is None else of_rows[part]


class _Distillation(torch.autograd.Function):
    """The loss to minimize and its gradient, computed together and a few positions at a time.

    With respect to the logits, the gradient of T^2 KL is T (q - p), and that of the next-token loss is q minus 1 at the
    label. Nothing but the gradient is as large as the logits, and the working set stays in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "batch position vocab"],
        teacher_logits: Float[Tensor, "batch position vocab"],
        labels: Int[Tensor, "batch position"],
        parts: list[_Part],
        label_weight: float,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch position"], Float[Tensor, "batch position"]]:
        precision = torch.promote_types(logits.dtype, torch.float32)
        kl, loss = (torch.empty(labels.numel(), 1, dtype=precision, device=logits.device) for _ in range(2))
        weights = (labels >= 0).to(precision).view(-1, 1)
        weights *= label_weight / weights.sum().clamp(min=1)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        of_rows = gradient.view(-1, gradient.shape[-1])
        rows, teacher_rows, labels_of_rows = logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels.view(-1, 1)
        for part, temperature in parts:
            x, teacher_x = (of[part].to(precision) for of in (rows, teacher_rows))
            label, weight = labels_of_rows[part].clamp(min=0), weights[part]
            q, log_total = _softmax(x)
            loss[part] = log_total - x.gather(-1, label)
            of_loss = q * weight
            if isinstance(temperature, Tensor) or temperature != 1:
                x, teacher_x = x / temperature, teacher_x / temperature
                q, log_total = _softmax(x)
            p, log_teacher_total = _softmax(teacher_x)
            distance = torch.linalg.vecdot(p, teacher_x - x)[:, None] + log_total - log_teacher_total
            kl[part] = temperature**2 * distance.clamp(min=0)  # Rounding may make a tiny KL negative.
            of_kl = q.sub_(p).mul_(temperature / labels.numel())
            of_rows[part] = of_kl.add_(of_loss).scatter_add_(-1, label, -weight)
        minimized, kl, loss = kl.mean() + (weights * loss).sum(), kl.view_as(labels), loss.view_as(labels)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, loss)
        return minimized, kl, loss

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, ""], *_: Any) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad.to(gradient.dtype)), None, None, None, None  # In place: no second array that large.


def _softmax(x: Float[Tensor, "row vocab"]) -> tuple[Float[Tensor, "row vocab"], Float[Tensor, "row 1"]]:
    """Probabilities and log sum exp(x), which follows from the largest logit and its probability.

    This takes a single exponential per logit, which is where most of the time goes on a CPU.
    """
    p = F.softmax(x, dim=-1)
    return p, x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()


def scale_penalty(
    log_scale: Float[Tensor, "batch position"],
    special: Bool[Tensor, "batch position"],
    log_constant: Float[Tensor, ""],
    penalty: Penalty,
) -> Float[Tensor, ""]:
    """Mean squared distance of a site's scales from one number, in squared units of the residual stream.

    - `spread` (arXiv 2507.02559, at the final norm): from the mean scale of the batch's ordinary tokens.
    - `target` (TaperNorm, arXiv 2602.10408, at the final norm): from the constant scale, which is fixed once alpha
      reaches 1.

    Args:
        log_scale: log scale of every token.
        special: position 0 and end-of-text tokens, which do not count in the mean but are pulled towards it.
        log_constant: log of the site's constant scale.
        penalty: which of the two.
    """
    scale = log_scale.exp()
    ordinary = (~special).to(scale.dtype)
    mean = (scale.detach() * ordinary).sum() / ordinary.sum().clamp(min=1)  # A batch of short texts may have none.
    return (scale - (mean if penalty == "spread" else log_constant.exp())).square().mean()


def unevenness(
    log_scale: Float[Tensor, "*token"], log_constant: Float[Tensor, ""], even_enough: float = EVEN_ENOUGH
) -> Float[Tensor, ""]:
    """Mean square of how far log scales are from the log constant beyond `even_enough`.

    In log space the gradient of a massive activation gives the direction without being blown up by its size; ordinary
    tokens have no gradient.
    """
    return ((log_scale - log_constant).abs() - even_enough).clamp(min=0).square().mean()


def massive_unevenness(
    log_scale: Float[Tensor, "*token"], log_constant: Float[Tensor, ""], massive: Bool[Tensor, "*token"]
) -> Float[Tensor, ""]:
    """Mean squared distance of massive tokens' log scales from the log constant; 0 if there is no such token.

    The mean is over massive tokens alone: among all tokens the one at position 0 would count for almost nothing, yet
    what attention reads from it through a constant is wrong for every token that follows.
    """
    return ((log_scale - log_constant).square() * massive).sum() / massive.sum().clamp(min=1)


def read_mismatch(
    read: Float[Tensor, "*token width"],
    teacher_read: Float[Tensor, "*token width"],
    massive: Bool[Tensor, "*token"] | None = None,
) -> Float[Tensor, ""]:
    """Squared distance between what a site's readers get and what they got from the teacher's norm.

    Relative to the teacher's, |read - teacher_read|^2 / |teacher_read|^2 over all tokens, so that sites of any width
    and gain count alike. If `massive` is given, the mean over massive tokens is added to the mean over the others: a
    block has about one massive token, and everything after it attends to it. Both are relative to the mean over all
    tokens, since an MLP's norm gives it almost nothing of a massive token.
    """
    teacher_read = teacher_read.to(read.dtype)
    if massive is None:
        return (read - teacher_read).square().sum() / teacher_read.square().sum()
    error = (read - teacher_read).square().sum(-1)
    means = [(error * which).sum() / which.sum().clamp(min=1) for which in (massive, ~massive)]
    return (means[0] + means[1]) / teacher_read.square().sum(-1).mean()
