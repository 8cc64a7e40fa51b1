"""Finding sites and folding them: exact for any GPT-2, refused when it would not be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from unnorm.errors import UnnormError
from unnorm.folding.fold import fold
from unnorm.modeling.modeling_unnorm import AffineMap
from unnorm.models.probe import trace_inputs
from unnorm.proof.at_load import prove_sites
from unnorm.sites.find import find_sites, norm_modules
from unnorm.sites.norm_behaviour import is_norm
from unnorm.taper.stand_ins import install, uninstall_paths


def random_gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(options.pop("seed", 0))
    defaults = {"vocab_size": 60, "n_positions": 32, "n_layer": 2, "n_embd": 24, "n_head": 3}
    config = GPT2Config(**{**defaults, **options}, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if ".ln_" in name and "weight" in name else 0.0, std=0.3)
    return model


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_embd": heads * draw(st.integers(2, 8)),
        "n_inner": draw(st.sampled_from([None, 7, 40])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "activation_function": draw(st.sampled_from(["gelu_new", "relu", "silu"])),
        "tie_word_embeddings": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@given(configs(), st.lists(st.floats(-2, 2), min_size=7, max_size=7))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fold_is_exact_for_random_architectures(options: dict[str, Any], log_constants: list[float]) -> None:
    model = random_gpt2(**options)
    sites = find_sites(model)
    assert len(sites) == 2 * options["n_layer"] + 1
    for stand_in, log_constant in zip(install(model, sites).values(), log_constants, strict=False):
        stand_in.log_constant.fill_(log_constant)
        stand_in.removed = True
    ids = trace_inputs(model, 2, 12)
    twin = fold(model, sites)
    expected = model(input_ids=ids).logits
    error = float((twin(input_ids=ids).logits - expected).detach().abs().max())
    assert error <= 1e-10 * max(1.0, float(expected.detach().abs().max()))
    assert norm_modules(twin) == []
    assert not any(isinstance(module, nn.LayerNorm) for module in twin.modules())


def test_sites_have_their_readers_and_writers() -> None:
    sites = {site.name: site for site in find_sites(random_gpt2())}
    assert list(sites) == [
        "transformer.h.0.ln_1",
        "transformer.h.0.ln_2",
        "transformer.h.1.ln_1",
        "transformer.h.1.ln_2",
        "transformer.ln_f",
    ]
    assert [site.role for site in sites.values()] == ["attention", "mlp", "attention", "mlp", "final"]
    assert sites["transformer.h.0.ln_2"].readers == ("transformer.h.0.mlp.c_fc",)
    assert sites["transformer.ln_f"].readers == ("lm_head",)
    assert sites["transformer.h.0.ln_2"].writers == (
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0.attn.c_proj",
    )
    assert {site.kind for site in sites.values()} == {"layernorm"}


def test_a_frozen_model_has_the_same_sites_and_stays_frozen() -> None:
    model = random_gpt2()
    sites = find_sites(model)
    model.requires_grad_(False)
    assert find_sites(model) == sites
    assert not any(parameter.requires_grad for parameter in model.parameters())


def with_weights(module: nn.Module, gain: float, bias: float) -> nn.Module:
    nn.init.constant_(module.weight, gain)
    with torch.no_grad():
        module.bias[0] = bias
    return module


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(16), True),
        (nn.RMSNorm(16), True),
        (nn.LayerNorm(16, elementwise_affine=False), True),
        (nn.LayerNorm(16, eps=1e12), False),
        (nn.Linear(16, 16), False),
        (nn.Tanh(), False),
        (nn.GELU(), False),
        (nn.Identity(), False),
        (nn.BatchNorm1d(16).eval(), False),
        (with_weights(nn.LayerNorm(16), gain=1e-3, bias=1.0), True),
        (with_weights(AffineMap(16, bias=True, centered=True), gain=0.03, bias=40.0), False),
    ],
)
def test_a_norm_is_what_ignores_the_scale_of_its_input(module: nn.Module, expected: bool) -> None:
    assert is_norm(module, 16) is expected


def test_stand_ins_leave_the_function_as_it_is() -> None:
    model = random_gpt2()
    ids = trace_inputs(model)
    before = model(input_ids=ids).logits
    install(model, find_sites(model), split_paths=True)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-12, atol=1e-12)


def test_paths_join_again() -> None:
    model = random_gpt2()
    sites = find_sites(model)
    stand_ins = install(model, sites, split_paths=True)
    assert [len(stand_in.alpha) for stand_in in stand_ins.values()] == [2, 1, 2, 1, 1]
    for stand_in in stand_ins.values():
        stand_in.removed = True
    ids = trace_inputs(model)
    before = model(input_ids=ids).logits
    uninstall_paths(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fold(model, sites)(input_ids=ids).logits, before, rtol=1e-10, atol=1e-10)


def test_proof_accepts_what_is_right() -> None:
    model = random_gpt2()
    assert prove_sites(model, find_sites(model)) < 1e-10


def test_proof_refuses_stand_ins_that_compute_something_else() -> None:
    model = random_gpt2()
    sites = [replace(site, eps=100 * site.eps) for site in find_sites(model)]
    with pytest.raises(UnnormError, match="reproduce its logits"):
        prove_sites(model, sites)


def test_proof_names_the_norm_with_a_reader_that_was_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: plain(self, x) + 0.1 * x.detach())
    model = random_gpt2()  # What takes no part in gradients is hidden from tracing.
    with pytest.raises(UnnormError, match=r"something besides transformer\.h\.0\.mlp\.c_fc"):
        prove_sites(model, find_sites(model))


def test_proof_names_where_a_norm_is_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: nn.functional.layer_norm(plain(self, x), x.shape[-1:]))
    model = random_gpt2()
    with pytest.raises(
        UnnormError, match=r"outside of its norm modules \(.*layer_norm runs in 'transformer\.h\.\d\.mlp"
    ):
        prove_sites(model, find_sites(model))
    sites = find_sites(model, keep="ln_f")  # Whoever leaves some norms leaves these, too.
    assert prove_sites(model, sites) < 1e-10


def test_proof_refuses_a_class_of_its_own() -> None:
    class Doubled(GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    Doubled.__name__ = "GPT2LMHeadModel"
    model = Doubled(random_gpt2().config).eval()
    with pytest.raises(UnnormError, match="computes something other"):
        prove_sites(model, find_sites(model))


def test_a_class_that_transformers_does_not_have_is_refused() -> None:
    class OwnModel(GPT2LMHeadModel):
        pass

    model = OwnModel(random_gpt2().config).eval()
    with pytest.raises(UnnormError, match="OwnModel is not a class of transformers"):
        prove_sites(model, find_sites(model))


def test_a_model_without_norms_is_refused() -> None:
    model = random_gpt2()
    sites = find_sites(model)
    for stand_in in install(model, sites).values():
        stand_in.removed = True
    with pytest.raises(UnnormError, match="no normalization layers"):
        find_sites(fold(model, sites))
