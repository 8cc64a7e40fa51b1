"""Scale spread: how much the divisor of each former norm site varies over tokens, in the original and in the twin.

The scale of a token is sqrt(var + eps) (LayerNorm) or sqrt(mean(x^2) + eps) (RMSNorm) of what the site reads. The
spread is the standard deviation of its log over tokens after position 0; a spread of 0 would mean that the norm was
affine to begin with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.analysis.figures import range_rows
from unnorm.analysis.material import Finding, Material
from unnorm.calibration.scales import collect_log_scales, scale_statistics
from unnorm.errors import UnnormError, first_few
from unnorm.report.drawing import short_names
from unnorm.report.numbers import fixed
from unnorm.sites.site import NormSite

QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)


def log_scales(
    models: Mapping[str, PreTrainedModel], sites: Sequence[NormSite], blocks: Dataset, batch_size: int = 4
) -> dict[str, dict[str, Float[Tensor, "block position"]]]:
    """Log scale of every token at every site whose input is the twin's too, by model.

    Where a norm was folded into the layer before it (query/key norms), the map is already applied to what the twin's
    site reads, so the norm's scale is no longer defined there.

    Args:
        models: the original and its twin, by name.
        sites: the former norm sites, as `load_sites` reads them.
        blocks: rows of `input_ids`, all of the same length.
        batch_size: blocks in one forward pass.

    Raises:
        UnnormError: all norms were folded into the layers before them.
    """
    sites = [site for site in sites if site.folds_into != "writer"]
    if not sites:
        raise UnnormError("All norms of this model were folded into the layers before them, so the twin has no scales.")
    return {name: collect_log_scales(model, sites, blocks, batch_size) for name, model in models.items()}


def find(material: Material) -> Finding:
    """The spread of each site's scale in both models on the held-out text."""
    found = log_scales(material.models, material.sites, material.blocks, material.batch_size)
    numbers = {name: _numbers(of_model, material.constants) for name, of_model in found.items()}
    left_out = [site.name for site in material.sites if site.folds_into == "writer"]
    means = {name: sum(row["spread"] for row in rows) / len(rows) for name, rows in numbers.items()}
    return Finding(
        key="scales",
        title="Scale of each former norm site",
        text=(
            "What each norm divides a token by in the original, or would in the twin, relative to one reference scale: "
            "in the original the geometric mean, in the twin the folded constant. The narrower the bars, the less "
            "dividing by a constant changes."
            + (
                f" Norms that were folded into the layer before them are left out: {first_few(left_out)}."
                if left_out
                else ""
            )
        ),
        numbers=numbers | {"mean_spread": means, "sites_left_out": left_out},
        figures={"scales": _figure(numbers)},
        captions={
            "scales": "Scale relative to that reference, tokens after position 0: median, with bars from the 5th to "
            "the 95th percentile; diamonds are the mean at position 0."
        },
        legends={"scales": [("original", "s", "range"), ("twin", "a", "range"), ("position 0", "s", "diamond")]},
        headline=(
            "Scale spread",
            f"{fixed(means['original'], 3)} → {fixed(means['twin'], 3)}",
            f"std of log scale, mean over {len(numbers['twin'])} sites",
        ),
    )


def _numbers(of_model: dict[str, Tensor], constants: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for row in scale_statistics(of_model):
        values = of_model[row.site][:, 1:].flatten().double().exp()
        # torch.quantile accepts a limited number of values, so they are subsampled.
        quantiles = torch.quantile(values[:: 1 + len(values) // 2**23], torch.tensor(QUANTILES, dtype=torch.float64))
        rows.append(row.to_json() | {"constant": constants[row.site], "quantiles": quantiles.tolist()})
    return rows


def _figure(numbers: dict[str, list[dict[str, Any]]]) -> Figure:
    names = short_names([row["site"] for row in numbers["twin"]])
    ranges = {}
    for name, rows in numbers.items():
        ones = [row["geometric_mean"] if name == "original" else row["constant"] for row in rows]
        values = [(*row["quantiles"][1:4], row["position_0"]) for row in rows]
        ranges[name] = [[value / one for value in some] for some, one in zip(values, ones, strict=True)]
    return range_rows(names, ranges, "relative scale (log)", at=1.0)
