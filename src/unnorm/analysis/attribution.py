"""Direct logit attribution: what each head, MLP, neuron and bias adds to a logit, and how exact that is.

In a twin the logit of token t is x . w_t + b_t, where x, the final residual vector, is a sum of contributions. The
direct effect of a contribution c, i.e. how much the logit falls when c is removed from x, is therefore exactly c . w_t.
In a model with a final norm of gain g and scale s(x), with w'_t = C diag(g) w_t (C removes the mean, for LayerNorm),

    attribution, scale frozen        DLA(c) = c . w'_t / s(x)
    direct effect                    DE(c)  = x . w'_t / s(x) - (x - c) . w'_t / s(x - c)
    normalized mean absolute error   NMAE   = mean |DLA - DE| / mean |DE|, over tokens

(Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*, for attribution with the scale frozen; Baroni
et al. 2025, arXiv 2507.02559, for its error against the direct effect.)
"""

from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.analysis.anatomy import Anatomy, Readout, anatomy, readout
from unnorm.analysis.figures import dot_rows, heat_map
from unnorm.analysis.material import Finding, Material, Subject
from unnorm.errors import UnnormError
from unnorm.hooks import recorded
from unnorm.models.linear import linear_weight
from unnorm.models.running import in_evaluation_mode
from unnorm.models.sizes import check_fits
from unnorm.proof.blockwise import in_float64
from unnorm.report.numbers import percent, significant
from unnorm.sites.find import unembedding_name
from unnorm.sites.residual import Part, Writer, parts_of, split_output

TOP_NEURONS = 20
_ROUNDING, _ROUNDING_FLOAT32 = 1e-6, 1e-3
"""Most that contributions may miss the logit by, relative to the largest logit, in float64 and otherwise."""

_READ_LINEARLY = (
    "In the twin these sum to the logit, and each is what the logit loses when the part is removed. In the original "
    "the final norm intervenes:"
)
_BEFORE_SOFT_CAP = " Logits are taken before the model's soft cap."
_READ_THROUGH_NORMS = "The twin kept its final norm, which intervenes in both models:"


@dataclass(frozen=True)
class Attribution:
    """Contributions to the logit of one token at each position.

    Attributes:
        parts: parts of the residual stream; the last is the unembedding's bias, including what the final norm's bias
            adds.
        contributions: to the logit, with the final norm's scale frozen if there is one; they sum to `logits`.
        direct_effects: how much the logit falls when the part is removed from the final residual vector; undefined
            for the last part, so one row fewer.
        neurons: contributions of MLP neurons, by layer; they sum to the MLP's contribution (its bias is a
            separate part). Layers whose MLP is not one linear projection of neurons are left out.
        logits: the attributed logits: the model's own, before its soft cap if it has one.
        capped: whether the model has a soft cap.
    """

    parts: list[Part]
    contributions: Float[Tensor, "part batch position"]
    direct_effects: Float[Tensor, "part_less_one batch position"]
    neurons: dict[int, Float[Tensor, "batch position neuron"]]
    logits: Float[Tensor, "batch position"]
    capped: bool


@torch.no_grad()
@in_evaluation_mode
def attribute(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch position"],
    targets: Int[Tensor, "batch position"] | None = None,
    parts: Anatomy | None = None,
) -> Attribution:
    """Attribute a logit at each position to the parts of the residual stream, in the model's own dtype.

    The equations are in the module docstring. The logit is the model's, before any soft cap.

    Args:
        model: a twin, or a model with norms.
        ids: token ids.
        targets: the token whose logit is attributed, at each position; by default the next token, which leaves out
            the last position.
        parts: the model's anatomy, if it is known already.

    Raises:
        UnnormError: the residual stream is not a plain sum that the unembedding reads, or the sequences are longer
            than the model's context.
    """
    check_fits(model, ids.shape[1])
    parts = parts or anatomy(model)
    last = readout(model, parts)
    end = ids.shape[1] - (targets is None)
    targets = ids[:, 1:] if targets is None else targets
    unembedding = unembedding_name(model)
    with recorded(model, [*(writer.name for writer in parts.writers), parts.final, unembedding]) as record:
        logits = model(input_ids=ids, use_cache=False).logits
    logits = record[unembedding][1] if last.capped else logits
    x = record[parts.final][0].view(*ids.shape, -1)[:, :end]
    direction = last.directions[targets]
    named: list[Part] = []
    rows: list[tuple[Tensor, Tensor]] = []
    neurons: dict[int, Tensor] = {}
    mlps = Counter(writer.layer for writer in parts.mlps)
    for writer in parts.writers:
        z, output = (value.reshape(*ids.shape, -1)[:, :end] for value in _tensors(record[writer.name], ids))
        named += parts_of(model, writer)
        for vector in split_output(model, writer, z, output):
            rows.append(_effects(vector, x, direction, last))
        if writer.kind == "mlp" and writer.linear and mlps[writer.layer] == 1:
            neurons[int(writer.layer or 0)] = _neurons(model, writer, z, direction, last.scale(x))
    bias = last.biases[targets]
    return Attribution(
        parts=[*_told_apart(named), Part("unembedding's bias", "bias", parts.final, None)],
        contributions=torch.stack([*(dla for dla, _ in rows), bias]),
        direct_effects=torch.stack([de for _, de in rows]),
        neurons=neurons,
        logits=logits[:, :end].gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        capped=last.capped,
    )


