"""Direct logit attribution, next to sums and to heads taken out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unnorm
from tests.analysis.models import BRIDGED, hooked_logits, logits, material_of, original_of
from tests.conftest import randomize
from tests.families import float64_copy
from unnorm.analysis import attribution
from unnorm.analysis.anatomy import anatomy
from unnorm.analysis.attribution import attribute, frozen_scale_error
from unnorm.errors import UnnormError
from unnorm.models.probe import trace_inputs
from unnorm.models.running import cast_as_loaded
from unnorm.sites.find import find_sites
from unnorm.sites.residual import parts_of, stream_writers


@pytest.mark.parametrize(
    "family",
    [*BRIDGED, "gpt_neox, sequential", "llama, tied, biased", "granite", "cohere, not in our list", "gemma2", "bloom"],
)
def test_contributions_in_the_twin_sum_to_the_logit(family: str, runs: dict[str, Path]) -> None:
    twin = float64_copy(unnorm.load(runs[family]))
    ids = trace_inputs(twin, 2, 16)
    found = attribute(twin, ids)
    handle = twin.get_output_embeddings().register_forward_hook(lambda _, args, out: kept.append(out))
    kept: list[torch.Tensor] = []
    logits(twin, ids)
    handle.remove()
    assert found.capped is (family == "gemma2")
    given = kept[0] if found.capped else logits(twin, ids)
    expected = given[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(found.contributions.sum(0), expected, rtol=0, atol=1e-10)
    assert torch.equal(found.logits, expected)
    assert torch.equal(found.direct_effects, found.contributions[:-1])
    kinds = [part.kind for part in found.parts]
    assert kinds.count("head") == 8 and kinds.count("mlp") == 2
    for part, contribution in zip(found.parts, found.contributions, strict=True):
        if part.kind == "mlp":
            torch.testing.assert_close(found.neurons[part.layer or 0].sum(-1), contribution)


@pytest.mark.parametrize("family", BRIDGED)
def test_frozen_scale_in_the_original_is_off_and_the_direct_effect_is_not(family: str, runs: dict[str, Path]) -> None:
    """The direct effect of each head, next to the logits with that head taken out of what the final norm reads."""
    original = float64_copy(original_of(runs[family]))
    parts = anatomy(original)
    ids = trace_inputs(original, 2, 16)
    found = attribute(original, ids)
    before = logits(original, ids)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    # RMSNorm classes compute in float32 whatever they are given.
    atol = 1e-8 if original.config.model_type in ("gpt2", "gpt_neox") else 1e-4
    torch.testing.assert_close(found.contributions.sum(0), before, rtol=0, atol=atol)
    writer = parts.attentions[1]
    z: list[torch.Tensor] = []
    hooked_logits(original, writer.name, lambda x: z.append(x) or x, ids)  # type: ignore[func-returns-value]
    for head in (0, 3):
        only = torch.zeros_like(z[0])
        size = z[0].shape[-1] // 4
        only[..., head * size : (head + 1) * size] = z[0][..., head * size : (head + 1) * size]
        module = original.get_submodule(writer.name)
        bias = 0 if module.bias is None else module.bias
        written = (module(only) - bias).detach()
        without = hooked_logits(original, parts.final, lambda x, written=written: x - written, ids)
        effect = before - without[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
        place = next(i for i, part in enumerate(found.parts) if part.layer == 1 and part.head == head)
        torch.testing.assert_close(found.direct_effects[place], effect, rtol=1e-6, atol=atol)
    errors = frozen_scale_error(found.contributions[:-1], found.direct_effects)
    heads = errors[[part.kind == "head" for part in found.parts[:-1]]]
    assert (heads > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "capped"), [("granite", False), ("gemma2", True)])
def test_a_factor_of_logits_is_no_soft_cap_in_half_precision(
    family: str, capped: bool, dtype: torch.dtype, runs: dict[str, Path]
) -> None:
    twin = cast_as_loaded(unnorm.load(runs[family]), dtype)
    for logits_scaling in (8, 6) if family == "granite" else (1,):
        twin.config.logits_scaling = logits_scaling
        assert attribute(twin, trace_inputs(twin, 2, 16)).capped is capped


def test_error_of_a_frozen_scale_is_a_share_of_the_direct_effect() -> None:
    contributions = torch.tensor([[3.0, -3.0], [0.5, 1.0], [0.0, 0.0]])
    direct_effects = torch.tensor([[2.0, -1.0], [0.5, 1.0], [0.0, 0.0]])
    assert frozen_scale_error(contributions, direct_effects).tolist() == [1.0, 0.0, 0.0]


def test_several_mlps_of_a_layer_are_told_apart() -> None:
    """Experts and a shared one beside them, as in GLM-4, DeepSeek and ERNIE."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip
    model = float64_copy(randomize(Glm4MoeForCausalLM(config)).eval())  # type: ignore[arg-type]
    found = attribute(model, trace_inputs(model, 2, 12))
    names = [part.name for part in found.parts]
    assert len(set(names)) == len(names)
    assert "mlp 0" in names and "model.layers.1.mlp.shared_experts.down_proj" in names
    # Its RMSNorms compute in float32 whatever they are given.
    torch.testing.assert_close(found.contributions.sum(0), found.logits, rtol=1e-5, atol=1e-6)
    assert list(found.neurons) == [0]
    torch.testing.assert_close(found.neurons[0].sum(-1), found.contributions[names.index("mlp 0")])


def test_attributions_do_not_depend_on_how_many_batches_there_are(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    one, several = (attribution.find(replace(material, batch_size=size)).numbers["twin"] for size in (3, 1))
    for key in ("mean_abs", "mean", "mean_abs_direct_effect"):
        found, expected = ([row[key] for row in numbers["parts"][:-1]] for numbers in (several, one))
        assert found == pytest.approx(expected, rel=1e-6)
    assert several["tokens"] == one["tokens"] == 3 * 19
    assert [row["mean_abs"] for row in several["neurons"]] == pytest.approx([r["mean_abs"] for r in one["neurons"]])


def test_a_head_is_named_by_its_layer_and_then_its_number(runs: dict[str, Path]) -> None:
    original = original_of(runs["gpt2"])
    writers, _ = stream_writers(original, find_sites(original))
    (second,) = (writer for writer in writers if (writer.kind, writer.layer) == ("attention", 1))
    assert [part.name for part in parts_of(original, second)][:4] == [f"head 1.{head}" for head in range(4)]


def test_a_twin_that_overflows_is_told_so(runs: dict[str, Path]) -> None:
    twin = unnorm.load(runs["gpt2"])
    with torch.no_grad():
        for layer in twin.transformer.h:
            layer.mlp.c_proj.weight *= 1e30
    with pytest.raises(UnnormError, match="overflows"):
        attribute(twin, trace_inputs(twin, 2, 16))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "olmo"])
def test_attribution_works_in_bfloat16(family: str, runs: dict[str, Path]) -> None:
    """In which transformers loads what was saved in it."""
    original = original_of(runs[family]).to(torch.bfloat16)
    ids = trace_inputs(original, 2, 16)
    found = attribute(original, ids)
    expected = logits(original, ids)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    error = (found.contributions.float().sum(0) - expected.float()).abs().max()
    assert error < 0.05 * logits(original, ids).abs().max()
