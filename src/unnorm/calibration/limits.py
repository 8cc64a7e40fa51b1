"""Limits on MLPs' neurons, so that without norms no token can run away.

Some MLPs are quadratic: what they write grows with the square of what they read. Gated ones multiply two reads of the
residual stream, others have a squared ReLU. A norm holds that down. Without one a token that comes to a layer at some
times the usual scale leaves it at more, and overflows some layers on (`docs/smollm2.md`). So neuron j of a layer is
kept between -m_j and m_j,

    m_j = ROOM * max(a_j, q)

where a_j is the largest activation that it has in the original on calibration text, and q the one that three quarters
of the layer's neurons stay under. It is one elementwise nonlinearity more between an MLP's read and its
write: every read stays affine in the stream, and what the MLP adds stays a sum over its neurons.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.data import batches
from unnorm.hooks import hooked
from unnorm.modeling.modeling_unnorm import limit_neurons, limits_of
from unnorm.models.running import evaluating
from unnorm.sites.residual import recorded, stream_writers
from unnorm.sites.site import NormSite
from unnorm.sites.tracing import trace_inputs

ROOM = 2.0
"""Times the largest activation in the original that a neuron may have."""
COMMON = 0.75
"""Quantile of a layer's largest activations: no limit is below ROOM times it, so that rare neurons have room.
At 0.99 runaway tokens stay finite and are far off, at 0.9 and below they are right; figures in `docs/smollm2.md`."""
FAR = 1e3
"""Times the usual output of a norm at which it is plain whether what reads it is linear there, or quadratic."""
BATCH = 4


def set_limits(
    student: PreTrainedModel, original: PreTrainedModel, sites: Sequence[NormSite], blocks: Dataset
) -> list[str]:
    """Give the neurons of the student's quadratic MLPs their limits, in place.

    Args:
        student: the model that norms are taken from.
        original: the original, whose neurons are measured; its norms are on.
        sites: its norm sites.
        blocks: calibration text.

    Returns:
        Paths of the linear layers whose inputs have limits now; none where no MLP is quadratic.
    """
    limits = measure_limits(original, quadratic_writers(original, sites), blocks)
    limit_neurons(student, list(limits), limits)
    return list(limits)


@torch.no_grad()
def quadratic_writers(original: PreTrainedModel, sites: Sequence[NormSite]) -> list[str]:
    """Paths of the linear layers that MLPs write with whose neurons grow with the square of what the MLP reads.

    They are known by what happens when all norms put out much more.
    """
    writers, _ = stream_writers(original, sites)
    mlps = [writer.name for writer in writers if writer.kind == "mlp" and writer.linear]
    ids = trace_inputs(original)
    with _norms_times(original, sites, FAR):
        once = _largest(original, mlps, [ids])
    with _norms_times(original, sites, 2 * FAR):
        twice = _largest(original, mlps, [ids])
    return [name for name in mlps if twice[name].max() > 3 * once[name].max()]


@torch.no_grad()
def measure_limits(
    original: PreTrainedModel, writers: Sequence[str], blocks: Dataset
) -> dict[str, Float[Tensor, " neuron"]]:
    """The limits m_j of this file's equation, by path of the writer."""
    largest = _largest(original, writers, batches(blocks, BATCH, original.device))
    return {name: ROOM * torch.maximum(a, a.quantile(COMMON)) for name, a in largest.items()}


def _largest(
    model: PreTrainedModel, writers: Sequence[str], ids: Iterable[Int[Tensor, "batch position"]]
) -> dict[str, Float[Tensor, " neuron"]]:
    """The largest absolute value of each input of the named linear layers, in float32."""
    largest: dict[str, Tensor] = {}
    with recorded(model, writers) as record, evaluating(model):
        for batch in ids:
            model(input_ids=batch, use_cache=False)
            for name, (neurons, _) in record.items():
                found = neurons.abs().flatten(0, -2).amax(0).float()
                largest[name] = torch.maximum(largest[name], found) if name in largest else found
    return largest


@contextmanager
def _norms_times(model: PreTrainedModel, sites: Sequence[NormSite], factor: float) -> Iterator[None]:
    """For a while every norm puts out that many times as much."""
    norms = [model.get_submodule(site.name) for site in sites]
    with hooked(norm.register_forward_hook(lambda _, args, output: factor * output) for norm in norms):
        yield


@torch.no_grad()
def share_at_limit(model: PreTrainedModel, blocks: Dataset) -> float | None:
    """Share of all neurons' activations on text that a limit holds; None where there are no limits."""
    limits = limits_of(model)
    if not limits:
        return None
    held = total = 0
    with recorded(model, list(limits)) as record, evaluating(model):
        for batch in batches(blocks, BATCH, model.device):
            model(input_ids=batch, use_cache=False)
            for name, (neurons, _) in record.items():
                held += int((neurons.abs() >= limits[name]).sum())
                total += neurons.numel()
    return held / total
