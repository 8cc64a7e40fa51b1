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

Where a norm follows the MLP (Gemma, OLMo 2), with gain g and input y = sum_j a_j w_j, the stream changes by

    g (y'/s(y') - y/s(y)),    y' = y + sum_j (f_j - 1) a_j w_j

instead. That norm undoes any factor while one neuron is most of y, so the search for these starts at small factors.
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
from unnorm.sites.residual import mlp_projections, stream_writers
from unnorm.sites.site import NormSite
from unnorm.taper.norms import Estimator, TaperedNorm

MASSIVE = 10.0
"""A neuron is massive if it adds a vector over this many times as long as the stream usually is at the next site."""
MASSIVE_NORMED = 2.0
"""The same where a norm follows the MLP, which bounds what a layer adds: the massive vector then grows layer by layer
(in Gemma 3 270M by seven neurons, which add 2.5 to 23 times the usual scale)."""
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
FIRST_FACTOR_NORMED = 0.05
"""Where the search for the factors of neurons before a norm starts; it starts at 1 for others."""


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
    stream = _record(original, sites, stand_ins, blocks)
    constants = {site.name: float(stand_ins[site.name].log_constant[0]) for site in stream.sites}
    neurons = _massive_neurons(stream, constants)
    if not neurons:
        return []
    columns = [linear_weight(student.get_submodule(neuron.writer)).data[:, neuron.index] for neuron in neurons]
    unscaled = [column.clone() for column in columns]
    for evenness in EVENNESS:
        factors = _fit_factors(stream, neurons, constants, evenness)
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
class _Write:
    """What one MLP adds to the stream, in one pass over a little text.

    Attributes:
        name: path of the module whose output is added: the MLP's output projection, or the norm that follows it.
        projection: path of the projection.
        weight: its weight.
        activations: its inputs, in float32.
        factor: what is multiplied with before adding: that of the residual connection, times the norm's gain.
        norm: the norm that follows, if any.
        output: what that norm reads, in float32.
    """

    name: str
    projection: str
    weight: Float[Tensor, "width neuron"]
    activations: Float[Tensor, "token neuron"]
    factor: Float[Tensor, " width"]
    norm: NormSite | None
    output: Float[Tensor, "token width"] | None

    def lengths(self, which: Sequence[int] | slice = slice(None)) -> Float[Tensor, "token neuron"]:
        """How long a vector each of some neurons adds for each token: the root of its mean square."""
        columns = self.weight[:, which].float() * self.factor[:, None]
        lengths = self.activations[:, which].abs() * columns.square().mean(0).sqrt()
        if self.norm is None or self.output is None:
            return lengths
        return lengths / _normed(self.output, self.norm)[1].exp()

    def change(
        self, tokens: Int[Tensor, " token"], which: Sequence[int], factors: Float[Tensor, " neuron"]
    ) -> Float[Tensor, "token width"]:
        """How what is added changes with some neurons' columns multiplied by factors."""
        change = (self.activations[tokens][:, which] * (factors - 1)) @ self.weight[:, which].float().T
        if self.norm is None or self.output is None:
            return change * self.factor
        y = self.output[tokens]
        return (_normed(y + change, self.norm)[0] - _normed(y, self.norm)[0]) * self.factor


@dataclass(frozen=True)
class _Stream:
    """One pass over a little text: what each site reads from the residual stream, and what each MLP adds to it.

    Attributes:
        sites: those that read the stream, in the order of a forward pass.
        before: by site, the modules whose outputs add up to what it reads.
        reads: by site, (token, width), in float32.
        writes: of the MLPs, in order.
    """

    sites: list[NormSite]
    before: dict[str, set[str]]
    reads: dict[str, Float[Tensor, "token width"]]
    writes: list[_Write]


@torch.no_grad()
def _record(
    model: PreTrainedModel, sites: Sequence[NormSite], stand_ins: dict[str, TaperedNorm], blocks: Dataset
) -> _Stream:
    writers, before = stream_writers(model, sites)
    of_mlps = mlp_projections(model, sites, writers)
    reading = [site for site in sites if site.name in before]
    ids = torch.tensor(blocks["input_ids"], device=model.device)[:, :POSITIONS]
    names = {*(site.name for site in reading), *of_mlps, *(projection.name for projection, _ in of_mlps.values())}
    with recorded(model, list(names), copies=True) as record, evaluating(model):
        model(input_ids=ids, use_cache=False)
    given = {name: value.flatten(0, -2).float() for name, (value, _) in record.items()}
    writes = []
    for name, (projection, norm) in of_mlps.items():
        weight = linear_weight(model.get_submodule(projection.name)).detach()
        gain = weight.new_ones(len(weight)) if norm is None else stand_ins[norm.name].gain.detach()
        output = None if norm is None else given[norm.name]
        factor = projection.factor * gain.float()
        writes.append(_Write(name, projection.name, weight, given[projection.name], factor, norm, output))
    return _Stream(reading, before, {site.name: given[site.name] for site in reading}, writes)


def _massive_neurons(stream: _Stream, constants: dict[str, float]) -> list[Neuron]:
    """Neurons that add a vector more than `MASSIVE` or `MASSIVE_NORMED` times as long as usual, longest first."""
    found = []
    for write in stream.writes:
        site = next((site for site in stream.sites if write.name in stream.before[site.name]), None)
        if site is None:
            continue
        lengths = write.lengths().amax(0) / math.exp(constants[site.name])
        massive = lengths > (MASSIVE if write.norm is None else MASSIVE_NORMED)
        found += [Neuron(write.projection, int(i), float(lengths[i])) for i in massive.nonzero()[:, 0]]
    return sorted(found, key=lambda neuron: -neuron.length)[:MOST_NEURONS]


def _fit_factors(
    stream: _Stream, neurons: Sequence[Neuron], constants: dict[str, float], evenness: float
) -> Float[Tensor, " neuron"]:
    """The factors that minimize the objective at the top of this file."""
    writes = {write.projection: write for write in stream.writes}
    lengths = torch.cat([writes[neuron.writer].lengths([neuron.index]) for neuron in neurons], dim=1)
    tokens = _tokens(lengths)
    reads = [stream.reads[site.name][tokens] for site in stream.sites]
    normed = [_normed(x, site)[0] for x, site in zip(reads, stream.sites, strict=True)]
    of_writes = [(write, [k for k, n in enumerate(neurons) if n.writer == name]) for name, write in writes.items()]
    first = [1.0 if writes[neuron.writer].norm is None else FIRST_FACTOR_NORMED for neuron in neurons]
    log_factors = torch.tensor(first, device=lengths.device).log().requires_grad_(True)
    optimizer = torch.optim.Adam([log_factors], lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        changes = {
            write.name: write.change(tokens, [neurons[k].index for k in ks], log_factors[ks].exp())
            for write, ks in of_writes
            if ks
        }
        losses = []
        for site, x, read in zip(stream.sites, reads, normed, strict=True):
            before = [change for name, change in changes.items() if name in stream.before[site.name]]
            changed, log_scale = _normed(torch.stack([x, *before]).sum(0), site)
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
