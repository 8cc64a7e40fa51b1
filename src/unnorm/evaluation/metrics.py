"""Per-token measurements: loss, distance to the original, entropy, confidence."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.data import batches
from unnorm.models.running import evaluating
from unnorm.progress import Watch

CALIBRATION_BINS = 15
"""Number of equal-width confidence bins, as in arXiv 1706.04599."""
TOP = 5

_AT_ONCE, _AT_ONCE_GPU = 2**20, 2**26
"""Logits processed at once, on a CPU and on a GPU: a softmax of all would take several times the model's memory."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ModelTokens:
    """One model on packed blocks; entry [block, t] is about its prediction after token t.

    The last prediction of a block is of a token outside it, so it has no `loss`.

    Attributes:
        loss: nats; one position shorter than the others.
        entropy: entropy of the predicted distribution, in nats.
        guess: id of its most likely token.
        confidence: probability of that token.
    """

    loss: Floats
    entropy: Floats
    guess: NDArray[np.int32]
    confidence: Floats


@dataclass(frozen=True)
class Distances:
    """How far a model is from the original after every token of packed blocks.

    Attributes:
        kl: KL(original || model) in nats.
        jsd: Jensen-Shannon divergence in nats, at most log 2.
        top1: 1 where both have the same most likely token.
        top5: share of the original's five likeliest tokens that are among the model's five.
    """

    kl: Floats
    jsd: Floats
    top1: Floats
    top5: Floats


@torch.no_grad()
def measure_tokens(
    model: PreTrainedModel,
    blocks: Dataset,
    original: PreTrainedModel | None = None,
    batch_size: int = 4,
    watch: Watch | None = None,
) -> tuple[ModelTokens, ModelTokens | None, Distances | None]:
    """Run a model, and the original if there is one, over packed blocks.

    Args:
        model: any causal language model; it runs in its own dtype, and its logits are used in at least float32.
        blocks: rows of `input_ids`, all of one length.
        original: the model to compare with, on the same device.
        batch_size: blocks per forward pass.
        watch: called with `{"kind": "progress", "tokens": …, "loss": …}` after every batch.

    Returns:
        The model's measurements; with an original, also the original's and the distances between them.
    """
    parts: list[tuple[dict[str, Tensor], ...]] = []
    seen, total = 0, 0.0
    with evaluating(model), nullcontext() if original is None else evaluating(original):
        for ids in batches(blocks, batch_size, model.device):
            logits = model(input_ids=ids, use_cache=False).logits
            reference = None if original is None else original(input_ids=ids, use_cache=False).logits
            rows = [tuple(of_rows) for of_rows in _in_pieces(logits, reference, ids)]
            joined = tuple(
                {key: torch.cat([part[key] for part in side]).view(ids.shape).cpu() for key in side[0]}
                for side in zip(*rows, strict=True)
            )
            parts.append(joined)
            if watch is not None:
                seen += ids.numel()
                total += float(joined[0]["loss"][:, :-1].double().sum())
                predicted = seen // ids.shape[1] * (ids.shape[1] - 1)
                watch({"kind": "progress", "tokens": seen, "loss": total / max(1, predicted)})
    ours, *beside = (_to_numpy(side) for side in zip(*parts, strict=True))
    if not beside:
        return ModelTokens(**ours), None, None
    theirs, distances = beside
    return ModelTokens(**ours), ModelTokens(**theirs), Distances(**distances)


def _to_numpy(parts: tuple[dict[str, Tensor], ...]) -> dict[str, NDArray[Any]]:
    whole = {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
    return whole | ({"loss": whole["loss"][:, :-1]} if "loss" in whole else {})


def _in_pieces(
    logits: Float[Tensor, "batch position vocab"],
    reference: Float[Tensor, "batch position vocab"] | None,
    ids: Int[Tensor, "batch position"],
) -> Iterator[list[dict[str, Float[Tensor, " row"]]]]:
    """Measure a few rows of logits at a time: the model, and with a reference also the reference and the distances."""
    targets = F.pad(ids[:, 1:], (0, 1)).flatten()
    precision = torch.promote_types(logits.dtype, torch.float32)
    sides = [x.flatten(0, 1) for x in (logits, reference) if x is not None]
    most = _AT_ONCE if logits.device.type == "cpu" else _AT_ONCE_GPU
    for rows in torch.arange(len(targets)).split(max(1, most // logits.shape[-1])):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        log_probabilities = [F.log_softmax(side[part].to(precision), dim=-1) for side in sides]
        likeliest = [log_p.topk(min(TOP, log_p.shape[-1]), dim=-1) for log_p in log_probabilities]
        found = [_of_model(log_p, top, targets[part]) for log_p, top in zip(log_probabilities, likeliest, strict=True)]
        if reference is not None:
            found.append(_distances(*log_probabilities, *(top.indices for top in likeliest)))
        yield found


def _of_model(log_p: Float[Tensor, "row vocab"], likeliest: Any, targets: Int[Tensor, " row"]) -> dict[str, Tensor]:
    return {
        "loss": -log_p.gather(-1, targets[:, None]).squeeze(-1),
        # A probability that underflows to 0 contributes 0, although its log is -inf.
        "entropy": -torch.linalg.vecdot(log_p.exp(), log_p.clamp(min=torch.finfo(log_p.dtype).min)),
        "guess": likeliest.indices[:, 0].int(),
        "confidence": likeliest.values[:, 0].exp(),
    }


def _distances(
    log_q: Float[Tensor, "row vocab"],
    log_p: Float[Tensor, "row vocab"],
    top_q: Int[Tensor, "row top"],
    top_p: Int[Tensor, "row top"],
) -> dict[str, Tensor]:
    """Distances between the model's distribution q and the original's p.

    KL(p || q) = sum p (log p - log q); JSD = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.
    """
    log_m = torch.logaddexp(log_q, log_p) - float(np.log(2))
    jsd = 0.5 * sum(F.kl_div(log_m, log_x, reduction="none", log_target=True).sum(-1) for log_x in (log_q, log_p))
    return {
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
        "jsd": torch.as_tensor(jsd),
        "top1": (top_q[:, 0] == top_p[:, 0]).float(),
        "top5": (top_q[:, :, None] == top_p[:, None, :]).any(1).float().mean(-1),
    }


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions whose confidence lies in one range.

    Attributes:
        low: lower edge of the range, 0 to 1.
        high: upper edge.
        tokens: number of predictions.
        confidence: their mean confidence.
        accuracy: share of them that were right.
    """

    low: float
    high: float
    tokens: int
    confidence: float
    accuracy: float


def calibration(confidence: NDArray[Any], correct: NDArray[Any]) -> tuple[float, tuple[CalibrationBin, ...]]:
    """Expected calibration error of the most likely token, and its bins (arXiv 1706.04599, equation 3).

    ECE = sum over bins of (tokens in the bin / all tokens) |accuracy - confidence|. Empty bins are left out. NaN and
    no bins if any confidence is not finite.
    """
    bins = CALIBRATION_BINS
    confidence, correct = confidence.ravel().astype(np.float64), correct.ravel().astype(np.float64)
    if not np.isfinite(confidence).all():
        return float("nan"), ()
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights, minlength=bins) for weights in (confidence, correct)]
    error = float(np.abs(sums[1] - sums[0]).sum() / len(confidence))
    rows = tuple(
        CalibrationBin(i / bins, (i + 1) / bins, int(n), float(sums[0][i] / n), float(sums[1][i] / n))
        for i, n in enumerate(counts)
        if n
    )
    return error, rows