def frozen_scale_error(
    contributions: Float[Tensor, "part *token"], direct_effects: Float[Tensor, "part *token"]
) -> Float[Tensor, " part"]:
    """NMAE of attributions relative to direct effects, over tokens, for each part.

    Of a part without any effect it is 0, or infinite if something was attributed to it.
    """
    miss = (contributions - direct_effects).abs().flatten(1).sum(1)
    return _share(miss, direct_effects.abs().flatten(1).sum(1))


def _share(miss: Float[Tensor, " part"], effect: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
    without = torch.where(miss > 0, torch.inf, 0.0).to(miss.dtype)
    return torch.where(effect > 0, miss / effect.clamp_min(torch.finfo(effect.dtype).tiny), without)


def find(material: Material) -> Finding:
    """Attribution in both models on the held-out text, in float64; as loaded where there is none (Apple GPUs)."""
    measured: dict[str, Any] = {}
    for subject in material.subjects:
        with nullcontext() if subject.model.device.type == "mps" else in_float64(subject.model):
            measured[subject.name] = _measure(subject, material)
    twin, original = measured["twin"], measured["original"]
    heads = original["error_of_heads"] is not None
    return Finding(
        key="attribution",
        title="Direct logit attribution",
        text=(
            "How much each head, MLP, embedding and bias adds to the logit of the next token. "
            f"{_READ_THROUGH_NORMS if material.keeps_final_norm else _READ_LINEARLY} attributions hold only while its "
            "scale is frozen. The map shows the mean absolute error relative to the mean absolute direct "
            "effect; 100% is an error as large as the effect."
            f"{_BEFORE_SOFT_CAP if twin['soft_capped'] else ''}"
        ),
        numbers=measured,
        figures={
            "attribution_error": _error_figure(original),
            "attribution_parts": _parts_figure(original, twin),
        },
        captions={
            "attribution_error": "Attribution error with the scale frozen, in the original"
            + ("." if heads else "; its heads can't be separated, so they share one column."),
            "attribution_parts": "Mean absolute contribution to the logit of the next token.",
        },
        legends={"attribution_parts": [("original", "s", "point"), ("twin", "a", "point")]},
        headline=(
            "Attribution error",
            " → ".join(percent(model["error_of_heads"] if heads else model["error"]) for model in (original, twin)),
            f"relative to the direct effect{', heads only' if heads else ''}; in the twin, sums match "
            f"logits to {significant(twin['sum_error'], 2)}",
        ),
    )


def _told_apart(parts: list[Part]) -> list[Part]:
    """Rename duplicates by module path, e.g. where a layer has several MLPs (experts and a shared expert)."""
    times = Counter(part.name for part in parts)
    return [replace(part, name=part.writer) if times[part.name] > 1 else part for part in parts]


def _tensors(pair: tuple[Tensor, Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    z, output = pair
    output = output[0] if isinstance(output, tuple) else output
    # Position embeddings are computed once for all sequences.
    if output.shape[0] == 1 and output.ndim == 3:
        output = output.expand(len(ids), -1, -1)
    return (z if z.is_floating_point() else output), output.reshape(*ids.shape, -1)


def _effects(
    vector: Float[Tensor, "..."], x: Float[Tensor, "batch position width"], direction: Tensor, last: Readout
) -> tuple[Float[Tensor, "batch position"], Float[Tensor, "batch position"]]:
    """DLA and DE of one part, given as one vector per token or one for all tokens."""
    scale = last.scale(x)
    frozen = (vector * direction).sum(-1) / scale
    if last.norm is None:
        return frozen, frozen
    without = x - vector
    return frozen, (x * direction).sum(-1) / scale - (without * direction).sum(-1) / last.scale(without)


def _neurons(
    model: PreTrainedModel, writer: Writer, z: Tensor, direction: Tensor, scale: Tensor
) -> Float[Tensor, "batch position neuron"]:
    read = direction @ linear_weight(model.get_submodule(writer.name)).to(direction.dtype)
    return writer.factor * z * read / scale.unsqueeze(-1)


def _measure(subject: Subject, material: Material) -> dict[str, Any]:
    """Sums over the text, batch by batch."""
    parts, tokens, sum_error, largest, capped = [], 0, 0.0, 0.0, False
    totals: dict[str, Any] = {}
    neurons: dict[int, Tensor] = {}
    for ids in material.batches(subject.model.device):
        found = attribute(subject.model, ids, parts=subject.anatomy)
        parts, effects, capped = found.parts, found.direct_effects, found.capped
        own = found.contributions[:-1]
        for name, value in {
            "size": found.contributions.abs(), "signed": found.contributions, "miss": (own - effects).abs(),
            "effect": effects.abs(),
        }.items():  # fmt: skip
            totals[name] = totals.get(name, 0) + value.sum((1, 2))
        for layer, value in found.neurons.items():
            neurons[layer] = neurons.get(layer, torch.zeros(())) + value.abs().sum((0, 1))
        sum_error = max(sum_error, float((found.contributions.sum(0) - found.logits).abs().max()))
        largest = max(largest, float(found.logits.abs().max()))
        tokens += found.logits.numel()
    if sum_error > (_ROUNDING if subject.model.dtype == torch.float64 else _ROUNDING_FLOAT32) * max(1.0, largest):
        raise UnnormError(
            f"In the {subject.name}, what the unembedding reads is more than a sum of its modules' outputs (positions "
            "that are not parameters, say, or a stream that is multiplied): contributions miss the logit by up to "
            f"{sum_error:.2g}."
        )
    return _numbers(subject.anatomy, parts, totals, neurons, tokens) | {
        "sum_error": sum_error,
        "largest_logit": largest,
        "soft_capped": capped,
        "tokens": tokens,
    }


def _numbers(
    shape: Anatomy, parts: list[Part], totals: dict[str, Tensor], neurons: dict[int, Tensor], tokens: int
) -> dict[str, Any]:
    miss, effect = totals["miss"], totals["effect"]
    error = [*_share(miss, effect).tolist(), None]
    direct = [*(effect / tokens).tolist(), None]
    size, signed = ((totals[key] / tokens).tolist() for key in ("size", "signed"))
    rows = [
        {"part": p.name, "kind": p.kind, "layer": p.layer, "head": p.head, "mean_abs": s, "mean": m}
        | {"mean_abs_direct_effect": d, "error": e}
        for p, s, m, d, e in zip(parts, size, signed, direct, error, strict=True)
    ]
    is_head = torch.tensor([part.kind == "head" for part in parts[:-1]])
    means = {layer: (sums / tokens).tolist() for layer, sums in neurons.items()}
    ranked = sorted(((value, layer, i) for layer, of in means.items() for i, value in enumerate(of)), reverse=True)
    return {
        "heads": shape.heads,
        "layers": len(shape.layers),
        "error": float(miss.sum() / effect.sum()),
        "error_of_heads": float(miss[is_head].sum() / effect[is_head].sum()) if bool(is_head.any()) else None,
        "parts": rows,
        "neurons": [
            {"layer": layer, "neuron": index, "mean_abs": value} for value, layer, index in ranked[:TOP_NEURONS]
        ],
        "neurons_unknown_in_layers": sorted({w.layer or 0 for w in shape.mlps} - neurons.keys()),
    }


def _error_figure(original: dict[str, Any]) -> Figure:
    heads = 1 + max((row["head"] for row in original["parts"] if row["head"] is not None), default=-1)
    columns = [f"head {head}" for head in range(heads)] or ["attention"]
    columns.append("MLP")
    cells: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in original["parts"]:
        if row["kind"] in ("head", "attention", "mlp"):
            cells[row["layer"], -1 if row["kind"] == "mlp" else row["head"] or 0].append(row)
    layers = 1 + max((layer for layer, _ in cells), default=-1)
    grid: list[list[float | None]] = [[None] * len(columns) for _ in range(layers)]
    for (layer, column), rows in cells.items():
        effect = sum(row["mean_abs_direct_effect"] for row in rows)
        missed = sum(row["error"] * row["mean_abs_direct_effect"] for row in rows if row["mean_abs_direct_effect"])
        nothing = 0.0 if all(row["error"] == 0 for row in rows) else None  # None: something attributed, without effect.
        grid[layer][column] = missed / effect if effect else nothing
    return heat_map(grid, columns, [f"layer {layer}" for layer in range(len(grid))], ".1%", "error")


def _parts_figure(original: dict[str, Any], twin: dict[str, Any]) -> Figure:
    names = [row["part"] for row in twin["parts"] if row["kind"] != "bias" or row["layer"] is None]
    of = {name: {row["part"]: row["mean_abs"] for row in rows} for name, rows in
          (("original", original["parts"]), ("twin", twin["parts"]))}  # fmt: skip
    values = {name: [of[name].get(part) for part in names] for name in of}
    return dot_rows(names, values, "mean absolute contribution, nats")
