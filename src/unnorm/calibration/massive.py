"""Shrink massive activations before training: a few neurons write less, and the norms hide the change.

Large models write a vector tens to thousands of times longer than the median into the residual stream at position 0 and
on a few other tokens, with one or two neurons of an early MLP, and remove it again in the last layers (Sun et al. 2024,
arXiv 2402.17762). What reads such a vector through a norm gets little but its direction, so a vector a tenth as long
has nearly the same effect; without a norm readers would get its full length. So the columns of the neurons that write
it, and of those that remove it, are scaled down together. The factors come from one pass over a little text. With the
neurons' recorded activations a_j, their columns w_j and the recorded stream x at a site, factors f_j would change the
stream to

    x' = x + sum_j (f_j - 1) a_j w_j

and the factors chosen minimize

    mean over sites and tokens of |x'/s(x') - x/s(x)|^2 / width  +  EVENNESS (log s(x') - log c)^2

The first term preserves what the readers get through the norms, the second brings the scale s near the site's constant
c. EVENNESS is the largest of the values tried with which the model, its norms still on, stays within a limit on KL. A
few tens of training steps with the norms on make good what that costs, so the limit is well above the KL budget.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.calibration.equalize import mean_kl
from unnorm.calibration.scales import collect_log_scales, set_constants
from unnorm.data import evenly_spaced
from unnorm.hooks import recorded
from unnorm.models.linear import linear_weight
from unnorm.models.running import evaluating
from unnorm.sites.norm_behaviour import centered, log_scale_of
from unnorm.sites.residual import stream_writers
from unnorm.sites.site import NormSite
from unnorm.taper.norms import Estimator, TaperedNorm

MASSIVE = 10.0
"""A neuron is massive if it adds a vector over this many times as long as the stream usually is at the next site."""
EVENNESS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Weights of the second term, tried in this order."""
MADE_GOOD = 2.0
"""KL that scaling down may cost at first, in KL budgets; training with the norms on then makes it good."""
POSITIONS = 32
"""Leading positions of each block that are used: massive activations sit on the first and on frequent tokens."""
TOKENS = 128
"""Tokens that the factors are fitted on; half of them are those with the longest massive vectors."""
MOST_NEURONS = 64
KL_BLOCKS = 8
STEPS, RATE = 200, 0.1


@dataclass(frozen=True)
class Neuron:
    """A neuron that writes a massive vector.

    Attributes:
        writer: path of the linear layer that contains its column.
        index: index of the column.
        length: the longest vector that it adds in the original, relative to the constant scale of the next site.
        factor: what its column was multiplied by.
    """

    writer: str
    index: int
    length: float
    factor: float = 1.0


def shrink_massive(
    student: PreTrainedModel,
    original: PreTrainedModel,
    sites: Sequence[NormSite],
    stand_ins: dict[str, TaperedNorm],
    blocks: Dataset,
    estimator: Estimator,
    kl_limit: float,
    say: Callable[[str], None] = lambda _: None,
) -> list[Neuron]:
    """Scale down the columns of massive neurons in the student, as far as its KL to the original allows.

    Args:
        student: the model with calibrated stand-ins, which still act as norms; changed in place.
        original: the original, on the same device.
        sites: its norm sites.
        stand_ins: the stand-ins at these sites.
        blocks: calibration text.
        estimator: estimator of the constant scales, which are measured again.
        kl_limit: how far the student may be from the original, nats per token.
        say: called with a message if neurons were found but can't be scaled down that little.

    Returns:
        The neurons whose columns were scaled, longest vectors first; empty if none were.
    """
    stream = _record(original, sites, blocks)
    constants = {site.name: float(stand_ins[site.name].log_constant[0]) for site in stream.sites}
    neurons = _massive_neurons(original, stream, constants)
    if not neurons:
        return []
    columns = [linear_weight(student.get_submodule(neuron.writer)).data[:, neuron.index] for neuron in neurons]
    unscaled = [column.clone() for column in columns]
    for evenness in EVENNESS:
        factors = _fit_factors(original, stream, neurons, constants, evenness)
        for column, whole, factor in zip(columns, unscaled, factors, strict=True):
            column.copy_(factor * whole)
        if mean_kl(student, original, evenly_spaced(blocks, KL_BLOCKS)) <= kl_limit:
            set_constants(stand_ins, collect_log_scales(student, sites, blocks), estimator)
            return [replace(neuron, factor=float(factor)) for neuron, factor in zip(neurons, factors, strict=True)]
    for column, whole in zip(columns, unscaled, strict=True):
        column.copy_(whole)
    say(
        f"left as they are: {len(neurons)} neurons that write massive activations, since scaling them down costs more "
        f"than {kl_limit:.2g} nats of KL; a larger --kl-budget allows it"
    )
    return []


