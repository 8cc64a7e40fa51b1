"""Analyses of a twin beside its original, each next to an independent computation on the same model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import Cli, randomize, with_other_tokens
from unnorm.analysis import attribution, neurons
from unnorm.analysis.anatomy import anatomy
from unnorm.analysis.attribution import attribute, frozen_scale_error
from unnorm.analysis.geometry import find as find_geometry
from unnorm.analysis.geometry import geometry
from unnorm.analysis.lens import lens
from unnorm.analysis.material import Material, float64_copy
from unnorm.analysis.neurons import ablate, output_weights
from unnorm.analysis.patching import Patching, patch
from unnorm.analysis.prompts import PromptPair, by_length, indirect_object_prompts, read_prompts
from unnorm.analysis.scales import log_scales
from unnorm.analysis.sinks import sinks
from unnorm.checkpoint import load_sites
from unnorm.errors import UnnormError
from unnorm.models import cast_as_loaded, copy_model, load_original
from unnorm.tracing import trace_inputs

BRIDGED = ["gpt2", "gpt_neox, parallel", "llama", "qwen3"]
# Each letter with the space before it is one of the tiny tokenizer's tokens.
PAIRS = [
    PromptPair("k a c e c", "k a c e a", " n", " p"),
    PromptPair("k a i n i", "k a i n a", " p", " t"),
    PromptPair("k f c e c t", "k f c e f t", " n", " a"),
    PromptPair("k f i e i t", "k f i e f t", " c", " p"),
]


def original_of(run: Path) -> PreTrainedModel:
    return load_original(str(run.parent / "model"))[0]


def test_states_that_a_model_keeps_from_its_last_pass_are_copied_without_its_graph(tiny_model: PreTrainedModel) -> None:
    """As RecurrentGemma keeps some."""
    model = copy_model(tiny_model)
    model.transformer.state = model.lm_head.weight * 2  # type: ignore[union-attr]
    copy = float64_copy(model)
    assert copy.dtype == torch.float64 and copy.transformer.state.grad_fn is None  # type: ignore[union-attr]


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def hooked_logits(
    model: PreTrainedModel, name: str, edit: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """Logits with one module's input edited."""
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        return logits(model, ids)
    finally:
        handle.remove()


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


