"""Other forms of the same model: each read back by the tool it is for, with the checkpoint's logits."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import unnorm
from tests.bad_input.edits import edit_config
from tests.conftest import VOCAB, Cli, Saved, randomize
from tests.families import GPT_LIKE, LLAMA_LIKE, random_model, removed_twin
from unnorm.errors import UnnormError
from unnorm.exports.measure import FormError, compare
from unnorm.exports.nanogpt import forward
from unnorm.exports.stock import EPS
from unnorm.exports.transformer_lens import register_adapter
from unnorm.models.probe import trace_inputs
from unnorm.sites.find import find_sites

IN_LENS = [
    "gpt2",
    "gpt_neox, parallel",
    "gpt_neox, sequential",
    "llama",
    "llama, tied, biased",
    "qwen2",
    "qwen3",
    "gemma",
    "opt",
]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def assert_alike(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Equal to within a share of the largest logit (of the random models some have logits of several hundred)."""
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * largest)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox, parallel", "phi", "llama, tied, biased", "qwen2", "gemma"])
def test_stock_form_computes_the_twin_in_stock_transformers(family: str, runs: dict[str, Path], tmp_path: Path) -> None:
    exported = unnorm.export(runs[family], "stock", out=tmp_path / "stock")
    twin = unnorm.load(runs[family])
    stock: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock) is getattr(hf, type(twin).__name__.removeprefix("Unnorm"))
    ids = trace_inputs(twin, 2, 30)
    expected = logits(twin, ids)
    assert_alike(logits(stock, ids), expected, 1e-5)
    # The epsilon is in the config, so saving once more keeps it.
    stock.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert EPS in {getattr(module, "eps", getattr(module, "variance_epsilon", 0)) for module in again.modules()}
    torch.testing.assert_close(logits(again, ids), logits(stock, ids))
    # In bfloat16 it is about as near as the folded model itself.
    float32, bfloat16, rounded = exported.errors
    assert float32.relative < 1e-5 and float32.kl < 1e-8
    assert bfloat16.relative < 3 * rounded.relative + 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "stock")("import os").input_ids


def test_stock_form_in_half_precision_overflows_as_its_readme_says(finished_run: Path, tmp_path: Path) -> None:
    exported = unnorm.export(finished_run, "stock", out=tmp_path / "stock")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float16)
    assert not all(parameter.isfinite().all() for parameter in half.parameters())
    assert "float16" in exported.note and "float16" in (tmp_path / "stock" / "README.md").read_text()


