"""Entropy neurons: neurons of the last MLP that write long vectors but affect predictions only through the final norm.

A neuron with activation a and output weights w writes a * w into the residual stream. Its effect on the logits before
the norm's scale is proportional to W w, with W the unembedding including the final norm's gain. An entropy neuron has a
long w and a W w that is nearly the same for all tokens: it shifts no logit relative to another, but it lengthens the
residual vector and so makes the final norm flatten the distribution (Gurnee et al. 2024, arXiv 2401.12181; Stolfo et
al. 2024, *Confidence Regulation Neurons*, arXiv 2406.16254). As in those papers, they are the neurons with the lowest

    LogitVar(w) = Var over tokens t of  W_t . w / (|W_t| |w|)

among those with the longest w. A neuron is ablated by replacing its activation with its mean. Without a norm to act
through, it should have no effect (Baroni et al. 2025, arXiv 2507.02559).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.analysis.anatomy import Anatomy, Readout, anatomy, readout, token_losses
from unnorm.analysis.figures import dot_rows, scatter
from unnorm.analysis.material import Finding, Material
from unnorm.errors import UnnormError
from unnorm.hooks import recorded, replaced_inputs
from unnorm.models.linear import linear_weight
from unnorm.models.running import in_evaluation_mode
from unnorm.models.sizes import check_fits
from unnorm.report.numbers import significant
from unnorm.sites.residual import Writer

FOUND = 8
LONGEST_SHARE = 0.25
ABLATION_TOKENS = 2048
"""Number of tokens for ablations, rounded up to whole batches: each ablated neuron needs another forward pass."""


@dataclass(frozen=True)
class OutputWeights:
    """Statistics of the output weights of the last MLP's neurons.

    Attributes:
        norm: |w| of each neuron, without the mean of w where the final norm subtracts it.
        logit_variance: LogitVar(w), see the module docstring.
    """

    norm: Float[Tensor, " neuron"]
    logit_variance: Float[Tensor, " neuron"]

    def entropy_neurons(self) -> Int[Tensor, " found"]:
        """The neurons with the lowest LogitVar among the quarter with the longest w, lowest first."""
        longest = self.norm.topk(max(1, round(LONGEST_SHARE * len(self.norm)))).indices
        return longest[self.logit_variance[longest].argsort()][:FOUND]


@dataclass(frozen=True)
class Ablation:
    """Effects of mean-ablating neurons, at each predicted token.

    Attributes:
        entropy: change of the prediction's entropy (after minus before), in nats.
        loss: change of the loss, in nats.
        direct_entropy: as `entropy`, with the final norm's scale frozen at its value before the ablation; equal to
            `entropy` in a model without a final norm.
    """

    entropy: Float[Tensor, " token"]
    loss: Float[Tensor, " token"]
    direct_entropy: Float[Tensor, " token"]


@torch.no_grad()
@in_evaluation_mode
def output_weights(model: PreTrainedModel, parts: Anatomy | None = None) -> OutputWeights:
    """|w| and LogitVar of each neuron of the last MLP.

    Args:
        model: a twin, or a model with norms.
        parts: its parts, if known.

    Raises:
        UnnormError: the last MLP's output is not a linear projection of neurons, or the residual stream is not a plain
            sum that the unembedding reads.
    """
    parts = parts or anatomy(model)
    writer, last = _last_mlp(model, parts), readout(model, parts)
    written = writer.factor * linear_weight(model.get_submodule(writer.name))
    written = last.centered(written.T).T  # What LayerNorm takes away lengthens nothing that it divides by.
    norm = written.norm(dim=0)
    unit = written / norm.clamp_min(1e-12)
    tokens = last.directions / last.directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    # In chunks: all products of, say, 50,000 tokens and 3,000 neurons at once would exhaust the memory.
    variances = [(tokens @ some).var(0, correction=0) for some in unit.split(256, dim=1)]
    return OutputWeights(norm, torch.cat(variances))


@torch.no_grad()
@in_evaluation_mode
def ablate(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "batch position"]],
    sets: list[Int[Tensor, " neuron"]],
    parts: Anatomy | None = None,
) -> list[Ablation]:
    """Mean-ablate each set of neurons of the last MLP, one set at a time.

    Args:
        model: a twin, or a model with norms.
        batches: token ids, over which the means are taken and the effects measured.
        sets: indices of neurons of the last MLP.
        parts: the model's parts, if known.

    Returns:
        The effects of each set, at each predicted token of all batches.

    Raises:
        UnnormError: the last MLP's output is not a linear projection of neurons, the residual stream is not a plain
            sum that the unembedding reads, there is no batch, or one is longer than the model's context.
    """
    parts = parts or anatomy(model)
    writer = _last_mlp(model, parts)
    texts = list(batches)
    if not texts:
        raise UnnormError("There is no text to ablate neurons on: give at least one batch.")
    check_fits(model, max(ids.shape[1] for ids in texts))
    means = _mean_activations(model, writer, texts)

    def at_means(neurons: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            z[..., neurons] = means[neurons]
            return z

        return edit

    last = readout(model, parts)
    results: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in sets]
    for ids in texts:
        with recorded(model, [parts.final]) as record:
            entropy, loss = _entropy_and_loss(model, ids)
        scale = last.scale(record[parts.final][0])
        for found, neurons in zip(results, sets, strict=True):
            with replaced_inputs(model, {writer.name: at_means(neurons.to(ids.device))}):
                changed = _entropy_and_loss(model, ids)
                with _held_scale(model, parts, last, scale):
                    direct = changed if last.norm is None else _entropy_and_loss(model, ids)
            found.append((changed[0] - entropy, changed[1] - loss, direct[0] - entropy))
    return [Ablation(*(torch.cat(values) for values in zip(*found, strict=True))) for found in results]


def _mean_activations(model: PreTrainedModel, writer: Writer, texts: Iterable[Tensor]) -> Float[Tensor, " neuron"]:
    total, tokens = torch.zeros(()), 0
    for ids in texts:
        with recorded(model, [writer.name]) as record:
            model(input_ids=ids, use_cache=False)
        z = record[writer.name][0].flatten(0, -2)
        total, tokens = total.to(z) + z.sum(0), tokens + len(z)
    return total / tokens


def _measured(material: Material, weights: dict[str, OutputWeights], chosen: Int[Tensor, " found"]) -> dict[str, Any]:
    """Effects of the chosen neurons and of equally many random ones, alone and all together, in both models."""
    others = torch.randperm(len(weights["original"].norm), generator=torch.Generator().manual_seed(0))
    random = others[~torch.isin(others, chosen.cpu())][: len(chosen)]
    neurons = [*chosen.cpu(), *random]
    sets = [*(neuron.view(1) for neuron in neurons), chosen.cpu(), random]
    results = {
        subject.name: ablate(subject.model, _some(material.batches(subject.model.device)), sets, subject.anatomy)
        for subject in material.subjects
    }
    rows = [
        {"neuron": int(neuron), "kind": "entropy" if place < len(chosen) else "random"}
        | {name: _effect(results[name][place]) | _weight(weights[name], int(neuron)) for name in results}
        for place, neuron in enumerate(neurons)
    ]
    numbers: dict[str, Any] = {"neurons": rows}
    for name in results:
        numbers[name] = {"entropy_neurons": _effect(results[name][-2]), "random_neurons": _effect(results[name][-1])}
    return numbers


def find(material: Material) -> Finding:
    """The original's entropy neurons and equally many random neurons, ablated in the original and in the twin."""
    weights = {subject.name: output_weights(subject.model, subject.anatomy) for subject in material.subjects}
    chosen = weights["original"].entropy_neurons()
    numbers = _measured(material, weights, chosen)
    rows = numbers["neurons"]
    before, after = (numbers[n]["entropy_neurons"]["mean_abs_entropy_through_norm"] for n in ("original", "twin"))
    by_random = significant(numbers["original"]["random_neurons"]["mean_abs_entropy_through_norm"], 2)
    total = [significant(numbers[n]["entropy_neurons"]["mean_abs_entropy"], 2) for n in ("original", "twin")]
    return Finding(
        key="neurons",
        title="Entropy neurons",
        text=(
            "Neurons of the last MLP that write long vectors favouring no token can act only through the final norm: "
            "they make it divide by more, which flattens the prediction. The "
            f"{len(chosen)} clearest cases in the original, and as many random neurons for comparison, are set to "
            "their mean activation in both models. The part through the norm is the total effect minus the effect "
            "with the norm's scale held fixed."
        ),
        numbers=numbers,
        figures={
            "neurons_weights": _weights_figure(weights, chosen),
            "neurons_ablation": _ablation_figure(rows, "mean_abs_entropy"),
            "neurons_norm": _ablation_figure(rows, "mean_abs_entropy_through_norm"),
        },
        captions={
            "neurons_weights": "Each neuron of the last MLP: length of the vector it writes, and variance of its "
            "effect over logits. Large marks are the original's entropy neurons: long, with low variance.",
            "neurons_ablation": "Mean absolute change of the prediction's entropy when one neuron is ablated.",
            "neurons_norm": "The part of this change that goes through the final norm"
            + (", which the twin kept." if material.keeps_final_norm else "; none in the twin."),
        },
        legends={
            "neurons_weights": [("original", "s", "point"), ("twin", "a", "point")],
            "neurons_ablation": [("original", "s", "point"), ("twin", "a", "point")],
            "neurons_norm": [("original", "s", "point"), ("twin", "a", "point")][: 1 + material.keeps_final_norm],
        },
        headline=(
            "Entropy neurons' effect",
            f"{significant(before, 2)} → {significant(after, 2)}",
            "mean absolute change of entropy through the final norm when ablated, nats (random neurons in the "
            f"original {by_random}); total {total[0]} → {total[1]}",
        ),
    )


