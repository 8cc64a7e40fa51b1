"""Scales at former norm sites, and what weights were changed by."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import unnorm
from tests.analysis.models import material_of
from unnorm.analysis.geometry import find as find_geometry
from unnorm.analysis.geometry import geometry
from unnorm.analysis.scales import find as find_scales
from unnorm.analysis.scales import log_scales


def test_scales_are_what_the_norms_divide_by(runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    material = material_of(runs["qwen3"])
    found = log_scales(material.models, material.sites, material.blocks)
    assert not any("q_norm" in name for name in found["twin"])
    ids = torch.tensor(material.blocks["input_ids"])
    bridge = unnorm.to_transformer_lens(runs["qwen3"])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        norm = material.original.model.layers[1].input_layernorm
        kept: list[torch.Tensor] = []
        handle = norm.register_forward_hook(lambda _, args, out: kept.append(args[0] * norm.weight / out))
        material.original(input_ids=ids)
        handle.remove()
    residual = cache["blocks.1.hook_resid_pre"]
    expected = (residual.square().mean(-1) + norm.variance_epsilon).sqrt().log()
    torch.testing.assert_close(found["twin"]["model.layers.1.input_layernorm"], expected, rtol=1e-4, atol=1e-4)
    divisors = kept[0].median(-1).values.log()
    torch.testing.assert_close(found["original"]["model.layers.1.input_layernorm"], divisors, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bloom", "cohere, query and key norms, not in our list"])
def test_geometry_without_training_changes_nothing(family: str, runs: dict[str, Path]) -> None:
    material = material_of(runs[family])
    rows = geometry(material.original, material.twin, material.sites, material.constants)
    assert max(row.change for row in rows) < 1e-5
    assert {row.weight for row in rows} >= {name for site in material.sites for name in site.readers}
    for row in rows:
        torch.testing.assert_close(row.singular_values[0], row.singular_values[1], rtol=1e-4, atol=1e-5)
    if family == "llama":
        row = next(row for row in rows if row.weight == "model.layers.1.mlp.up_proj")
        norm = material.original.model.layers[1].post_attention_layernorm.weight.detach()
        weight = material.original.model.layers[1].mlp.up_proj.weight.detach()
        torch.testing.assert_close(row.gain[0], norm.abs().double())
        values = np.linalg.svd((weight * norm).numpy(), compute_uv=False)
        np.testing.assert_allclose(row.singular_values[1].numpy(), values, rtol=1e-4)


def test_geometry_of_a_weight_of_zeros_is_all_zeros(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    for model in (material.original, material.twin):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight.zero_()
    found = find_geometry(material)
    rows = found.numbers["weights"]
    assert 0 <= found.numbers["mean_change"]["twin"] < 1e-5 and f"over {len(rows) - 1} weights" in found.headline[2]
    (row,) = (row for row in rows if row["weight"] == "transformer.h.1.mlp.c_fc")
    assert row["twin"]["stable_rank"] == 0 and set(row["twin"]["singular_values"]) == {0.0}


def test_scales_of_norms_that_are_maps_in_the_twin_are_there(runs: dict[str, Path]) -> None:
    material = material_of(runs["opt, post-norm"])
    found = find_scales(material)
    assert len(found.numbers["twin"]) == len(material.sites) and not found.numbers["sites_left_out"]
    left_out = find_scales(material_of(runs["qwen3"]))
    assert "are left out: model.layers.0.self_attn" in left_out.text


def test_geometry_sees_a_weight_that_was_trained(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    with torch.no_grad():
        material.twin.transformer.h[1].attn.c_attn.weight[3] *= 2
    rows = geometry(material.original, material.twin, material.sites, material.constants)
    changed = {row.weight: row for row in rows if row.change > 1e-4}
    assert list(changed) == ["transformer.h.1.attn.c_attn"]
    gain = changed["transformer.h.1.attn.c_attn"].gain
    assert float(gain[1, 3] / gain[0, 3]) == pytest.approx(2, rel=1e-4)


def test_stable_rank_is_of_squares(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    rows = geometry(material.original, material.twin, material.sites, material.constants)
    for row, numbers in zip(rows, find_geometry(material).numbers["weights"], strict=True):
        squares = row.singular_values[0].square()
        assert numbers["original"]["stable_rank"] == pytest.approx(float(squares.sum() / squares.max()))


def test_scales_are_drawn_over_the_geometric_mean_and_over_the_constant(runs: dict[str, Path]) -> None:
    """The twin's bars show how far its scales are from what was folded in, not from their own middle."""
    material = material_of(runs["gpt2"])
    site = next(iter(material.constants))
    moved = replace(material, constants=material.constants | {site: 7.0})
    finding = find_scales(moved)
    row = {name: finding.numbers[name][0] for name in ("original", "twin")}
    medians = [trace for trace in finding.figures["scales"].data if "median" in (trace.hovertemplate or "")]
    positions_0 = [trace for trace in finding.figures["scales"].data if "position 0" in (trace.hovertemplate or "")]
    for trace, name, one in zip(medians, row, (row["original"]["geometric_mean"], 7.0), strict=True):
        assert row[name]["site"] == site and trace.y[0] == pytest.approx(row[name]["quantiles"][2] / one)
    for trace, name, one in zip(positions_0, row, (row["original"]["geometric_mean"], 7.0), strict=True):
        assert trace.y[0] == pytest.approx(row[name]["position_0"] / one)
    values = log_scales(moved.models, moved.sites, moved.blocks)["twin"][site][:, 1:].double().exp().flatten().numpy()
    assert row["twin"]["quantiles"] == pytest.approx(np.quantile(values, [0.01, 0.05, 0.5, 0.95, 0.99]), rel=1e-6)
