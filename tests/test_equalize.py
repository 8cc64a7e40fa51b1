"""Equalizing the embedding: kept where it brings naive removal closer, else undone to the last bit."""

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from unnorm.calibration.equalize import equalize_embedding, mean_kl, naive_kl, token_log_scales
from unnorm.calibration.scales import collect_log_scales, set_constants
from unnorm.models.running import copy_model
from unnorm.sites.find import find_sites
from unnorm.taper.stand_ins import install

BLOCKS = Dataset.from_dict(
    {"input_ids": torch.randint(300, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()}
)


def uneven(model: GPT2LMHeadModel, spread: float) -> GPT2LMHeadModel:
    """A copy whose token embeddings differ in length by `spread` in log scale, and whose positions are all zero."""
    model = copy_model(model)
    with torch.no_grad():
        rows = model.transformer.wte.weight
        rows /= (rows - rows.mean(1, keepdim=True)).std(1, keepdim=True, correction=0)
        rows *= torch.exp(spread * torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(0)))
        model.transformer.wpe.weight.zero_()
    return model


def test_mean_kl_is_per_token_and_from_the_original(tiny_model: GPT2LMHeadModel) -> None:
    student = copy_model(tiny_model)
    student.transformer.ln_f.weight.data *= 1.5
    with torch.no_grad():
        ids = torch.tensor(BLOCKS["input_ids"])
        q, p = (model(input_ids=ids).logits.log_softmax(-1) for model in (student, tiny_model))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert mean_kl(student, tiny_model, BLOCKS) == pytest.approx(expected, rel=1e-4)


def test_token_scales_are_those_of_the_first_norm(tiny_model: GPT2LMHeadModel) -> None:
    model = uneven(tiny_model, 0.5)
    rows = model.transformer.wte.weight
    expected = (rows - rows.mean(1, keepdim=True)).std(1, correction=0).log()
    measured = token_log_scales(model, find_sites(model)[0])
    torch.testing.assert_close(measured, expected.detach(), rtol=1e-4, atol=1e-4)


def test_token_log_scales_use_at_most_1024_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=3000, n_positions=2048, n_embd=8, n_layer=1, n_head=1)).eval()
    lengths = set()

    def measure(model: GPT2LMHeadModel, sites: object, blocks: Dataset, cut_short: bool) -> object:
        lengths.add(len(blocks[0]["input_ids"]))
        return collect_log_scales(model, sites, blocks, cut_short=cut_short)  # type: ignore[arg-type]

    monkeypatch.setattr("unnorm.calibration.equalize.collect_log_scales", measure)
    assert token_log_scales(model, find_sites(model)[0]).shape == (3000,)
    assert lengths == {1024}


def test_token_log_scales_stop_after_the_first_norm(tiny_model: GPT2LMHeadModel) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a pass over the whole vocabulary went past the first norm")

    model = uneven(tiny_model, 0.5)
    first = find_sites(model)[0]
    handle = model.transformer.h[0].attn.register_forward_pre_hook(fail)
    token_log_scales(model, first)
    handle.remove()
    assert len(collect_log_scales(model, find_sites(model), BLOCKS, 3)[first.name]) == len(BLOCKS)


def test_judged_by_the_first_norm_where_the_model_overflows(tiny_model: GPT2LMHeadModel) -> None:
    original = uneven(tiny_model, 0.7)
    student = copy_model(original)
    sites = find_sites(student)
    stand_ins = install(student, sites)
    set_constants(stand_ins, collect_log_scales(student, sites, BLOCKS), "geometric")
    removed_last = stand_ins[sites[-1].name]
    removed_last.register_forward_hook(lambda module, _, output: output * torch.inf if module.removed else output)
    assert naive_kl(student, original, stand_ins, BLOCKS) == torch.inf
    assert equalize_embedding(student, original, sites, stand_ins, BLOCKS, "geometric")


def test_tokens_go_half_way_to_the_constant_of_ordinary_tokens(tiny_model: GPT2LMHeadModel) -> None:
    original = uneven(tiny_model, 0.7)
    student = copy_model(original)
    sites = find_sites(student)
    stand_ins = install(student, sites)
    set_constants(stand_ins, collect_log_scales(student, sites, BLOCKS), "geometric")
    constants = stand_ins[sites[0].name].log_constant
    constants[1] += 3
    expected = (token_log_scales(student, sites[0]) + constants[0]) / 2
    assert equalize_embedding(student, original, sites, stand_ins, BLOCKS, "geometric")
    torch.testing.assert_close(token_log_scales(student, sites[0]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("spread", "kept"), [(0.7, True), (0.0, False)])
def test_kept_only_where_it_helps(tiny_model: GPT2LMHeadModel, spread: float, kept: bool) -> None:
    original = uneven(tiny_model, spread)
    student = copy_model(original)
    sites = find_sites(student)
    stand_ins = install(student, sites)
    set_constants(stand_ins, collect_log_scales(student, sites, BLOCKS), "geometric")
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    before = naive_kl(student, original, stand_ins, BLOCKS)

    assert equalize_embedding(student, original, sites, stand_ins, BLOCKS, "geometric") is kept
    after = naive_kl(student, original, stand_ins, BLOCKS)
    tied = student.lm_head.weight is student.transformer.wte.weight
    if kept:
        assert after < before
        assert not tied and not student.config.tie_word_embeddings
        torch.testing.assert_close(student.lm_head.weight, original.lm_head.weight)
        assert float(token_log_scales(student, sites[0]).std()) == pytest.approx(0.5 * spread, rel=0.1)
    else:
        assert after == before
        assert tied and student.config.tie_word_embeddings
        assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert original.config.tie_word_embeddings
    assert original.lm_head.weight is original.transformer.wte.weight