@pytest.mark.parametrize("family", BRIDGED)
def test_patching_agrees_with_transformer_lens_and_finite_differences(family: str, runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    twin, bridge = unnorm.load(runs[family]), unnorm.to_transformer_lens(runs[family])
    tokenizer = AutoTokenizer.from_pretrained(runs[family] / "model")
    found = patch(twin, tokenizer, PAIRS)
    first = by_length(PAIRS, tokenizer)[0]
    pairs = [PAIRS[number] for number in first[0]]
    clean, corrupted = torch.tensor(first[1]), torch.tensor(first[2])
    answers = torch.tensor([[tokenizer(p.clean + t).input_ids[-1] for t in (p.answer, p.wrong_answer)] for p in pairs])

    def metric(output: torch.Tensor) -> torch.Tensor:
        right, wrong = output[:, -1].gather(1, answers).unbind(1)
        return right - wrong

    with torch.no_grad():
        before = metric(bridge(corrupted))
        _, cache = bridge.run_with_cache(clean)
        for layer, head in ((0, 1), (1, 3)):
            name = f"blocks.{layer}.attn.hook_z"

            def put(z: torch.Tensor, hook: Any, name: str = name, head: int = head) -> torch.Tensor:
                heads = z if z.ndim == 4 else z.unflatten(-1, (4, -1))
                source = cache[name] if z.ndim == 4 else cache[name].unflatten(-1, (4, -1))
                heads[:, :, head] = source[:, :, head]
                return heads.view(z.shape)

            effect = metric(bridge.run_with_hooks(corrupted, fwd_hooks=[(name, put)])) - before
            torch.testing.assert_close(found.activation[first[0], layer, head].float(), effect, rtol=1e-3, atol=1e-4)
    exact = float64_copy(twin)
    small = _patched_a_little(exact, clean, corrupted, answers, 1e-6)
    estimate = patch(exact, tokenizer, pairs).attribution
    torch.testing.assert_close(estimate, small, rtol=1e-4, atol=1e-6)


def _patched_a_little(
    model: PreTrainedModel, clean: torch.Tensor, corrupted: torch.Tensor, answers: torch.Tensor, step: float
) -> torch.Tensor:
    """Effects of moving each head a small step towards the clean prompt, over that step."""
    columns = []
    for writer in anatomy(model).attentions:
        z: list[torch.Tensor] = []
        hooked_logits(model, writer.name, lambda x, z=z: z.append(x) or x, clean)  # type: ignore[misc]
        size = z[0].shape[-1] // 4
        for head in range(4):
            part = slice(head * size, (head + 1) * size)

            def move(x: torch.Tensor, share: float, z: Any = z, part: slice = part) -> torch.Tensor:
                x = x.clone()
                x[..., part] += share * (z[0][..., part] - x[..., part])
                return x

            ends = [
                hooked_logits(model, writer.name, lambda x, s=s: move(x, s), corrupted)[:, -1].gather(1, answers)
                for s in (step, -step)
            ]
            columns.append(((ends[0] - ends[1])[:, 0] - (ends[0] - ends[1])[:, 1]) / (2 * step))
    return torch.stack(columns, 1).view(len(clean), -1, 4)


def test_gradient_is_exact_where_everything_after_is_linear(runs: dict[str, Path]) -> None:
    """The twin's last attention reaches the logits through its last MLP alone; with that off, linearly."""
    twin, original = float64_copy(unnorm.load(runs["gpt2"])), float64_copy(original_of(runs["gpt2"]))
    tokenizer = AutoTokenizer.from_pretrained(runs["gpt2"] / "model")
    for model in (twin, original):
        torch.nn.init.zeros_(model.transformer.h[1].mlp.c_proj.weight)
    exact, off = (patch(model, tokenizer, PAIRS) for model in (twin, original))
    torch.testing.assert_close(exact.attribution[:, 1], exact.activation[:, 1], rtol=0, atol=1e-9)
    assert float(exact.head_error[1].max()) < 1e-9 < 1e-3 < float(off.head_error[1].min())


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


def material_of(run: Path) -> Material:
    from datasets import Dataset

    original, tokenizer = load_original(str(run.parent / "model"))
    twin = unnorm.load(run)
    blocks = Dataset.from_dict({"input_ids": trace_inputs(twin, 3, 20).tolist()})
    sites, constants = load_sites(run)
    return Material(original, twin, tokenizer, blocks, PAIRS, sites, constants, batch_size=2)


def test_scales_are_what_the_norms_divide_by(runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    material = material_of(runs["qwen3"])
    found = log_scales(material)
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


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "cohere, query and key norms, not in our list"])
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


