"""Limits on MLPs' neurons, so that without norms no token can run away.

Some MLPs are quadratic: what they write grows with the square of what they read. Gated MLPs multiply two reads of the
residual stream, others use a squared ReLU. A norm holds that down. Without one, a token that reaches a layer at several
times the usual scale leaves it at an even larger multiple, and overflows a few layers later (`docs/smollm2.md`). So the
activation of neuron j of a layer is clamped between -m_j and m_j,

    m_j = ROOM * max(a_j, q)

where a_j is the neuron's largest absolute activation in the original on calibration text, and q the value of a_j that
three quarters of the layer's neurons stay below. This adds one elementwise nonlinearity between an MLP's read and its
write: every read stays affine in the stream, and what the MLP adds stays a sum over its neurons.

Where a norm follows the MLP, it divides what the neurons write by its scale s, and the constant c that replaces it does
not. A neuron then adds as much as in the original if its activation is multiplied by c/s, so m_j is also at most

    max(b_j, q')

where b_j is the neuron's largest absolute activation times c/s, and q' the quantile of b_j. Limits by a_j alone leave
room for many times what a layer added in the original: in Gemma 3 270M they did not hold some text that these hold
(`docs/method.md`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.data import batches
from unnorm.hooks import hooked, recorded
from unnorm.modeling.modeling_unnorm import limit_neurons, limits_of
from unnorm.models.probe import trace_inputs
from unnorm.models.running import evaluating
from unnorm.sites.residual import mlp_projections, stream_writers
from unnorm.sites.site import NormSite
from unnorm.taper.norms import TaperedNorm

ROOM = 2.0
"""How large a neuron may become, relative to its largest activation in the original."""
COMMON = 0.75
"""Quantile of a layer's largest activations that takes the place of smaller ones: rarely active neurons have room too.
At 0.99 runaway tokens stay finite but are far off, at 0.9 and below they are right; figures in `docs/smollm2.md`."""
FAR = 1e3
"""Multiple of a norm's usual output at which its readers are clearly either linear or quadratic."""
BATCH = 4


def set_limits(
    student: PreTrainedModel,
    original: PreTrainedModel,
    sites: Sequence[NormSite],
    stand_ins: Mapping[str, TaperedNorm],
    blocks: Dataset,
) -> list[str]:
    """Limit the neurons of the student's quadratic MLPs, in place.

    Args:
        student: the model that loses its norms.
        original: the original, with its norms on, whose neurons are measured.
        sites: its norm sites.
        stand_ins: the student's stand-ins with their constants, by site name.
        blocks: calibration text.

    Returns:
        Paths of the linear layers whose inputs are now limited; empty if no MLP is quadratic.
    """
    limits = measure_limits(original, quadratic_writers(original, sites), stand_ins, blocks)
    limit_neurons(student, list(limits), limits)
    return list(limits)


@torch.no_grad()
def quadratic_writers(original: PreTrainedModel, sites: Sequence[NormSite]) -> dict[str, str | None]:
    """Paths of the output projections of those MLPs whose neurons grow with the square of what the MLP reads.

    They are found by doubling already large outputs of all norms: the neurons' sum then more than triples. (The largest
    one may be another neuron by then, as attention changes too.)

    Returns:
        For each, the path of the norm that follows it, if one does.
    """
    writers, _ = stream_writers(original, sites)
    projections = mlp_projections(original, sites, writers).values()
    mlps = {projection.name: norm.name if norm else None for projection, norm in projections}
    ids = trace_inputs(original)
    with _norms_times(original, sites, FAR):
        once = _largest(original, dict.fromkeys(mlps), {}, [ids])
    with _norms_times(original, sites, 2 * FAR):
        twice = _largest(original, dict.fromkeys(mlps), {}, [ids])
    return {name: norm for name, norm in mlps.items() if twice[name].sum() > 3 * once[name].sum()}


@torch.no_grad()
def measure_limits(
    original: PreTrainedModel,
    writers: Mapping[str, str | None],
    stand_ins: Mapping[str, TaperedNorm],
    blocks: Dataset,
) -> dict[str, Float[Tensor, " neuron"]]:
    """The limits m_j of the equations at the top of this file, by path of the writer.

    Args:
        original: the model that is measured.
        writers: output projections of MLPs, each with the path of the norm that follows it, if one does.
        stand_ins: with the constants of these norms, by path.
        blocks: calibration text.
    """
    largest = _largest(original, writers, stand_ins, batches(blocks, BATCH, original.device))
    limits = {name: ROOM * _at_least_common(largest[name]) for name in writers}
    normed = {name: _at_least_common(largest[norm]) for name, norm in writers.items() if norm}
    return limits | {name: torch.minimum(limits[name], most) for name, most in normed.items()}


def _at_least_common(largest: Float[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
    return torch.maximum(largest, largest.quantile(COMMON))


def _largest(
    model: PreTrainedModel,
    writers: Mapping[str, str | None],
    stand_ins: Mapping[str, TaperedNorm],
    ids: Iterable[Int[Tensor, "batch position"]],
) -> dict[str, Float[Tensor, " neuron"]]:
    """The largest absolute value of each input of the linear layers `writers`, in float32, by path.

    By the path of the norm that follows a layer, if one is given, the same with all values multiplied by c/s.
    """
    largest: dict[str, Tensor] = {}
    norms = [norm for norm in writers.values() if norm]
    with recorded(model, [*writers, *norms]) as record, evaluating(model):
        for batch in ids:
            model(input_ids=batch, use_cache=False)
            for name, norm in writers.items():
                neurons = record[name][0].abs().float()
                met = {name: neurons}
                if norm:
                    met[norm] = neurons * torch.exp(-stand_ins[norm].departure(record[norm][0])).unsqueeze(-1).float()
                for path, values in met.items():
                    found = values.flatten(0, -2).amax(0)
                    largest[path] = torch.maximum(largest[path], found) if path in largest else found
    return largest


@contextmanager
def _norms_times(model: PreTrainedModel, sites: Sequence[NormSite], factor: float) -> Iterator[None]:
    """Within the context, every norm's output is multiplied by `factor`."""
    norms = [model.get_submodule(site.name) for site in sites]
    with hooked(norm.register_forward_hook(lambda _, args, output: factor * output) for norm in norms):
        yield


@torch.no_grad()
def share_at_limit(model: PreTrainedModel, blocks: Dataset) -> float | None:
    """Share of limited neurons' activations on text that are at their limit; None if there are no limits."""
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
