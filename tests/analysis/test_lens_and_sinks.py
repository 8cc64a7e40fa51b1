"""What each depth says, and attention on position 0, next to TransformerLens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import unnorm
from tests.analysis.models import BRIDGED, material_of, original_of
from unnorm.analysis.attribution import attribute
from unnorm.analysis.lens import find as find_lens
from unnorm.analysis.lens import lens
from unnorm.analysis.sinks import Sinks, sinks
from unnorm.analysis.sinks import _numbers as sinks_numbers
from unnorm.analysis.sinks import find as find_sinks
from unnorm.models.probe import trace_inputs


@pytest.mark.parametrize("family", BRIDGED)
def test_attribution_sinks_and_lens_agree_with_transformer_lens(family: str, runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    twin, bridge = unnorm.load(runs[family]), unnorm.to_transformer_lens(runs[family])
    ids = trace_inputs(twin, 3, 20)
    with torch.no_grad():
        output, cache = bridge.run_with_cache(ids)
    unembed, bias = bridge.W_U, bridge.b_U
    attributed = attribute(twin, ids)
    target = unembed.T[ids[:, 1:]]
    for part, contribution in zip(attributed.parts, attributed.contributions, strict=True):
        if part.head is not None:
            block = bridge.blocks[part.layer]
            z = cache[f"blocks.{part.layer}.attn.hook_z"]
            z = z if z.ndim == 4 else z.unflatten(-1, (4, -1))
            written = z[:, :-1, part.head] @ block.attn.W_O[part.head]
            torch.testing.assert_close(contribution, (written * target).sum(-1), rtol=1e-4, atol=1e-4)
    found = sinks(twin, ids)
    read = lens(twin, ids)
    log_p = output[:, :-1].log_softmax(-1)
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        share = pattern[:, :, 1:, 0].mean(-1)
        torch.testing.assert_close(found.share[:, layer], share, rtol=1e-4, atol=1e-5)
        residual = cache[f"blocks.{layer}.hook_resid_pre"]
        torch.testing.assert_close(found.norm[:, layer], residual.norm(dim=-1), rtol=1e-4, atol=1e-4)
        said = residual @ unembed + bias
        log_q = said[:, :-1].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(read.kl[layer], kl, rtol=1e-3, atol=1e-3)
        loss = -log_q.gather(2, ids[:, 1:, None]).squeeze(2)
        torch.testing.assert_close(read.loss[layer], loss, rtol=1e-3, atol=1e-3)
        assert torch.equal(read.agrees[layer].bool(), log_q.argmax(-1) == log_p.argmax(-1))
    assert float(read.kl[-1].abs().max()) < 1e-4 and bool(read.agrees[-1].all())


def test_predictions_form_where_the_lens_agrees_from_then_on(runs: dict[str, Path]) -> None:
    read = lens(unnorm.load(runs["gpt2"]), trace_inputs(unnorm.load(runs["gpt2"]), 2, 20))
    for at, agrees in zip(read.forms_at.flatten().tolist(), read.agrees.flatten(1).T.tolist(), strict=True):
        assert all(agrees[at:]) and (at == 0 or not agrees[at - 1])


def test_lens_of_the_original_is_its_norm_and_unembedding_on_each_layer(runs: dict[str, Path]) -> None:
    original = original_of(runs["gpt2"])
    ids = trace_inputs(original, 2, 20)
    read = lens(original, ids)
    with torch.no_grad():
        hidden = original(input_ids=ids, output_hidden_states=True).hidden_states
        said = original.lm_head(original.transformer.ln_f(hidden[1]))
    loss = F.cross_entropy(said[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(read.loss[1], loss, rtol=1e-4, atol=1e-4)


def test_a_sink_is_a_head_that_attends_to_position_0(runs: dict[str, Path]) -> None:
    """Queries and keys that favour position 0 alone, by its position embedding."""
    twin = unnorm.load(runs["gpt2"])
    ids = trace_inputs(twin, 3, 20)
    with torch.no_grad():
        attention = twin.transformer.h[0].attn.c_attn
        attention.weight[:, :64] = 0
        attention.bias[:64] = 0
        attention.bias[:8] = 1.0  # head 0 asks for feature 0, whatever the token
        twin.transformer.wpe.weight[:] = 0
        twin.transformer.wpe.weight[0, 0] = 1000.0
        attention.weight[0, 32:40] = 1.0
    found = sinks(twin, ids)
    assert float(found.share[:, 0, 0].min()) > 0.99 and found.rate[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert float((found.norm[:, 0, 0] / found.norm[:, 0, 1:].mean(1)).min()) > 100


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_of_the_lens_are_means_over_all_predictions(batch_size: int, runs: dict[str, Path]) -> None:
    material = replace(material_of(runs["gpt2"]), batch_size=batch_size)
    numbers = find_lens(material).numbers
    ids = torch.tensor(material.blocks["input_ids"])
    for name, model in material.models.items():
        read = lens(model, ids)
        assert numbers[name]["tokens"] == 3 * 19
        assert numbers[name]["loss"] == pytest.approx(read.loss.flatten(1).mean(1).tolist(), rel=1e-5)
        assert numbers[name]["kl"] == pytest.approx(read.kl.flatten(1).mean(1).tolist(), rel=1e-4, abs=1e-6)
        assert numbers[name]["mean_forms_at"] == pytest.approx(read.forms_at.double().mean().item())
        assert numbers[name]["forms_at"] == pytest.approx(
            [(read.forms_at == d).float().mean().item() for d in range(3)]
        )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_of_sinks_tell_position_0_from_the_rest(batch_size: int, runs: dict[str, Path]) -> None:
    material = replace(material_of(runs["gpt2"]), batch_size=batch_size)
    with torch.no_grad():
        material.twin.transformer.wpe.weight[0] *= 30
    numbers = find_sinks(material).numbers
    ids = torch.tensor(material.blocks["input_ids"])
    for name, model in material.models.items():
        with torch.no_grad():
            kept = model(input_ids=ids, output_hidden_states=True).hidden_states[:2]  # the last is the norm's output
        for depth, norms in enumerate(states.norm(dim=-1).mean(0) for states in kept):
            assert numbers[name]["norm_at_0"][depth] == pytest.approx(norms[0].item(), rel=1e-4)
            assert numbers[name]["norm_elsewhere"][depth] == pytest.approx(norms[1:].mean().item(), rel=1e-4)
    assert numbers["twin"]["norm_at_0"][0] > 5 * numbers["twin"]["norm_elsewhere"][0]
    expected = max((of.max() / of.median()).item() for of in sinks(material.twin, ids).norm.unbind(1))
    assert numbers["twin"]["longest_over_median"] == pytest.approx(expected)


def test_a_long_vector_counts_wherever_it_stands() -> None:
    norm = torch.ones(16, 2, 32)  # sequence, depth, position
    norm[torch.arange(16), 1, torch.arange(16)] = 100.0
    found = Sinks(torch.zeros(16, 2, 4), norm)
    assert sinks_numbers(found)["longest_over_median"] == 100.0
