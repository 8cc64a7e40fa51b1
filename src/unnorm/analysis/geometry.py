"""Weight geometry: how training and the fold changed each weight next to a former norm.

For a site with gain g and constant scale c, and a reader with weight W in the original and W' in the twin,

    original, gain included  M  = W diag(g) C       (reads the vector divided by its own scale)
    twin, times c            M' = c W'              (reads the residual vector divided by c)

so that without training M' = M (C removes the mean, for LayerNorm). Compared are the singular values of both, and the
effective gain of each residual feature j, i.e. how strongly it is read relative to the original's stored weight,

    original |M_j| / |W_j|         twin |M'_j| / |W_j|        (column norms)

For a norm that was folded into the layer before it (query/key norms), the mean of M's rows is removed and the rows are
multiplied by g, and M' has another factor c; if no other norm was folded into that layer, gains are of rows instead of
columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.analysis.figures import bundle, range_rows
from unnorm.analysis.material import Finding, Material
from unnorm.errors import UnnormError
from unnorm.models.linear import linear_weight
from unnorm.report.drawing import short_names
from unnorm.report.numbers import percent
from unnorm.sites.norm_behaviour import affine_parameters
from unnorm.sites.site import NormSite

SHOWN_VALUES = 48


@dataclass(frozen=True)
class Geometry:
    """One weight next to a former norm; see the module docstring for M, M' and gains.

    Attributes:
        sites: paths of the norms folded into the weight: the one it reads, the one that reads it, or both.
        weight: path of the layer.
        singular_values: of M, and of M', in descending order.
        gain: effective gain of each feature, for M and M'; NaN where the stored weight is zero.
        change: |M' - M| / |M|, in Frobenius norms; NaN where M is zero.
    """

    sites: tuple[str, ...]
    weight: str
    singular_values: Float[Tensor, "model rank"]
    gain: Float[Tensor, "model feature"]
    change: float


@torch.no_grad()
def geometry(
    original: PreTrainedModel, twin: PreTrainedModel, sites: Sequence[NormSite], constants: dict[str, float]
) -> list[Geometry]:
    """Compare every matrix that a norm was folded into, in float64 on the CPU; stacked experts are left out.

    Args:
        original: the model with norms.
        twin: its norm-free twin.
        sites: the former norm sites.
        constants: the constant scale of each site.
    """
    beside: dict[str, list[NormSite]] = {}
    for site in sites:
        for name in site.folded_into:
            beside.setdefault(name, []).append(site)
    rows = []
    for name, its_sites in beside.items():
        if getattr(getattr(twin.get_submodule(name), "weight", None), "ndim", 0) != 2:  # Stacked experts.
            continue
        stored, folded = (_weight(model.get_submodule(name)) for model in (original, twin))
        mapped = stored
        for site in its_sites:
            gain, bias = affine_parameters(original.get_submodule(site.name), site)
            mapped = _mapped(mapped, site, gain.cpu().double())
            if bias is not None and isinstance(twin.get_submodule(name), nn.Embedding):  # Its rows hold the norm's.
                folded = folded - bias.cpu().double()[:, None]
            folded = constants[site.name] * folded
        rows.append(_compare(its_sites, name, stored, mapped, folded))
    return rows


def find(material: Material) -> Finding:
    """The geometry of every weight that a norm was folded into."""
    found = geometry(material.original, material.twin, material.sites, material.constants)
    if not found:
        raise UnnormError("No norm of this model was folded into a weight, so there are no weights to compare.")
    rows = [_numbers(row) for row in found]
    changes = [row.change for row in found if math.isfinite(row.change)]
    change = sum(changes) / len(changes) if changes else math.nan
    return Finding(
        key="geometry",
        title="Weights with folded norms",
        text=(
            "Each weight next to a former norm: the original's with the norm's gain included, and the twin's times the "
            "constant scale. Without training the two are equal; any difference is due to training (of an embedding "
            "also to equalizing)."
        ),
        numbers={"weights": rows, "mean_change": {"twin": change}},
        figures={"geometry_singular": _singular_figure(found), "geometry_gain": _gain_figure(rows)},
        captions={
            "geometry_singular": "Singular values of each weight, largest first; hover for its name.",
            "geometry_gain": "Effective gain of the residual stream's features: median, with bars from the 5th to the "
            "95th percentile.",
        },
        legends={
            "geometry_singular": [
                ("original, gain included", "s", "line"),
                ("twin, times the constant scale", "a", "line"),
            ],
            "geometry_gain": [("original", "s", "range"), ("twin", "a", "range")],
        },
        headline=("Weight change", percent(change), f"relative to the weight's norm, mean over {len(changes)} weights"),
    )


def _weight(module: nn.Module) -> Float[Tensor, "out in"]:
    if isinstance(module, nn.Embedding):  # One row per token: features are its columns.
        return module.weight.T.cpu().double()
    return linear_weight(module).cpu().double()


def _mapped(weight: Tensor, site: NormSite, gain: Tensor) -> Tensor:
    """The weight with the norm's gain and centering applied."""
    if site.folds_into == "readers":
        weight = weight * gain
        return weight - weight.mean(1, keepdim=True) if site.centered else weight
    blocks = weight.view(-1, site.width, weight.shape[1])
    blocks = blocks - blocks.mean(1, keepdim=True) if site.centered else blocks
    return (blocks * gain.view(-1, site.width, 1)).view(weight.shape)  # Cohere has a separate gain for each head.


