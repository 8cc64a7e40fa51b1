"""Attention sinks: how much each head attends to position 0, and how long residual vectors are there.

With A the attention weights of a head on a sequence of T tokens, the head's share of attention on position 0 is

    alpha = mean over queries i = 1 … T - 1 of A[i, 0]

(query 0 can attend to nothing else). A head is a sink in a sequence if alpha > 0.3, and its sink rate is the share of
sequences in which it is one; the mean over heads is the sink rate of Gu et al. 2024 (arXiv 2410.10781, which also
counts query 0). Sinks go together with residual vectors at position 0 that are tens of times longer than the rest (Sun
et al. 2024, *Massive Activations*, arXiv 2402.17762).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.analysis.anatomy import Anatomy, anatomy, attention_patterns, residual_stream
from unnorm.analysis.figures import bundle, heat_maps
from unnorm.analysis.material import Finding, Material
from unnorm.models.running import in_evaluation_mode
from unnorm.models.sizes import check_fits
from unnorm.report.drawing import bin_positions
from unnorm.report.numbers import percent, significant

THRESHOLD = 0.3


@dataclass(frozen=True)
class Sinks:
    """Attention on position 0, and the length of residual vectors.

    Attributes:
        share: each head's share of attention on position 0, by sequence.
        norm: L2 norm of the input of each layer and, as the last depth, of the final norm.
    """

    share: Float[Tensor, "sequence layer head"]
    norm: Float[Tensor, "sequence depth position"]

    @property
    def rate(self) -> Float[Tensor, "layer head"]:
        """Share of sequences in which the head's attention share on position 0 exceeds the threshold."""
        return (self.share > THRESHOLD).to(self.share.dtype).mean(0)


@in_evaluation_mode
def sinks(model: PreTrainedModel, ids: Int[Tensor, "batch position"], parts: Anatomy | None = None) -> Sinks:
    """Measure attention sinks on a batch of sequences of at least 2 tokens.

    `parts` is the model's anatomy, if it is known already.

    Raises:
        UnnormError: the family does not return attention weights, its residual stream is not a plain sum, or the
            sequences are longer than the model's context.
    """
    check_fits(model, ids.shape[1])
    parts = parts or anatomy(model)
    share = attention_patterns(model, parts, ids)[..., 1:, 0].mean(-1)
    stream, _ = residual_stream(model, parts, ids)
    return Sinks(share.permute(1, 0, 2).float().cpu(), stream.float().norm(dim=-1).permute(1, 0, 2).cpu())


def find(material: Material) -> Finding:
    """Sinks in both models on the held-out text."""
    measured = {}
    for subject in material.subjects:
        name, model = subject.name, subject.model
        found = [sinks(model, ids, subject.anatomy) for ids in material.batches(model.device)]
        measured[name] = Sinks(*(torch.cat([getattr(one, key) for one in found]) for key in ("share", "norm")))
    numbers = {name: _numbers(value) for name, value in measured.items()}
    before, after = (float(measured[name].rate.mean()) for name in ("original", "twin"))
    longest = [significant(numbers[name]["longest_over_median"], 2) for name in ("original", "twin")]
    return Finding(
        key="sinks",
        title="Attention sinks",
        text=(
            "The share of a head's attention that goes to position 0, and the length of residual vectors by position. "
            f"A head is a sink in a sequence if that share is above {THRESHOLD}; its sink rate is "
            "the share of such sequences."
        ),
        numbers=numbers | {"threshold": THRESHOLD},
        figures={"sinks_share": _share_figure(measured), "sinks_norm": _norm_figure(measured)},
        captions={
            "sinks_share": "Mean share of attention on position 0, by layer and head.",
            "sinks_norm": "Mean length of the residual vector that each layer reads, by position (within a model "
            "the later, the thicker, up to what the final norm reads; the original's lines are wider).",
        },
        legends={"sinks_norm": [("original", "s", "line"), ("twin", "a", "line")]},
        headline=(
            "Sink rate",
            f"{percent(before)} → {percent(after)}",
            f"mean over heads; longest residual vector / median {longest[0]} → {longest[1]}",
        ),
    )


def _numbers(found: Sinks) -> dict[str, Any]:
    norms = found.norm.mean(0)
    by_depth = found.norm.transpose(0, 1).flatten(1)  # A long one may stand elsewhere in each sequence.
    return {
        "sink_rate": found.rate.tolist(),
        "mean_sink_rate": float(found.rate.mean()),
        "share": found.share.mean(0).tolist(),
        "mean_share": float(found.share.mean()),
        "norm_at_0": norms[:, 0].tolist(),
        "norm_elsewhere": norms[:, 1:].mean(1).tolist(),
        "longest_over_median": float((by_depth.amax(1) / by_depth.median(1).values).max()),
        "sequences": len(found.share),
    }


def _share_figure(measured: dict[str, Sinks]) -> Figure:
    grids = {name: found.share.mean(0).tolist() for name, found in measured.items()}
    layers, heads = len(grids["twin"]), len(grids["twin"][0])
    return heat_maps(
        grids, [f"head {head}" for head in range(heads)], [f"layer {layer}" for layer in range(layers)], ".1%", "share"
    )


def _norm_figure(measured: dict[str, Sinks]) -> Figure:
    lines, places = [], []
    for name, found in measured.items():
        norms = found.norm.mean(0)
        for depth, lengths in enumerate(norms.tolist()):
            label = f"{name}, " + (f"layer {depth}" if depth + 1 < len(norms) else "final")
            at, values = bin_positions(lengths)
            lines.append((name, label, depth / max(1, len(norms) - 1), values))
            places.append(at)
    return bundle(lines, "position, from 1 (log)", "length of the residual vector (log)", places=places)
