"""Families beyond GPT-2: sites found by tracing alone, folded exactly, or refused."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from hypothesis import given, settings, strategies
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import Cli, Saved
from tests.families import (
    FAMILIES,
    GROUPED,
    IDS,
    IN_PLACE,
    LLAMA_LIKE,
    float64_copy,
    random_model,
    removed_twin,
)
from unnorm.calibration.scales import collect_log_scales
from unnorm.errors import UnnormError
from unnorm.folding.checkpoint import load_unfolded, save_sites, save_unfolded
from unnorm.hooks import recorded
from unnorm.models.probe import trace_inputs
from unnorm.models.running import copy_model
from unnorm.proof.at_load import prove_sites
from unnorm.sites.find import find_sites, norm_modules
from unnorm.sites.residual import residual_writers
from unnorm.taper.stand_ins import install, value_features

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
# The part of the file between these is made here; what follows is written by hand.
MADE, BY_HAND = "<!-- made by tests/test_families.py -->", "<!-- by hand -->"
TABLE_HEAD = """| family | class | norms | sites | fold into | float64 | float32 |
| --- | --- | --- | --- | --- | --- | --- |"""


@pytest.mark.parametrize("family", FAMILIES)
def test_found_by_tracing_and_folded_exactly(family: str) -> None:
    make, count = FAMILIES[family]
    model = random_model(make)
    sites = find_sites(model)
    assert len(sites) == count
    assert prove_sites(model, sites) < 1e-8
    twin, ids, expected = removed_twin(float64_copy(model))
    assert norm_modules(twin) == []
    torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_table_in_the_docs_is_what_the_models_show() -> None:
    """Written anew with UNNORM_WRITE_DOCS=1; but for the errors, which are the machine's, it must be as it stands."""
    rows = [table_row(family, random_model(make), False) for family, (make, _) in FAMILIES.items()]
    rows += [table_row(family, random_model(make), True) for family, make in IN_PLACE.items()]
    assert len(rows) >= 18
    assert max(float64 for _, float64, _ in rows) < 1e-10
    assert max(float32 for _, _, float32 in rows) < 1e-4
    lines = [f"{cells} {float64:.0e} | {float32:.0e} |" for cells, float64, float32 in rows]
    before, _, rest = DOCS.read_text().partition(MADE)
    made, _, after = rest.partition(BY_HAND)
    if os.environ.get("UNNORM_WRITE_DOCS"):
        made = "\n".join(["", TABLE_HEAD, *lines, ""])
        DOCS.write_text(f"{before}{MADE}{made}{BY_HAND}{after}")
    written = made.strip().splitlines()
    assert [line.rsplit("|", 3)[0] + "|" for line in written[2:]] == [cells for cells, _, _ in rows]


