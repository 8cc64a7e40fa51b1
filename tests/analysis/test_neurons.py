"""Entropy neurons, by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unnorm
from tests.analysis.models import material_of, original_of
from unnorm.analysis import neurons
from unnorm.analysis.neurons import ablate, output_weights
from unnorm.models.probe import trace_inputs


def test_entropy_neurons_are_those_that_act_through_the_norm_alone(runs: dict[str, Path]) -> None:
    """One neuron made to write a long vector that no token's row of the unembedding reads."""
    original, twin = original_of(runs["gpt2"]), unnorm.load(runs["gpt2"])
    batches = list(trace_inputs(original, 4, 24).split(2))
    for model in (original, twin):
        with torch.no_grad():
            model.lm_head.weight[:, 5:7] = 0
            model.transformer.h[1].mlp.c_proj.weight[7] = 0
            model.transformer.h[1].mlp.c_proj.weight[7, 5:7] = torch.tensor([6.0, -6.0])
            # It must fire, and not always alike.
            model.transformer.h[1].mlp.c_fc.weight[:, 7] *= 3
    found = output_weights(original)
    assert int(found.entropy_neurons()[0]) == 7
    there, nowhere = (ablate(model, batches, [torch.tensor([7])])[0] for model in (original, twin))
    assert float(there.entropy.abs().mean()) > 1e-3 > 100 * float(nowhere.entropy.abs().mean())
    # With the scale held it does nothing in the original either.
    assert float(there.direct_entropy.abs().max()) < 1e-4
    assert float(nowhere.loss.abs().max()) < 1e-4


def test_what_the_final_norm_takes_away_makes_no_entropy_neuron(runs: dict[str, Path]) -> None:
    original = original_of(runs["gpt2"])
    with torch.no_grad():
        original.transformer.h[1].mlp.c_proj.weight[7] = 9.0  # The same in every direction, which LayerNorm subtracts.
    found = output_weights(original)
    assert float(found.norm[7]) < 1e-4 and 7 not in found.entropy_neurons().tolist()


def test_neurons_by_hand(runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    twin, bridge = unnorm.load(runs["gpt2"]), unnorm.to_transformer_lens(runs["gpt2"])
    written = twin.transformer.h[1].mlp.c_proj.weight.detach().numpy()
    read = twin.lm_head.weight.detach().numpy()
    cosines = (read / np.linalg.norm(read, axis=1, keepdims=True)) @ (
        written / np.linalg.norm(written, axis=1)[:, None]
    ).T
    found = output_weights(twin)
    np.testing.assert_allclose(found.norm.numpy(), np.linalg.norm(written, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.logit_variance.numpy(), cosines.var(axis=0), rtol=1e-3)
    ids = trace_inputs(twin, 2, 24)
    ablated = ablate(twin, [ids], [torch.tensor([3, 9])])[0]

    def means(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[..., [3, 9]] = value[..., [3, 9]].mean((0, 1))
        return value

    with torch.no_grad():
        before, after = bridge(ids), bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.mlp.hook_post", means)])
    entropies = [torch.distributions.Categorical(logits=x[:, :-1]).entropy().flatten() for x in (before, after)]
    torch.testing.assert_close(ablated.entropy, entropies[1] - entropies[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(ablated.entropy, ablated.direct_entropy)


def test_neurons_are_put_at_their_means_over_all_batches(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    one, several = (neurons.find(replace(material, batch_size=size)).numbers for size in (3, 1))
    for name in ("original", "twin"):
        assert several[name]["entropy_neurons"] == pytest.approx(one[name]["entropy_neurons"], rel=1e-2, abs=1e-5)


def test_the_found_neurons_are_the_originals_and_each_model_has_its_own_figures(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    with torch.no_grad():
        for weight in material.twin.transformer.h[1].mlp.c_proj.weight:
            weight *= 1.5
    numbers = neurons.find(material).numbers
    chosen = output_weights(material.original).entropy_neurons()
    found = [row["neuron"] for row in numbers["neurons"] if row["kind"] == "entropy"]
    assert found == chosen.tolist() and len({row["neuron"] for row in numbers["neurons"]}) == 2 * len(found)
    for name, model in material.models.items():
        weights = output_weights(model)
        (alone,) = ablate(model, material.batches("cpu"), [chosen[1:2]])
        (together,) = ablate(model, material.batches("cpu"), [chosen])
        row = numbers["neurons"][1][name]
        through_norm = (alone.entropy - alone.direct_entropy).abs().mean()
        assert row["norm"] == pytest.approx(float(weights.norm[chosen[1]]))
        assert row["logit_variance"] == pytest.approx(float(weights.logit_variance[chosen[1]]))
        assert row["mean_abs_entropy"] == pytest.approx(float(alone.entropy.abs().mean()))
        assert row["mean_abs_entropy_through_norm"] == pytest.approx(float(through_norm))
        assert row["mean_loss"] == pytest.approx(float(alone.loss.mean()))
        assert numbers[name]["entropy_neurons"]["mean_entropy"] == pytest.approx(float(together.entropy.mean()))
        assert numbers[name]["random_neurons"] != numbers[name]["entropy_neurons"]
    assert numbers["neurons"][1]["twin"]["norm"] != numbers["neurons"][1]["original"]["norm"]
