"""Gradients clipped token by token, for models with massive activations."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM

from tests.families import IDS
from unnorm.training.token_clip import TOKEN_CLIP, clip_tokens, clipping_tokens


@given(st.integers(0, 2**16), st.integers(3, 12), st.floats(1.0, 1e6))
def test_a_token_that_stands_out_keeps_its_direction_and_loses_its_length(seed: int, tokens: int, times: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad = nn.functional.normalize(torch.randn(1, tokens, 5, dtype=torch.float64, generator=generator), dim=-1)
    loud = grad.clone()
    loud[0, 0] *= times
    clipped = clip_tokens(loud)
    torch.testing.assert_close(clipped[0, 1:], grad[0, 1:])
    torch.testing.assert_close(clipped[0, 0], min(times, TOKEN_CLIP) * grad[0, 0])


def test_nothing_is_clipped_where_most_tokens_have_no_gradient() -> None:
    grad = torch.zeros(2, 4, 3)
    grad[0, 0] = 7.0
    assert torch.equal(clip_tokens(grad), grad)


def test_gradients_that_are_not_finite_are_left_for_the_guard_to_see() -> None:
    grad = torch.ones(2, 4, 3)
    grad[1, 2] = torch.nan
    assert clip_tokens(grad).isnan().any()


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).double()


def test_while_tokens_are_clipped_the_model_computes_what_it_did_and_position_0_steers_less(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unnorm.training.token_clip.TOKEN_CLIP", 3.0)
    ids = torch.arange(16).view(2, 8)
    weight = model.transformer.h[0].mlp.c_fc.weight

    def passes(of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=ids).logits
        (gradient,) = torch.autograd.grad(of(logits), [weight])
        return logits, gradient

    def mostly_the_first(logits: Tensor) -> Tensor:
        return 1e4 * logits[:, 0].square().sum() + logits[:, 1:].square().sum()

    logits, drowned = passes(mostly_the_first)
    _, first_alone = passes(lambda logits: logits[:, 0].square().sum())
    with clipping_tokens(model, model.get_output_embeddings()):
        same_logits, heard = passes(mostly_the_first)
    assert torch.equal(logits, same_logits)
    likeness = [torch.cosine_similarity(g.flatten(), first_alone.flatten(), dim=0) for g in (drowned, heard)]
    assert likeness[0] > 0.999 and likeness[1] < 0.95
    # Afterwards nothing is clipped any more.
    assert torch.equal(passes(mostly_the_first)[1], drowned)


def test_layers_that_clamp_what_they_computed_in_place_are_clipped_too() -> None:
    """As OLMo does with `clip_qkv`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    olmo = OlmoForCausalLM(OlmoConfig(vocab_size=32, max_position_embeddings=16, clip_qkv=8.0, **sizes, **IDS))
    with clipping_tokens(olmo, olmo.get_output_embeddings()):
        olmo(input_ids=torch.arange(16).view(2, 8)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in olmo.parameters())