def test_geometry_sees_a_weight_that_was_trained(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    with torch.no_grad():
        material.twin.transformer.h[1].attn.c_attn.weight[3] *= 2
    rows = geometry(material.original, material.twin, material.sites, material.constants)
    changed = {row.weight: row for row in rows if row.change > 1e-4}
    assert list(changed) == ["transformer.h.1.attn.c_attn"]
    gain = changed["transformer.h.1.attn.c_attn"].gain
    assert float(gain[1, 3] / gain[0, 3]) == pytest.approx(2, rel=1e-4)


def test_what_cannot_be_known_is_said(runs: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs["gemma2"] / "model")
    gemma = original_of(runs["gemma2"])  # a norm follows each attention
    ids = trace_inputs(gemma, 1, 8)
    kinds = [part.kind for part in attribute(gemma, ids).parts]
    assert "head" not in kinds and kinds.count("attention") == 2 and not attribute(gemma, ids).neurons
    with pytest.raises(UnnormError, match="heads of Gemma2ForCausalLM can't be told apart"):
        patch(gemma, tokenizer, PAIRS)
    with pytest.raises(UnnormError, match="neurons of Gemma2ForCausalLM can't be told apart"):
        output_weights(gemma)
    assert patch(unnorm.load(runs["gemma2"]), tokenizer, PAIRS).activation.shape == (4, 2, 4)
    with pytest.raises(UnnormError, match="no plain sum"):
        attribute(original_of(runs["opt, post-norm"]), ids)
    with pytest.raises(UnnormError, match="something lies between"):
        attribute(unnorm.load(runs["opt, projected"]), ids)
    mixtral = unnorm.load(runs["mixtral"])
    found = attribute(float64_copy(mixtral), trace_inputs(mixtral, 1, 8))
    assert found.neurons == {}
    torch.testing.assert_close(found.contributions.sum(0), found.logits, rtol=0, atol=1e-10)
    with pytest.raises(UnnormError, match="neurons of UnnormMixtralForCausalLM"):
        output_weights(mixtral)


def words(*more: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows whole words."""
    known = ["?", *dict.fromkeys(more)]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_prompts_have_names_of_one_token_and_equal_lengths() -> None:
    tokenizer = load_original("demo")[1]
    pairs = indirect_object_prompts(tokenizer, 40)
    assert len(pairs) == len(set(pairs)) == 40
    assert pairs == indirect_object_prompts(tokenizer, 40) != indirect_object_prompts(tokenizer, 40, seed=1)
    for pair in pairs:
        assert pair.clean.startswith("def ")  # people's names are no tokens of the bundled model's
        clean, corrupted = (tokenizer(text).input_ids for text in (pair.clean, pair.corrupted))
        assert sum(a != b for a, b in zip(clean, corrupted, strict=True)) == 1
        for prompt in (pair.clean, pair.corrupted):
            for answer in (pair.answer, pair.wrong_answer):
                start, both = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
                assert both[:-1] == start
        assert pair.clean.count(pair.answer.strip()) < pair.clean.count(pair.wrong_answer.strip())


def test_prompts_have_people_where_the_tokenizer_knows_them() -> None:
    pairs = indirect_object_prompts(words("and", "Anna", "Mark", "Laura", "Peter", "Rose"), 10)
    assert all(pair.answer.strip() in ("Anna", "Mark", "Laura", "Peter", "Rose") for pair in pairs)
    with pytest.raises(UnnormError, match="no prompts can be generated"):
        indirect_object_prompts(words("and", "Anna", "Mark", "Laura"), 10)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(pair.__dict__) for pair in PAIRS))
    return path


def test_command_line(finished_run: Path, prompts_file: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("analyze", finished_run, "--prompts", prompts_file, "--tokens", 256, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(result["findings"]) == ["attribution", "patching", "sinks", "neurons", "lens", "scales", "geometry"]
    attribution = result["findings"]["attribution"]
    assert attribution["twin"]["error"] == 0 < 0.01 < attribution["original"]["error"]
    assert attribution["twin"]["sum_error"] < 1e-10
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert page.count("Plotly.react(") >= 1 and "default-src 'none'" in page
    for figure in ("attribution_error", "patching_scatter", "sinks_share", "neurons_ablation", "lens", "scales"):
        assert f'id="{figure}"' in page


def test_table_default_place_and_what_is_left_out(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    """The tiny tokenizer has no names of one token: patching is left out with the reason, unless it was asked for."""
    shutil.copytree(finished_run, tmp_path / "run")
    done = cli("analyze", tmp_path / "run", "--tokens", 128)
    assert done.code == 0, done.err
    assert "patching left out: Neither people's names" in done.out and "sink rate" in done.out
    assert (tmp_path / "run" / "analysis" / "analysis.html").is_file()
    done = cli("analyze", tmp_path / "run", "--what", "sinks", "--what", "lens", "--tokens", 128, "--json")
    assert list(json.loads(done.out)["findings"]) == ["sinks", "lens"]
    done = cli("analyze", tmp_path / "run", "--what", "patching", "--tokens", 128)
    assert done.code == 2 and "no prompts can be generated" in done.err


def test_from_python(finished_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = unnorm.analyze(finished_run, str(tiny_model_dir), what=["geometry"], tokens=128, out=tmp_path)
    assert Path(result["page"]).is_file() and len(result["findings"]["geometry"]["weights"]) == 5


BAD_PROMPTS = {
    "fields": ('{"clean": "a", "corrupt": "b"}', "has not the fields clean, corrupted, answer, wrong_answer"),
    "json": ("\n\na, b", "Line 3 of"),
    "list": ('["a"]', "has not the fields"),
    "empty": ("\n", "is empty"),
    "lengths": (
        '{"clean": "a b c", "corrupted": "a b", "answer": " x", "wrong_answer": " y"}',
        "'clean' has",
    ),
    "answers": (
        '{"clean": "k a c", "corrupted": "k a i", "answer": " x", "wrong_answer": " x"}',
        "both answers begin with the same token",
    ),
}


@pytest.mark.parametrize("wrong", BAD_PROMPTS)
def test_bad_prompts_are_refused(wrong: str, finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    text, message = BAD_PROMPTS[wrong]
    (tmp_path / "prompts.jsonl").write_text(text)
    done = cli("analyze", finished_run, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out")
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_what_only_python_takes_for_the_end_of_a_line_may_be_in_a_prompt(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pair = replace(PAIRS[0], clean=f"\u2028{PAIRS[0].clean}", corrupted=f"\u2028{PAIRS[0].corrupted}")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(asdict(pair), ensure_ascii=False), encoding="utf-8")
    assert read_prompts(path, tiny_tokenizer) == [pair]


def test_bad_input_is_refused(
    finished_run: Path, runs: dict[str, Path], tiny_model_dir: Path, text_file: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    for arguments, message in {
        (tmp_path,): "holds no finished run",
        (tiny_model_dir,): "holds no finished run",
        (finished_run, "--what", "magic"): "There is no analysis 'magic'. Analyses are attribution, patching",
        (finished_run, "--against", "demo"): "has 300 token embeddings and 'demo' has 4,096: their vocabularies differ",
        (finished_run, "--against", runs["llama"].parent / "model"): "is a LlamaForCausalLM and the twin was a GPT2LM",
        (runs["llama"], "--against", runs["llama, tied, biased"].parent / "model"): "is built otherwise than the twin",
        (finished_run, "--against", finished_run): "is a UnnormGPT2LMHeadModel and the twin was a GPT2LMHeadModel",
        (finished_run, "--against", tmp_path / "nowhere"): "No model",
        (finished_run, "--against", with_other_tokens(tiny_model_dir, tmp_path / "other")): "different tokenizers",
        (finished_run, "--prompts", tmp_path / "nowhere.jsonl"): "Could not read the prompts",
        (finished_run, "--data", tmp_path / "nowhere.txt"): "nowhere.txt",
        (finished_run, "--context", 65): "longer than the 64 tokens",
        (finished_run, "--tokens", 1): "nothing to predict",
        (finished_run, "--tokens", "many"): "not a number of tokens",
    }.items():
        done = cli("analyze", *arguments, "--out", out)
        assert done.code == 2 and message in done.err and "Traceback" not in done.err, (arguments, done)
    done = cli("analyze", finished_run, "--out", text_file)
    assert done.code == 2 and "is a file" in done.err
    assert not out.exists()


def test_models_are_left_as_they_were(finished_run: Path) -> None:
    twin = unnorm.load(finished_run)
    ids = trace_inputs(twin, 2, 16)
    before = logits(twin, ids)
    twin(input_ids=ids, output_attentions=True)  # From then on transformers has hooks of its own there.
    hooks = hooks_of(twin)
    attribute(twin, ids)
    sinks(twin, ids)
    lens(twin, ids)
    ablate(twin, [ids], [torch.tensor([1])])
    patch(twin, AutoTokenizer.from_pretrained(finished_run / "model"), PAIRS)
    assert torch.equal(logits(twin, ids), before)
    assert hooks_of(twin) == hooks and not twin.training


def hooks_of(model: PreTrainedModel) -> list[list[int]]:
    return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]


def test_stacked_experts_are_no_reason_to_lose_the_other_analyses(runs: dict[str, Path], text_file: Path) -> None:
    result = unnorm.analyze(runs["mixtral"], data=str(text_file), tokens=256, context=32, device="cpu")
    assert {"attribution", "geometry"} <= result["findings"].keys()


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


def test_a_kept_final_norm_is_not_said_to_be_gone(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    unnorm.remove(str(tiny_model_dir), data=str(text_file), out=run, tokens=0, keep="ln_f", device="cpu")
    what = ["attribution", "neurons", "lens"]
    result = unnorm.analyze(run, what=what, data=str(text_file), tokens=128, device="cpu")
    assert result["findings"]["attribution"]["twin"]["error"] > 0.01
    page = Path(result["page"]).read_text()
    assert "which kept transformer.ln_f" in page and "norm-free" not in page
    for claim in ("each is what the logit loses", "none in the twin", "the same linear read at every depth"):
        assert claim not in page, claim


def test_effects_of_patching_are_in_the_order_of_the_pairs(runs: dict[str, Path]) -> None:
    twin, tokenizer = unnorm.load(runs["gpt2"]), AutoTokenizer.from_pretrained(runs["gpt2"] / "model")
    pairs = sorted(PAIRS, key=lambda pair: -len(tokenizer(pair.clean).input_ids))
    assert len(by_length(pairs, tokenizer)) > 1
    found = patch(twin, tokenizer, pairs)
    for number in (0, len(pairs) - 1):
        alone = patch(twin, tokenizer, pairs[number : number + 1])
        torch.testing.assert_close(found.activation[number], alone.activation[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.clean[number], alone.clean[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("measure", [attribute, lens, sinks])
def test_ids_that_are_more_than_the_model_takes_are_refused(measure: Any, finished_run: Path) -> None:
    with pytest.raises(UnnormError, match=r"A sequence has 65 tokens, and the model takes 64\."):
        measure(unnorm.load(finished_run), torch.zeros(1, 65, dtype=torch.long))


def test_attributions_do_not_depend_on_how_many_batches_there_are(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    one, several = (attribution.find(replace(material, batch_size=size)).numbers["twin"] for size in (3, 1))
    for key in ("mean_abs", "mean", "mean_abs_direct_effect"):
        found, expected = ([row[key] for row in numbers["parts"][:-1]] for numbers in (several, one))
        assert found == pytest.approx(expected, rel=1e-6)
    assert several["tokens"] == one["tokens"] == 3 * 19
    assert [row["mean_abs"] for row in several["neurons"]] == pytest.approx([r["mean_abs"] for r in one["neurons"]])


def test_neurons_are_put_at_their_means_over_all_batches(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    one, several = (neurons.find(replace(material, batch_size=size)).numbers for size in (3, 1))
    for name in ("original", "twin"):
        assert several[name]["entropy_neurons"] == pytest.approx(one[name]["entropy_neurons"], rel=1e-2, abs=1e-5)


def test_metrics_are_of_the_clean_and_of_the_corrupted_prompt(runs: dict[str, Path]) -> None:
    twin, tokenizer = unnorm.load(runs["gpt2"]), AutoTokenizer.from_pretrained(runs["gpt2"] / "model")

    def metric(prompt: str, pair: Any) -> float:
        with torch.no_grad():
            logits = twin(input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
        right, wrong = (tokenizer(prompt + answer).input_ids[-1] for answer in (pair.answer, pair.wrong_answer))
        return float(logits[right] - logits[wrong])

    found = patch(twin, tokenizer, PAIRS)
    assert found.clean.tolist() == pytest.approx([metric(p.clean, p) for p in PAIRS], rel=1e-3, abs=1e-5)
    assert found.corrupted.tolist() == pytest.approx([metric(p.corrupted, p) for p in PAIRS], rel=1e-3, abs=1e-5)


def test_correlation_of_a_head_is_pearsons() -> None:
    a, b = torch.randn(2, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    found = Patching(a, b, a[:, 0, 0], a[:, 0, 0]).head_correlation
    assert float(found[1, 2]) == pytest.approx(np.corrcoef(a[:, 1, 2], b[:, 1, 2])[0, 1])


def test_stable_rank_is_of_squares(runs: dict[str, Path]) -> None:
    material = material_of(runs["gpt2"])
    rows = geometry(material.original, material.twin, material.sites, material.constants)
    for row, numbers in zip(rows, find_geometry(material).numbers["weights"], strict=True):
        squares = row.singular_values[0].square()
        assert numbers["original"]["stable_rank"] == pytest.approx(float(squares.sum() / squares.max()))
