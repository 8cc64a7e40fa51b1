"""Loss and residual norm of a model at every measured position, and whether everything is finite."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.hooks import recorded
from unnorm.models.running import evaluating
from unnorm.models.sizes import vocabulary_size
from unnorm.sites.find import unembedding_name
from unnorm.worst_case.inputs import Inputs

_LOGITS_AT_ONCE, _GPU_LOGITS_AT_ONCE = 2**24, 2**28


@dataclass(frozen=True)
class Measured:
    """A model on one class, one value per measured position, on the CPU in float64; NaN counts as infinite.

    Attributes:
        loss: nats.
        norm: L2 norm of the residual vector that the final norm site reads, or read before its removal.
        finite: whether every logit and residual is finite.
    """

    loss: Float[Tensor, " read"]
    norm: Float[Tensor, " read"]
    finite: bool


@torch.no_grad()
def measure(model: PreTrainedModel, inputs: Sequence[Inputs], reader: str) -> Measured:
    """Loss and residual norm at every measured position, in the order of the inputs.

    `reader` is the path of the last module to read the residual stream: the final norm, or what replaces it.
    """
    losses, norms, finite = [], [], True
    for logits, residual, targets in _passes(model, inputs, reader):
        losses.append(F.cross_entropy(logits.float(), targets, reduction="none").cpu().double())
        norms.append(torch.linalg.vector_norm(residual.float(), dim=-1).cpu().double())
        finite = finite and _all_finite(logits, residual)
    loss, norm = (torch.nan_to_num(torch.cat(parts), nan=math.inf, posinf=math.inf) for parts in (losses, norms))
    return Measured(loss, norm, finite)


@torch.no_grad()
def is_finite(model: PreTrainedModel, inputs: Sequence[Inputs], reader: str) -> bool:
    """Whether the model, in its own dtype, gives finite logits and residuals at every measured position."""
    return all(_all_finite(logits, residual) for logits, residual, _ in _passes(model, inputs, reader))


def largest_residuals(
    inputs: Sequence[Inputs], norms: Sequence[Float[Tensor, " read"]], tokens: int
) -> tuple[Inputs, ...]:
    """The sequences with the largest residuals in any of the models, up to `tokens` tokens or slightly more.

    What overflows in float16 is large in float32. Norms are taken relative to each model's median.
    """
    relative = torch.stack([norm / norm.median().clamp_min(1e-30) for norm in norms]).amax(0)
    relative = torch.nan_to_num(relative, nan=math.inf, posinf=math.inf)
    peaks = [  # Per sequence: its largest norm, its part and its row there.
        (peak, part, index)
        for part, values in enumerate(_unflatten(relative, inputs))
        for index, peak in enumerate(values.amax(1).tolist())
    ]
    chosen: dict[int, list[int]] = {}
    left = tokens
    for _, part, index in sorted(peaks, reverse=True):
        if left <= 0:
            break
        chosen.setdefault(part, []).append(index)
        left -= inputs[part].ids.shape[1]
    return tuple(inputs[part].take(torch.tensor(sorted(rows))) for part, rows in sorted(chosen.items()))


def _passes(
    model: PreTrainedModel, inputs: Iterable[Inputs], reader: str
) -> Iterator[tuple[Float[Tensor, "read vocab"], Float[Tensor, "read width"], Int[Tensor, " read"]]]:
    """Logits, residuals and targets at the measured positions, batch by batch."""
    device = model.device
    vocabulary = vocabulary_size(model)
    path = reader if reader in dict(model.named_modules()) else unembedding_name(model)
    with evaluating(model), recorded(model, [path]) as record:
        for part in inputs:
            at_once = _LOGITS_AT_ONCE if device.type == "cpu" else _GPU_LOGITS_AT_ONCE
            size = max(1, at_once // (vocabulary * part.ids.shape[1]))
            for start in range(0, len(part.ids), size):
                batch = part.take(slice(start, start + size))
                logits = model(**_arguments(batch, device), use_cache=False).logits
                read = batch.read.to(device)
                residual = record[path][0].view(*batch.ids.shape, -1)  # OPT flattens batch and position.
                yield logits[read], residual[read], batch.targets.to(device)[read]


def _arguments(batch: Inputs, device: torch.device) -> dict[str, Tensor]:
    named = {
        "input_ids": batch.ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    return {name: value.to(device) for name, value in named.items() if value is not None}


def _unflatten(values: Float[Tensor, " read"], inputs: Sequence[Inputs]) -> list[Float[Tensor, "sequence position"]]:
    """Values at measured positions put back in place, 0 elsewhere."""
    pieces = values.split([int(part.read.sum()) for part in inputs])
    return [
        torch.zeros(part.ids.shape, dtype=values.dtype).masked_scatter(part.read, piece)
        for part, piece in zip(inputs, pieces, strict=True)
    ]


def _all_finite(logits: Tensor, residual: Tensor) -> bool:
    return bool(logits.isfinite().all() and residual.isfinite().all())