@dataclass(frozen=True)
class _Stream:
    """One pass over a little text: what each site reads from the residual stream, and the activations of MLPs' neurons.

    Attributes:
        sites: those that read the stream, in the order of a forward pass.
        before: by site, the modules whose outputs add up to what it reads.
        reads: by site, (token, width), in float32.
        activations: by writer, (token, neuron).
        factors: by writer, what its output is multiplied by before it is added.
    """

    sites: list[NormSite]
    before: dict[str, set[str]]
    reads: dict[str, Float[Tensor, "token width"]]
    activations: dict[str, Float[Tensor, "token neuron"]]
    factors: dict[str, float]


@torch.no_grad()
def _record(model: PreTrainedModel, sites: Sequence[NormSite], blocks: Dataset) -> _Stream:
    writers, before = stream_writers(model, sites)
    of_mlps = {writer.name: writer.factor for writer in writers if writer.kind == "mlp" and writer.linear}
    reading = [site for site in sites if site.name in before]
    ids = torch.tensor(blocks["input_ids"], device=model.device)[:, :POSITIONS]
    with recorded(model, [*(site.name for site in reading), *of_mlps], copies=True) as record, evaluating(model):
        model(input_ids=ids, use_cache=False)
    given = {name: value.flatten(0, -2).float() for name, (value, _) in record.items()}
    reads, activations = {site.name: given[site.name] for site in reading}, {name: given[name] for name in of_mlps}
    return _Stream(reading, before, reads, activations, of_mlps)


def _massive_neurons(model: PreTrainedModel, stream: _Stream, constants: dict[str, float]) -> list[Neuron]:
    """Neurons that add a vector more than `MASSIVE` times as long as usual, longest first."""
    found = []
    for writer, activations in stream.activations.items():
        site = next((site for site in stream.sites if writer in stream.before[site.name]), None)
        if site is None:
            continue
        columns = _columns(model, stream, writer)
        lengths = activations.abs().amax(0) * columns.square().mean(0).sqrt() / math.exp(constants[site.name])
        found += [Neuron(writer, int(i), float(lengths[i])) for i in (lengths > MASSIVE).nonzero()[:, 0]]
    return sorted(found, key=lambda neuron: -neuron.length)[:MOST_NEURONS]


def _columns(
    model: PreTrainedModel, stream: _Stream, writer: str, which: int | slice = slice(None)
) -> Float[Tensor, "width *neuron"]:
    """What each neuron, or one of them, adds to the stream when its activation is 1."""
    return linear_weight(model.get_submodule(writer)).detach()[:, which].float() * stream.factors[writer]


def _fit_factors(
    model: PreTrainedModel, stream: _Stream, neurons: Sequence[Neuron], constants: dict[str, float], evenness: float
) -> Float[Tensor, " neuron"]:
    """The factors that minimize the objective at the top of this file."""
    activations = torch.stack([stream.activations[n.writer][:, n.index] for n in neurons], dim=1)
    columns = torch.stack([_columns(model, stream, n.writer, n.index) for n in neurons])
    tokens = _tokens(activations * columns.norm(dim=1))
    activations = activations[tokens]
    reads = [stream.reads[site.name][tokens] for site in stream.sites]
    normed = [_normed(x, site)[0] for x, site in zip(reads, stream.sites, strict=True)]
    is_before = [torch.tensor([[n.writer in stream.before[site.name]] for n in neurons]) for site in stream.sites]
    columns_before = [columns * mask.to(columns) for mask in is_before]
    log_factors = torch.zeros(len(neurons), device=columns.device, requires_grad=True)
    optimizer = torch.optim.Adam([log_factors], lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        changes = activations * (log_factors.exp() - 1)
        losses = []
        for site, x, read, before in zip(stream.sites, reads, normed, columns_before, strict=True):
            changed, log_scale = _normed(x + changes @ before, site)
            uneven = (log_scale - constants[site.name]).square().mean()
            losses.append((changed - read).square().mean() + evenness * uneven)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            log_factors.clamp_(max=0.0)
    return log_factors.detach().exp()


def _tokens(vectors: Float[Tensor, "token neuron"]) -> Int[Tensor, " token"]:
    """The tokens with the longest massive vectors, and as many others, evenly spaced."""
    order = vectors.abs().amax(1).argsort(descending=True)
    half = min(TOKENS // 2, len(order))
    rest = order[half:].sort().values
    return torch.cat([order[:half], rest[:: max(1, len(rest) // max(1, half))][:half]])


def _normed(x: Float[Tensor, "token width"], site: NormSite) -> tuple[Tensor, Float[Tensor, "token 1"]]:
    """Output of the site's norm before its gain, x / s(x), and log s(x)."""
    x = centered(x, site.centered)
    log_scale = log_scale_of(x, site.eps)
    return x * torch.exp(-log_scale), log_scale