def table_row(family: str, model: PreTrainedModel, in_place: bool) -> tuple[str, float, float]:
    """The cells before the errors; the errors in float64 and float32, both relative to the largest logit."""
    sites = find_sites(model, in_place)
    kinds = ", ".join(sorted({site.kind for site in sites}))
    counts = Counter(site.folds_into for site in sites)
    folds = ", ".join(f"{into} {count}" for into, count in sorted(counts.items(), reverse=True))
    errors = []
    for precise in (float64_copy(model), model):
        twin, ids, expected = removed_twin(precise, sites)
        errors.append(float(((twin(input_ids=ids).logits - expected).abs().max() / expected.abs().max()).detach()))
    return f"| {family} | {type(model).__name__} | {kinds} | {len(sites)} | {folds} |", errors[0], errors[1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_random_configurations_fold_exactly_and_generate(data: strategies.DataObject) -> None:
    draw = data.draw
    family = draw(
        strategies.sampled_from(["gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "gemma3_text", "opt", "bloom"])
    )
    heads, head_dim = draw(strategies.sampled_from([(1, 8), (2, 4), (4, 8), (4, 2)]))
    sizes: dict[str, Any] = {
        "vocab_size": draw(strategies.integers(20, 80)),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw(strategies.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(strategies.sampled_from([1, heads])),
        "head_dim": head_dim,
        "max_position_embeddings": 32,
        "tie_word_embeddings": draw(strategies.booleans()),
        "attention_bias": draw(strategies.booleans()),
        **dict.fromkeys(["rms_norm_eps", "layer_norm_eps"], draw(strategies.sampled_from([1e-3, 1e-5, 1e-6]))),
        **IDS,
    }
    width = "ffn_dim" if family == "opt" else "intermediate_size"
    if family not in ("gpt2", "bloom"):
        sizes[width] = draw(strategies.integers(5, 40))
    if family in ("gpt2", "gpt_neox", "opt", "bloom"):
        sizes = {key: value for key, value in sizes.items() if key not in ("num_key_value_heads", "head_dim")}
    if family == "opt":
        sizes["word_embed_proj_dim"] = sizes["hidden_size"]
    model = random_model(lambda: AutoConfig.for_model(family, **sizes))
    assert prove_sites(model, find_sites(model)) < 1e-8
    twin, ids, expected = removed_twin(float64_copy(model))
    torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-10)
    texts = [
        twin.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


def test_scales_of_query_norms_keep_the_first_position_apart() -> None:
    model, name = random_model(FAMILIES["qwen3"][0]), "model.layers.1.self_attn.q_norm"
    (site,) = (site for site in find_sites(model) if site.name == name)
    ids = trace_inputs(model, 3, 12)
    found = collect_log_scales(model, [site], Dataset.from_dict({"input_ids": ids.tolist()}))[name]
    with torch.no_grad(), recorded(model, [name]) as record:
        model(input_ids=ids)
    at_0 = record[name][0][:, 0]
    assert (at_0.shape, found.shape) == ((3, 4, 8), (3 * 4, 12))
    torch.testing.assert_close(found[:, 0].exp(), (at_0.square().mean(-1) + site.eps).sqrt().flatten())


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_of_a_norm_that_folds_into_its_writer_the_writer_is_named(family: str) -> None:
    sites = find_sites(random_model(FAMILIES[family][0]))
    writers = {writer for site in sites for writer in site.writers}
    assert writers.isdisjoint(site.name for site in sites)
    assert sites[-1].writers == (
        "model.embed_tokens",
        *(f"model.layers.{layer}.{writer}" for layer in range(2) for writer in ("self_attn.o_proj", "mlp.down_proj")),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_loads_by_itself_and_generates(family: str, tmp_path: Path) -> None:
    twin, ids, expected = removed_twin(random_model(FAMILIES[family][0]))
    twin.save_pretrained(tmp_path)
    for options in ({}, {"trust_remote_code": True}):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    texts = [
        loaded.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


END_TO_END = [
    "llama, tied, biased",
    "gpt_neox, parallel",
    "opt",
    "qwen3",
    "gemma3",
    "olmo",
    "bloom",
    "mixtral",
    "gpt-oss",
]


@pytest.mark.parametrize("family", [*END_TO_END, "opt, post-norm, projected", "phimoe, not in our list"])
@pytest.mark.parametrize("recipe", ["taper", "sequential"])
def test_removed_end_to_end(family: str, recipe: str, saved_family: Saved, text_file: Path, tmp_path: Path) -> None:
    make = IN_PLACE[family] if family in IN_PLACE else FAMILIES[family][0]
    saved_family(make)
    options: dict[str, Any] = {"context": 32, "batch_size": 8, "tokens": 60 * 256, "device": "cpu", "kl_budget": 100}
    options["in_place"] = family in IN_PLACE
    options["dtype"] = "float32"  # Else the processor decides, and 30 steps from random weights may not arrive.
    result = unnorm.remove(
        model=str(tmp_path / "model"), data=str(text_file), out=tmp_path / "run", recipe=recipe, **options
    )
    assert (result["norm_modules_left"], result["verified"]) == (0, True)
    assert unnorm.load(tmp_path / "run").config.model_type == f"unnorm_{make().model_type}"


def test_buffers_that_no_checkpoint_has_are_computed_when_a_twin_loads(tmp_path: Path) -> None:
    """Falcon-H1's multipliers are such: its stock class works them out from the config after loading."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    model = random_model(
        lambda: hf.FalconH1Config(**LLAMA_LIKE, **sizes, mamba_n_groups=1, mamba_d_state=8, ssm_multipliers=[2.0] * 5)
    )
    twin, ids, _ = removed_twin(model, find_sites(model, in_place=True))
    twin.save_pretrained(tmp_path)
    loaded = type(twin).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, twin(input_ids=ids).logits)


@pytest.mark.parametrize("family", IN_PLACE)
def test_what_folds_into_no_weight_is_refused_or_stays_as_an_affine_map(family: str) -> None:
    model = random_model(IN_PLACE[family])
    with pytest.raises(UnnormError, match=r"norm '(model|transformer)[.\w]*norm\w*'.*--in-place"):
        find_sites(model)
    sites = find_sites(model, in_place=True)
    assert prove_sites(model, sites) < 1e-8
    twin, ids, expected = removed_twin(float64_copy(model), sites)
    assert norm_modules(twin) == []
    torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_model_that_overflows_without_its_norms_says_so(
    cli: Cli, saved: Saved, tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    """Gated MLPs give the cube of what they get, and some tokens here are a million times longer than others."""
    config = FAMILIES["llama"][0]()
    config.vocab_size, config.num_hidden_layers = len(tiny_tokenizer), 6
    model = random_model(lambda: config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(torch.logspace(-6, 6, len(tiny_tokenizer))[:, None])
    saved(model)
    options = ["--data", text_file, "--tokens", 0, "--context", 32, "--device", "cpu", "--out", tmp_path / "run"]
    done = cli("remove", tmp_path / "model", *options, "--json")
    assert done.code == 1  # The proof can't pass: there are no logits to compare.
    assert "the model overflows" in done.err

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for text in (done.out, (tmp_path / "run" / "result.json").read_text()):
        result = json.loads(text, parse_constant=refuse)
        assert (result["lnfree_loss"], result["naive_loss"], result["verified"]) == (None, None, False)
        # It does in every block, so there are no others to speak of.
        assert result["overflowed_blocks"] == result["validation_blocks"] > 0
        assert (result["lnfree_loss_elsewhere"], result["kl_elsewhere"]) == (None, None)
    proof = cli("verify", tmp_path / "run", "--json")
    assert proof.code == 1
    failed = [check for check in json.loads(proof.out, parse_constant=refuse)["checks"] if not check["passed"]]
    assert any("without its norms the model overflows" in check["detail"] for check in failed)


def test_an_mlp_in_a_layer_that_is_called_after_attention_is_none() -> None:
    model = random_model(IN_PLACE["jamba, not in our list"])
    writers = residual_writers(model, "model.final_layernorm")
    assert writers is not None
    kinds = {writer.name: (writer.kind, writer.heads) for writer in writers}
    assert kinds["model.layers.1.feed_forward.down_proj"] == ("mlp", 0)
    assert kinds["model.layers.1.self_attn.o_proj"] == ("attention", 4)
    roles = {site.name: site.role for site in find_sites(model, in_place=True)}
    assert (roles["model.layers.1.input_layernorm"], roles["model.layers.1.pre_ff_layernorm"]) == ("attention", "mlp")
    # Nothing is known of what writes their inputs, least of all that it is an embedding.
    inner = {role for name, role in roles.items() if name.endswith(("dt_layernorm", "b_layernorm", "c_layernorm"))}
    assert inner == {"mlp"}


def test_norms_of_single_heads_are_attentions() -> None:
    """Of StableLM's, which work on pieces of a tensor, the writers are not known."""
    sites = find_sites(random_model(lambda: hf.StableLmConfig(**GROUPED, qk_layernorm=True)), in_place=True)
    assert {site.role for site in sites if "_layernorm.norms." in site.name} == {"attention"}


def test_what_layers_share_is_saved_of_each_where_the_unembedding_is_untied(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As equalizing leaves a model: transformers then ties nothing at all when it loads it."""
    model = random_model(FAMILIES["zamba, not in our list"][0])
    student, sites = copy_model(model), find_sites(model)
    stand_ins = install(student, sites)
    student.get_output_embeddings().weight = torch.nn.Parameter(student.get_output_embeddings().weight.detach().clone())
    student.config.tie_word_embeddings = False
    save_unfolded(student, model, sites, tiny_tokenizer, tmp_path / "unfolded")
    save_sites(tmp_path, sites, {site.name: 1.0 for site in sites})
    for stand_in in stand_ins.values():
        stand_in.removed = True
    ids = trace_inputs(model, 2, 12)
    torch.testing.assert_close(load_unfolded(tmp_path)(input_ids=ids).logits, student(input_ids=ids).logits)


def test_a_config_without_use_cache_is_trained(
    saved: Saved, tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    """As those of models with several parts; the Trainer writes one."""
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = random_model(lambda: hf.OpenAIGPTConfig(vocab_size=len(tiny_tokenizer), **sizes))
    saved(model)
    options: dict[str, Any] = {"context": 32, "tokens": 1024, "in_place": True, "recipe": "tapernorm", "device": "cpu"}
    result = unnorm.remove(str(tmp_path / "model"), data=str(text_file), out=tmp_path / "run", **options)
    assert result["verified"]
    assert "use_cache" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())


def test_norms_that_share_their_gain_are_trained_as_one() -> None:
    """Those of Zamba's layers; what is saved would else be that of the first."""
    stand_ins = install(model := random_model(FAMILIES["zamba, not in our list"][0]), find_sites(model))
    first, second = (stand_ins[f"model.layers.{layer}.shared_transf.input_layernorm"] for layer in (1, 3))
    assert first is not second and first.gain is second.gain
    assert first.gain is not stand_ins["model.layers.1.shared_transf.pre_ff_layernorm"].gain


@pytest.mark.parametrize("gain", [1e-3, 1e-2, 30.0])
def test_the_kind_of_a_norm_does_not_hang_on_its_gain(gain: float) -> None:
    for family, kind in (("llama", "rmsnorm"), ("stablelm", "layernorm")):
        model = random_model(FAMILIES[family][0])
        norm: Any = model.get_submodule("model.layers.0.input_layernorm")
        with torch.no_grad():
            norm.weight *= gain
            if kind == "layernorm":
                norm.bias += 5 * gain
        sites = find_sites(model)
        assert sites[0].kind == kind
        assert prove_sites(model, sites) < 1e-8


def test_paths_are_parted_only_where_their_layout_is_known() -> None:
    """GPT-2's and GPT-BigCode's fused projections have one name and other parts."""
    known = {"gpt2": {"transformer.h.0.attn.c_attn": 32}, "gpt_bigcode, not in our list": None}
    for family, expected in known.items():
        model = random_model(FAMILIES[family][0])
        assert value_features(model, find_sites(model)[0]) == expected


FRESH = """
import sys, unnorm
from unnorm.models.load import load_original
print(type(unnorm.load(sys.argv[1])).__name__, type(load_original(sys.argv[1])[0]).__name__)
assert all(check.passed for check in unnorm.verify(sys.argv[1]))
"""


def test_a_run_of_any_family_is_taken_up_by_another_process(runs: dict[str, Path]) -> None:
    run = runs["starcoder2, not in our list"]
    done = subprocess.run([sys.executable, "-c", FRESH, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 2 * ["UnnormStarcoder2ForCausalLM"]