def _compare(sites: Sequence[NormSite], name: str, stored: Tensor, before: Tensor, now: Tensor) -> Geometry:
    axis = 0 if any(site.folds_into == "readers" for site in sites) else 1
    size = stored.norm(dim=axis)
    gains = torch.stack([before.norm(dim=axis), now.norm(dim=axis)]) / torch.where(size > 0, size, torch.nan)
    values = torch.stack([_singular_values(before), _singular_values(now)])
    size_before = float(before.norm())
    change = float((now - before).norm()) / size_before if size_before else math.nan
    return Geometry(tuple(site.name for site in sites), name, values, gains, change)


def _singular_values(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " rank"]:
    """Singular values, largest first, exact to 1e-8 of the largest: several times as fast as their decomposition."""
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _numbers(row: Geometry) -> dict[str, Any]:
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    gains = [torch.nanquantile(gain, levels).tolist() for gain in row.gain]
    sizes = row.singular_values.square().sum(1).sqrt().tolist()
    values: dict[str, Any] = {"sites": list(row.sites), "weight": row.weight, "change": row.change}
    for place, name in enumerate(("original", "twin")):
        largest = float(row.singular_values[place, 0])
        values[name] = {
            "frobenius_norm": sizes[place],
            "spectral_norm": largest,
            "stable_rank": sizes[place] ** 2 / largest**2 if largest else 0.0,
            "singular_values": _thinned(row.singular_values[place])[1],
            "gain": gains[place],
        }
    return values


def _thinned(values: Tensor) -> tuple[list[int], list[float]]:
    """At most `SHOWN_VALUES` of the values, denser among the largest, preceded by their ranks (from 1)."""
    if not len(values):  # Of a weight of zeros.
        return [], []
    ends = torch.logspace(0, 1, SHOWN_VALUES, base=float(len(values))).round().long().clamp(1, len(values))
    places = sorted(set(ends.tolist()))
    return places, [float(values[place - 1]) for place in places]


def _singular_figure(found: list[Geometry]) -> Figure:
    labels = short_names([row.weight for row in found])
    lines, places = [], []
    for place, name in enumerate(("original", "twin")):
        for row, label in zip(found, labels, strict=True):
            # A centered weight is rank-deficient: one singular value is zero up to rounding.
            of_rank = row.singular_values[place] > 1e-5 * row.singular_values[place, 0]
            at, values = _thinned(row.singular_values[place][of_rank])
            if not values:  # A weight of zeros.
                continue
            lines.append((name, f"{name}, {label}", 0.3, values))
            places.append([float(x) for x in at])
    return bundle(lines, "rank (log)", "singular value (log)", places=places)


def _gain_figure(rows: list[dict[str, Any]]) -> Figure:
    names = short_names([row["weight"] for row in rows])
    ranges: dict[str, list[list[float | None]]] = {
        name: [[*row[name]["gain"], None] for row in rows] for name in ("original", "twin")
    }
    return range_rows(names, ranges, "effective gain (log)")
