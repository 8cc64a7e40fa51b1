"""The command and its page: what it leaves out, refuses and leaves as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoTokenizer, JetMoeConfig, PreTrainedModel

import unnorm
from tests.analysis.models import PAIRS, logits, original_of
from tests.conftest import Cli, Saved, with_other_tokens
from tests.families import float64_copy
from unnorm.analysis.analyze import ANALYSES
from unnorm.analysis.attribution import attribute
from unnorm.analysis.lens import lens
from unnorm.analysis.neurons import ablate, output_weights
from unnorm.analysis.patching import patch
from unnorm.analysis.sinks import sinks
from unnorm.errors import UnnormError
from unnorm.models.probe import trace_inputs
from unnorm.models.running import copy_model


def test_states_that_a_model_keeps_from_its_last_pass_are_copied_without_its_graph(tiny_model: PreTrainedModel) -> None:
    """As RecurrentGemma keeps some."""
    model = copy_model(tiny_model)
    model.transformer.state = model.lm_head.weight * 2  # type: ignore[union-attr]
    copy = float64_copy(model)
    assert copy.dtype == torch.float64 and copy.transformer.state.grad_fn is None  # type: ignore[union-attr]


def test_what_cannot_be_known_is_said(runs: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs["gemma2"] / "model")
    gemma = original_of(runs["gemma2"])  # a norm follows each attention
    ids = trace_inputs(gemma, 1, 8)
    kinds = [part.kind for part in attribute(gemma, ids).parts]
    assert "head" not in kinds and kinds.count("attention") == 2 and not attribute(gemma, ids).neurons
    with pytest.raises(UnnormError, match="heads of Gemma2ForCausalLM can't be separated"):
        patch(gemma, tokenizer, PAIRS)
    with pytest.raises(UnnormError, match="neurons of Gemma2ForCausalLM can't be separated"):
        output_weights(gemma)
    assert patch(unnorm.load(runs["gemma2"]), tokenizer, PAIRS).activation.shape == (4, 2, 4)
    with pytest.raises(UnnormError, match="not a plain sum"):
        attribute(original_of(runs["opt, post-norm"]), ids)
    with pytest.raises(UnnormError, match="something lies between"):
        attribute(unnorm.load(runs["opt, projected"]), ids)
    mixtral = unnorm.load(runs["mixtral"])
    found = attribute(float64_copy(mixtral), trace_inputs(mixtral, 1, 8))
    assert found.neurons == {}
    torch.testing.assert_close(found.contributions.sum(0), found.logits, rtol=0, atol=1e-10)
    with pytest.raises(UnnormError, match="neurons of UnnormMixtralForCausalLM"):
        output_weights(mixtral)


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
    assert "patching left out: Too few people's names" in done.out and "sink rate" in done.out
    assert (tmp_path / "run" / "analysis" / "analysis.html").is_file()
    done = cli("analyze", tmp_path / "run", "--what", "sinks", "--what", "lens", "--tokens", 128, "--json")
    assert list(json.loads(done.out)["findings"]) == ["sinks", "lens"]
    done = cli("analyze", tmp_path / "run", "--what", "patching", "--tokens", 128)
    assert done.code == 2 and "no prompts can be generated" in done.err


def test_from_python(finished_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = unnorm.analyze(finished_run, str(tiny_model_dir), what=["geometry"], tokens=128, out=tmp_path)
    assert Path(result["page"]).is_file() and len(result["findings"]["geometry"]["weights"]) == 5


def test_bad_input_is_refused(
    finished_run: Path, runs: dict[str, Path], tiny_model_dir: Path, text_file: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    for arguments, message in {
        (tmp_path,): "holds no finished run",
        (tiny_model_dir,): "holds no finished run",
        (finished_run, "--what", "magic"): "There is no analysis 'magic'. Choose from attribution, patching",
        (finished_run, "--against", "demo"): "has 300 token embeddings and 'demo' has 4,096: their vocabularies differ",
        (finished_run, "--against", runs["llama"].parent / "model"): "is a LlamaForCausalLM, but the twin was a GPT2LM",
        (
            runs["llama"],
            "--against",
            runs["llama, tied, biased"].parent / "model",
        ): "and the twin are built differently",
        (finished_run, "--against", finished_run): "is a UnnormGPT2LMHeadModel, but the twin was a GPT2LMHeadModel",
        (finished_run, "--against", tmp_path / "nowhere"): "No model",
        (finished_run, "--against", with_other_tokens(tiny_model_dir, tmp_path / "other")): "different tokenizers",
        (finished_run, "--prompts", tmp_path / "nowhere.jsonl"): "Could not read the prompts",
        (finished_run, "--data", tmp_path / "nowhere.txt"): "nowhere.txt",
        (finished_run, "--context", 65): "longer than the 64 tokens",
        (finished_run, "--tokens", 1): "at least 2 tokens",
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


def test_experts_of_any_kind_are_parts_of_the_sum(saved_family: Saved, text_file: Path, tmp_path: Path) -> None:
    """JetMoE's attention is experts too, and both give their router's logits besides."""
    config = JetMoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2,
        kv_channels=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    saved_family(lambda: config)
    options: dict[str, Any] = {"data": text_file, "context": 32, "device": "cpu"}
    run = tmp_path / "run"
    assert unnorm.remove(tmp_path / "model", tokens=0, in_place=True, out=run, **options)["verified"]
    (check,) = [check for check in unnorm.verify(run) if check.name.startswith("contributions")]
    assert check.passed and check.detail.startswith("relative; 5 contributions")
    result = unnorm.analyze(run, tokens=128, **options)
    assert result["findings"]["attribution"]["twin"]["sum_error"] < 1e-10 and "geometry" in result["findings"]


def test_stacked_experts_are_no_reason_to_lose_the_other_analyses(runs: dict[str, Path], text_file: Path) -> None:
    result = unnorm.analyze(runs["mixtral"], data=str(text_file), tokens=256, context=32, device="cpu")
    assert {"attribution", "geometry"} <= result["findings"].keys()


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


@pytest.mark.parametrize("measure", [attribute, lens, sinks])
def test_ids_that_are_more_than_the_model_takes_are_refused(measure: Any, finished_run: Path) -> None:
    with pytest.raises(UnnormError, match=r"A sequence has 65 tokens, but the model takes 64\."):
        measure(unnorm.load(finished_run), torch.zeros(1, 65, dtype=torch.long))


NO_WEIGHTS, NO_SUM = "does not return the attention weights", "more than a sum of its modules'"
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
ODD: dict[str, tuple[Any, str | None, dict[str, str]]] = {
    "bloom, residual after the norm": (
        hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True), None, {},
    ),
    "rwkv, no heads": (
        hf.RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=64), None,
        {"sinks": NO_WEIGHTS},
    ),
    "bamba, gated norms kept": (
        hf.BambaConfig(
            **SMALL, num_attention_heads=4, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2,
            mamba_d_state=8,
        ),
        r"mamba\.norm$", {},
    ),
    "ctrl, positions that no module writes": (
        hf.CTRLConfig(n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=64), None, {"attribution": NO_SUM},
    ),
    "laguna, other heads in each layer": (
        hf.LagunaConfig(
            **SMALL, num_attention_heads=4, num_attention_heads_per_layer=[4, 8], head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        ),
        None, {"sinks": NO_WEIGHTS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ODD)
def test_odd_layouts_are_analyzed_as_far_as_they_go(
    layout: str, saved_family: Saved, text_file: Path, tmp_path: Path
) -> None:
    config, keep, skipped = ODD[layout]
    saved_family(lambda: config)
    options: dict[str, Any] = {"data": text_file, "tokens": 0, "context": 32, "in_place": True, "keep": keep}
    unnorm.remove(tmp_path / "model", out=tmp_path / "run", device="cpu", **options)
    found = unnorm.analyze(tmp_path / "run", tokens=256, device="cpu")
    assert found["findings"].keys() | found["skipped"].keys() == ANALYSES.keys()
    for name, reason in skipped.items():
        assert reason in found["skipped"][name]
    assert "attribution" in skipped or "attribution" in found["findings"]


def test_functions_of_a_model_run_it_without_dropout(runs: dict[str, Path]) -> None:
    """As a model is that comes from a Trainer; its modules' modes are not touched."""
    twin = unnorm.load(runs["gpt2"])
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    ids = trace_inputs(twin, 2, 16)

    def found() -> list[torch.Tensor]:
        return [attribute(twin, ids).contributions, sinks(twin, ids).share, lens(twin, ids).loss]

    expected = found()
    twin.train()
    twin.transformer.h[0].eval()
    for value, known in zip(found(), expected, strict=True):
        torch.testing.assert_close(value, known)
    (empty,) = ablate(twin, [ids], [torch.tensor([], dtype=torch.long)])
    assert float(empty.loss.abs().max()) < 1e-6
    assert twin.training and twin.transformer.h[1].training and not twin.transformer.h[0].mlp.training


def test_a_wrapped_twin_is_not_said_to_be_without_norms(runs: dict[str, Path]) -> None:
    twin = unnorm.load(runs["gpt2"])
    with pytest.raises(UnnormError, match=r"wraps a twin.*_orig_mod"):
        attribute(torch.compile(twin, backend="eager"), trace_inputs(twin, 1, 8))


def test_text_is_as_long_as_the_twin_was_trained_on(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    unnorm.remove(tiny_model_dir, data=text_file, tokens=0, context=16, device="cpu", out=tmp_path / "run")
    assert unnorm.analyze(tmp_path / "run", what="scales", tokens=64)["context"] == 16
    assert unnorm.analyze(tmp_path / "run", what="scales", tokens=64, context=32)["context"] == 32