def test_no_stock_form_where_the_config_has_no_epsilon(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnnormError, match="opt has no stock form: its config holds no epsilon"):
        unnorm.export(runs["opt"], "stock", out=tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_gain_of_one_plus_weight_is_stored_as_it_is_read(runs: dict[str, Path]) -> None:
    assert all(check.passed for check in unnorm.verify(runs["gemma"]) if "unfolded" in check.name)


def test_nanogpt_form(runs: dict[str, Path], tmp_path: Path) -> None:
    exported = unnorm.export(runs["gpt2"], "nanogpt", out=tmp_path / "nano")
    assert [row.name for row in exported.errors] == ["float32"] and exported.errors[0].relative < 1e-5
    weights = load_file(tmp_path / "nano" / "model.safetensors")
    config = json.loads((tmp_path / "nano" / "config.json").read_text())
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    block = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    linear = ["lm_head", *(f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in block)]
    assert weights.keys() == {
        *(f"{name}.{kind}" for name in linear for kind in ("weight", "bias")),
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert config["model_args"] == {
        "block_size": 64, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.0, "bias": True,
    }  # fmt: skip
    assert config["lm_head_bias"] is True
    twin = unnorm.load(runs["gpt2"])
    ids = trace_inputs(twin, 2, 20)
    assert_alike(forward(weights, config, ids), logits(twin, ids), 1e-5)


def test_errors_of_a_form_are_those_of_their_definitions() -> None:
    a, b = -torch.rand(2, 5, 7).double() - 1, -torch.rand(2, 5, 7).double() - 1
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    row = compare("x", a, b)
    assert row.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    assert row.relative == pytest.approx(float((a - b).abs().max() / a.abs().max()))


def test_errors_are_measured_where_the_model_does_not_overflow() -> None:
    a, b = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double()
    expected = compare("x", a[:1], b[:1])
    a[1], b[1] = math.inf, math.nan
    assert compare("x", a, b) == expected
    with pytest.raises(UnnormError, match="overflows on all the random tokens"):
        compare("x", a[1:], b[1:])


def test_nanogpt_form_is_for_gpt2_only(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnnormError, match="only for GPT-2s; this model is a llama"):
        unnorm.export(runs["llama"], "nanogpt", out=tmp_path / "nano")


def test_command_line(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    for form in ("transformers", "stock", "nanogpt"):
        done = cli("export", finished_run, "--to", form, "--out", tmp_path / form)
        assert done.code == 0 and str(tmp_path / form) in done.out and "float32" in done.out
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers", trust_remote_code=True)
    assert (tmp_path / "transformers" / "modeling_unnorm.py").is_file()
    ids = trace_inputs(folded, 2, 20)
    assert torch.equal(logits(folded, ids), logits(unnorm.load(finished_run), ids))
    done = cli("export", finished_run, "--to", "stock", "--out", tmp_path / "json", "--json")
    values = json.loads(done.out)
    loaded = eval(values["load"], {"AutoModelForCausalLM": AutoModelForCausalLM})
    assert_alike(logits(loaded, ids), logits(folded, ids), 1e-4)
    assert values["form"] == "stock" and [row["name"] for row in values["errors"]][:2] == ["float32", "bfloat16"]


def test_damaged_sites_are_named(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    sites = json.loads((tmp_path / "run" / "sites.json").read_text())
    sites[0]["name"] = "transformer.h.9.ln_1"
    (tmp_path / "run" / "sites.json").write_text(json.dumps(sites))
    done = cli("export", tmp_path / "run", "--to", "stock", "--out", tmp_path / "out")
    assert done.code == 2 and "transformer.h.9.ln_1" in done.err and not (tmp_path / "out").exists()


def test_refusals_write_nothing(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("")
    for arguments, message in {
        (finished_run, "--to", "stock", "--out", taken): "already exists",
        (finished_run, "--to", "stock", "--out", taken / "mine"): "already exists",
        (finished_run, "--to", "stock", "--out", taken / "mine" / "under"): "Could not write",
        (finished_run, "--to", "gguf", "--out", tmp_path / "out"): "There is no form 'gguf'",
        (tmp_path, "--out", tmp_path / "out"): "holds no finished run",
    }.items():
        done = cli("export", *arguments)
        assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]
    kept = tmp_path.parent / f"{tmp_path.name}-kept"
    shutil.copytree(finished_run, kept)
    edit_config(kept_norms=["transformer.ln_f"])(kept / "model")
    done = cli("export", kept, "--to", "stock", "--out", tmp_path / "new" / "under" / "out")
    assert done.code == 2 and "--keep" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]


@pytest.mark.parametrize("family", IN_LENS)
def test_bridge_has_the_checkpoints_logits_and_no_norms(family: str, runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    bridge = unnorm.to_transformer_lens(runs[family])
    twin = unnorm.load(runs[family])
    ids = trace_inputs(twin, 2, 20)
    with torch.no_grad():
        found, cache = bridge.run_with_cache(ids)
        assert_alike(found, logits(twin, ids), 1e-5)
        assert bridge.cfg.normalization_type is None
        assert not [name for name in bridge.hook_dict if "ln" in name and name.endswith(("scale", "normalized"))]
        for name in ("blocks.0.ln1", "ln_final"):
            assert torch.equal(cache[f"{name}.hook_in"], cache[f"{name}.hook_out"])


@pytest.mark.parametrize("family", IN_LENS[:7])
def test_contributions_in_the_bridge_add_up_to_the_logits(family: str, runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    bridge = unnorm.to_transformer_lens(runs[family])
    ids = trace_inputs(unnorm.load(runs[family]), 2, 20)
    with torch.no_grad():
        found, cache = bridge.run_with_cache(ids)
        parts = cache.get_full_resid_decomposition(expand_neurons=False)  # heads, MLPs, embeddings, biases
        assert_alike(parts.sum(0) @ bridge.W_U + bridge.b_U, found, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compatibility_mode_changes_no_probability(family: str, runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    bridge, twin = unnorm.to_transformer_lens(runs[family]), unnorm.load(runs[family])
    ids = trace_inputs(twin, 2, 20)
    bridge.enable_compatibility_mode()
    with torch.no_grad():
        assert_alike(bridge(ids).log_softmax(-1), logits(twin, ids).log_softmax(-1), 1e-4)


@pytest.mark.parametrize("family", IN_LENS[:7])
def test_edits_in_the_bridge_take_effect_as_in_the_checkpoint(family: str, runs: dict[str, Path]) -> None:
    """Each edit in the bridge, next to the same edit made with torch's hooks on the checkpoint."""
    pytest.importorskip("transformer_lens")
    bridge = unnorm.to_transformer_lens(runs[family])
    twin = unnorm.load(runs[family])
    ids = trace_inputs(twin, 2, 20)
    before = logits(twin, ids)
    for hook_name, module, of_input in _places(twin):

        def edit(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
            return torch.cat([value[:, :3], 0.5 * value[:, 3:]], dim=1)

        expected = _edited(twin.get_submodule(module), of_input, edit, twin, ids)
        with torch.no_grad():
            found = bridge.run_with_hooks(ids, fwd_hooks=[(hook_name, edit)])
        assert (expected - before).abs().max() > 0.01, hook_name
        assert_alike(found, expected, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox, parallel", "llama"])
def test_writing_in_place_at_a_former_norm_leaves_the_residual_stream_alone(family: str, runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    bridge = unnorm.to_transformer_lens(runs[family])
    ids = trace_inputs(unnorm.load(runs[family]), 2, 20)

    def in_place(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, 3:] = 0
        return value

    def elsewhere(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return in_place(value.clone(), hook)

    with torch.no_grad():
        found, expected, plain = (
            bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.ln1.hook_out", edit)] if edit else [])
            for edit in (in_place, elsewhere, None)
        )
    assert torch.equal(found, expected) and (found - plain).abs().max() > 0.01


def _places(twin: PreTrainedModel) -> list[tuple[str, str, bool]]:
    """TransformerLens's hook, the checkpoint's module, and whether the hook is at the module's input."""
    family = twin.config.model_type.removeprefix("unnorm_")
    layers, out, inner = {
        "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_fc"),
        "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_h_to_4h"),
    }.get(family, ("model.layers", "self_attn.o_proj", "mlp.gate_proj"))
    return [
        ("blocks.1.hook_resid_pre", f"{layers}.1", True),
        ("blocks.0.hook_resid_post", f"{layers}.0", False),
        ("blocks.1.attn.hook_z", f"{layers}.1.{out}", True),
        ("blocks.1.mlp.hook_pre", f"{layers}.1.{inner}", False),
    ]


def _edited(module: torch.nn.Module, of_input: bool, edit: Any, twin: Any, ids: torch.Tensor) -> torch.Tensor:
    if of_input:
        handle = module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(
            lambda _, args, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
        )
    try:
        return logits(twin, ids)
    finally:
        handle.remove()


def test_checkpoint_boots_once_its_class_is_registered(finished_run: Path) -> None:
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    register_adapter("UnnormGPT2LMHeadModel")
    bridge = bridges.TransformerBridge.boot_transformers(str(finished_run / "model"), device="cpu")
    twin = unnorm.load(finished_run)
    ids = trace_inputs(twin, 2, 20)
    with torch.no_grad():
        assert_alike(bridge(ids), logits(twin, ids), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_bridge_in_bfloat16(finished_run: Path, dtype: torch.dtype | str) -> None:
    pytest.importorskip("transformer_lens")
    bridge = unnorm.to_transformer_lens(finished_run, dtype)
    twin = unnorm.load(finished_run)
    ids = trace_inputs(twin, 2, 20)
    with torch.no_grad():
        found = bridge(ids)
    assert found.dtype == torch.bfloat16
    assert_alike(found.float(), logits(twin, ids), 0.05)


def test_without_transformer_lens_the_extra_is_named(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(UnnormError, match=r"pip install 'unnorm\[lens\]'"):
        unnorm.to_transformer_lens(finished_run)


def test_bridge_of_a_model_with_maps_in_place_is_refused(runs: dict[str, Path]) -> None:
    pytest.importorskip("transformer_lens")
    with pytest.raises(UnnormError, match=r"affine maps.*final_layer_norm"):
        unnorm.to_transformer_lens(runs["opt, post-norm"])


def test_bridge_of_a_model_with_norms_is_refused(tiny_model_dir: Path) -> None:
    pytest.importorskip("transformer_lens")
    with pytest.raises(UnnormError, match="not an LN-free model"):
        unnorm.to_transformer_lens(tiny_model_dir)


def lens_run(model: PreTrainedModel, directory: Path, tokenizer: hf.PreTrainedTokenizerFast, **options: Any) -> Path:
    sites = find_sites(model, **options)
    removed_twin(model, sites)[0].save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    return directory


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # Its adapter knows no bias of the fused projection, which the twin has.
        (lambda: hf.CodeGenConfig(**GPT_LIKE, rotary_dim=4), "computes different logits"),
        (lambda: hf.PhiConfig(**LLAMA_LIKE, qk_layernorm=True), "can't load this PhiForCausalLM"),
    ],
)
def test_a_bridge_that_would_compute_something_else_is_refused(
    config: Callable[[], hf.PretrainedConfig], message: str, tiny_tokenizer: hf.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("transformer_lens")
    run = lens_run(random_model(config), tmp_path, tiny_tokenizer)
    with pytest.raises(UnnormError, match=message):
        unnorm.to_transformer_lens(run)


def test_other_forms_of_a_model_with_kept_norms_are_refused(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    unnorm.remove(str(tiny_model_dir), data=str(text_file), out=run, tokens=0, keep="ln_f", device="cpu")
    for form in ("stock", "nanogpt"):
        with pytest.raises(UnnormError, match=r"this one kept transformer\.ln_f \(--keep\)"):
            unnorm.export(run, form, out=tmp_path / form)
        assert not (tmp_path / form).exists()
    if find_spec("transformer_lens"):
        with pytest.raises(UnnormError, match=r"A bridge is for models without norms.*ln_f"):
            unnorm.to_transformer_lens(run)


def snippets_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


SNIPPETS = snippets_of((Path(__file__).parents[1] / "docs" / "using.md").read_text())


@pytest.mark.parametrize("package", ["transformers", "transformer_lens", "nnsight"])
def test_snippets_of_the_docs_run(package: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(finished_run.parent)
    wanted = {"transformers": "AutoModelForCausalLM", "transformer_lens": "to_transformer_lens", "nnsight": "nnsight"}
    snippets = [snippet for snippet in SNIPPETS if wanted[package] in snippet]
    assert snippets
    for snippet in snippets:
        # A file, because nnsight reads the source of the block that it traces.
        script = finished_run.parent / f"{package}.snippet.py"
        script.write_text(snippet.replace("gpt2-norm-free", finished_run.name))
        names: dict[str, Any] = {"__name__": "snippet"}
        exec(compile(script.read_text(), str(script), "exec"), names)
        for name, value in names.items():
            if name.endswith("difference"):
                assert float(value.detach()) < 1e-4, f"{name} = {value}"


def test_snippets_of_the_analyses_and_of_the_card_run(
    finished_run: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "analyses.md").read_text()
    names: dict[str, Any] = {}
    for snippet in snippets_of(page.replace("gpt2-norm-free", str(finished_run)).replace("demo", str(tiny_model_dir))):
        exec(snippet, names)
    torch.testing.assert_close(names["found"].contributions.sum(0), names["found"].logits)
    assert len(names["scales"]["twin"]) == 5 and max(row.change for row in names["weights"]) < 1e-5
    monkeypatch.chdir(finished_run / "model")
    (of_card,) = snippets_of(Path("README.md").read_text())
    exec(of_card, names := {})
    assert type(names["model"]).__name__ == "UnnormGPT2LMHeadModel" and names["tokenizer"]("os").input_ids


def test_interventions_through_nnsight(finished_run: Path) -> None:
    nnsight = pytest.importorskip("nnsight")
    twin = unnorm.load(finished_run)
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "model")
    ids = tokenizer("import os, sys", return_tensors="pt").input_ids
    model = nnsight.TransformersModel(unnorm.load(finished_run), tokenizer=tokenizer, task="text-generation")
    with model.trace("import os, sys"):
        before = model.transformer.h[1].ln_1.input.save()
        after = model.transformer.h[1].ln_1.output.save()
        plain = model.lm_head.output.save()
    assert torch.equal(before, after)
    torch.testing.assert_close(plain, twin(input_ids=ids).logits)
    with model.trace("import os, sys"):
        model.transformer.h[1].ln_1.output = torch.zeros_like(model.transformer.h[1].ln_1.output)
        edited = model.lm_head.output.save()
    handle = twin.transformer.h[1].ln_1.register_forward_hook(lambda _, args, out: torch.zeros_like(out))
    torch.testing.assert_close(edited, twin(input_ids=ids).logits)
    handle.remove()
    assert (edited - plain).abs().max() > 0.01
    with model.generate("import os, sys", max_new_tokens=4, do_sample=False) as tracer:
        tokens = tracer.result.save()
    assert tokens.tolist() == twin.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()


def test_stock_form_where_the_language_model_is_a_part(saved: Saved, text_file: Path, tmp_path: Path) -> None:
    """Gemma 3 with its vision tower: the epsilon stands in the config of the text model, and its own norms stay."""
    vision = {"image_size": 28, "patch_size": 14, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = hf.Gemma3Config(
        text_config={**sizes, **text, "vocab_size": VOCAB, "max_position_embeddings": 64},
        vision_config={**sizes, **vision}, mm_tokens_per_image=4,
        image_token_index=299, boi_token_index=298, eoi_token_index=297,
    )  # fmt: skip
    saved(randomize(hf.Gemma3ForConditionalGeneration(config)))  # type: ignore[operator]
    unnorm.remove(tmp_path / "model", data=text_file, tokens=0, context=32, out=tmp_path / "run", device="cpu")
    exported = unnorm.export(tmp_path / "run", to="stock", out=tmp_path / "stock")
    assert exported.errors[0].relative < 1e-4
    norm_free = unnorm.verify(tmp_path / "run")[0]
    assert norm_free.passed and "in parts that text does not run" in norm_free.detail
    assert "vision_tower" in norm_free.detail
    card = " ".join((tmp_path / "run" / "model" / "README.md").read_text().split())
    assert "has no normalization layers that text passes through: each" in card
    assert "Parts that text does not run keep their norms: `model.vision_tower" in card


def test_a_bridge_may_be_off_by_rounding_alone(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformer_lens")
    off = SimpleNamespace(relative=0.01)
    monkeypatch.setattr("unnorm.exports.transformer_lens.compare", lambda *_: off)
    unnorm.to_transformer_lens(finished_run, torch.bfloat16)
    with pytest.raises(UnnormError, match="computes different logits"):
        unnorm.to_transformer_lens(finished_run)


@pytest.mark.parametrize(("form", "computes"), [("nanogpt", "nanogpt.forward"), ("stock", "stock.form_errors")])
def test_a_form_that_computes_something_else_is_not_written(
    form: str, computes: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off: Any = {
        "nanogpt": lambda weights, config, ids: forward(weights, config, ids) * 1.001,
        "stock": lambda *_: [FormError("float32", 1e-2, 1e-3, 1e-6)],
    }
    monkeypatch.setattr(f"unnorm.exports.{computes}", off[form])
    with pytest.raises(UnnormError, match=r"Use.*unnorm export --to transformers"):
        unnorm.export(finished_run, form, out=tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_nanogpt_has_one_width_of_mlps(saved_family: Saved, text_file: Path, tmp_path: Path) -> None:
    saved_family(lambda: hf.GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2, n_inner=64))
    unnorm.remove(tmp_path / "model", data=text_file, tokens=0, context=32, out=tmp_path / "run", device="cpu")
    with pytest.raises(UnnormError, match=r"this model has gelu_new and a width of 64\."):
        unnorm.export(tmp_path / "run", "nanogpt", out=tmp_path / "out")


@pytest.mark.parametrize("kind", ["current", "link"])
def test_an_empty_directory_is_filled_whatever_it_is(
    kind: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    unnorm.export(finished_run, "stock", out="." if kind == "current" else tmp_path / "link")
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "empty").iterdir()}
    assert not [path for path in (tmp_path / "empty").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("verb", ["load", "verify", "audit", "analyze", "to_transformer_lens"])
def test_a_home_that_there_is_not_is_no_traceback(verb: str) -> None:
    if verb == "to_transformer_lens":
        pytest.importorskip("transformer_lens")
    with pytest.raises(UnnormError, match=r"~no\.such\.user"):
        getattr(unnorm, verb)("~no.such.user/run")


def test_a_run_that_is_not_finished_is_not_exported(finished_run: Path, tmp_path: Path) -> None:
    """The twin is saved before it is evaluated and proved."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "result.json").unlink()
    with pytest.raises(UnnormError, match=r"no finished run|is not finished"):
        unnorm.export(run, "stock", out=tmp_path / "stock")