def _some(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    tokens = 0
    for ids in batches:
        yield ids
        tokens += ids.numel()
        if tokens >= ABLATION_TOKENS:
            return


def _last_mlp(model: PreTrainedModel, parts: Anatomy) -> Writer:
    writer = parts.mlps[-1]
    if not writer.linear or len(parts.mlps) != len(parts.layers):
        raise UnnormError(
            f"The neurons of {type(model).__name__} can't be separated: what its last MLP adds to the residual stream "
            "is not one linear projection of them (it has experts, or a norm follows it)."
        )
    return writer


@contextmanager
def _held_scale(model: PreTrainedModel, parts: Anatomy, last: Readout, scale: Tensor) -> Iterator[None]:
    """Make the final norm divide by the given scale instead of its input's."""

    def hold(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = getattr(norm, "bias", None)
        shift = 0 if bias is None else bias
        return (output - shift) * (last.scale(args[0]) / scale).unsqueeze(-1) + shift

    if last.norm is None:
        yield
        return
    with model.get_submodule(parts.final).register_forward_hook(hold):
        yield


def _entropy_and_loss(model: PreTrainedModel, ids: Tensor) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    log_p = logits[:, :-1].log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).flatten().cpu(), token_losses(logits, ids).flatten().cpu()


def _effect(found: Ablation) -> dict[str, float]:
    return {
        "mean_entropy": float(found.entropy.mean()),
        "mean_abs_entropy": float(found.entropy.abs().mean()),
        "mean_abs_entropy_through_norm": float((found.entropy - found.direct_entropy).abs().mean()),
        "mean_loss": float(found.loss.mean()),
        "mean_abs_loss": float(found.loss.abs().mean()),
    }


def _weight(weights: OutputWeights, neuron: int) -> dict[str, float]:
    return {"norm": float(weights.norm[neuron]), "logit_variance": float(weights.logit_variance[neuron])}


def _weights_figure(weights: dict[str, OutputWeights], chosen: Tensor) -> Figure:
    points, marked = {}, {}
    for name, of in weights.items():
        x, y = of.norm.tolist(), of.logit_variance.tolist()
        points[name] = (x, y, [f"neuron {i}" for i in range(len(x))])
        marked[name] = chosen.tolist()
    title = "variance of its effect on logits (log)"
    return scatter(points, "length of the output vector", title, log_y=True, marked=marked)


def _ablation_figure(rows: list[dict[str, Any]], effect: str) -> Figure:
    names = [f"{row['kind']} {row['neuron']}" for row in rows]
    values = {name: [row[name][effect] for row in rows] for name in ("original", "twin")}
    return dot_rows(names, values, "nats (log)", True)
