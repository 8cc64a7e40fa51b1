"""Limits on neurons: which MLPs get them, what they hold, and that they travel with every form of the twin."""

import json
import math
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import VOCAB, Cli, small_llama
from tests.families import FAMILIES, random_model
from tests.massive import (
    BEHIND,
    BLOCKS,
    GEMMA3,
    GPT2,
    IDS,
    LLAMA,
    RARE,
    planted_files,
    read,
    with_massive,
    with_massive_before_a_norm,
)
from tests.running import ctrl_c_at, loaded_without_unnorm
from unnorm.calibration.limits import COMMON, ROOM, measure_limits, quadratic_writers, set_limits, share_at_limit
from unnorm.calibration.scales import collect_log_scales, set_constants
from unnorm.folding.checkpoint import load_unfolded, save_limits
from unnorm.modeling.modeling_unnorm import limit_neurons, limits_of
from unnorm.models.probe import trace_inputs
from unnorm.models.running import copy_model
from unnorm.run_directory import LIMITS
from unnorm.sites.find import find_sites, norm_modules
from unnorm.taper.stand_ins import install
from unnorm.terminal.removal import result_table

QUADRATIC = (
    *("stablelm", "llama", "mistral", "qwen2", "smollm3", "qwen3", "gemma", "olmo", "cohere", "nemotron"),
    *("gemma2", "gemma3", "olmo2"),  # A norm follows the MLP.
)
LINEAR = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "falcon", "phi", "starcoder2", "gpt_bigcode", "bloom")
WRITERS = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
TOKENS = 2048


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.partition(",")[0] in QUADRATIC + LINEAR])
def test_gated_and_squared_mlps_are_told_from_others_by_running(family: str) -> None:
    model = random_model(FAMILIES[family][0]).float().eval()
    before = model(input_ids=trace_inputs(model)).logits
    layers = {name.split(".")[2] for name in quadratic_writers(model, find_sites(model))}
    assert layers == ({"0", "1"} if family.partition(",")[0] in QUADRATIC else set())
    assert torch.equal(model(input_ids=trace_inputs(model)).logits, before)


def test_limits_are_those_of_the_equation() -> None:
    original = small_llama()
    limits = measure_limits(original, dict.fromkeys(WRITERS), {}, BLOCKS)
    assert list(limits) == WRITERS
    for name, limit in limits.items():
        torch.testing.assert_close(limit, ROOM * largest_of(read(original, name)))


def largest_of(neurons: Tensor) -> Tensor:
    """Of each neuron, but at least that of `COMMON` of them."""
    largest = neurons.abs().amax((0, 1))
    return largest.clamp(min=float(largest.quantile(COMMON)))


@pytest.mark.parametrize("constant", [0.5, 10.0])
def test_before_a_norm_they_are_also_those_of_what_a_neuron_adds_with_its_constant(constant: float) -> None:
    original = with_massive_before_a_norm()
    student = copy_model(original)
    sites = find_sites(original)
    stand_ins = install(student, sites)
    writers = quadratic_writers(original, sites)
    assert writers[GEMMA3.outgoing] == BEHIND
    log_scales = collect_log_scales(student, sites, BLOCKS)
    set_constants(stand_ins, log_scales, "mean")
    for stand_in in stand_ins.values():
        stand_in.log_constant += math.log(constant)
    neurons = read(original, GEMMA3.outgoing)
    scales = log_scales[BEHIND].exp().unsqueeze(-1)
    own, with_constant = ROOM * largest_of(neurons), largest_of(neurons * stand_ins[BEHIND].constant / scales)
    limits = measure_limits(original, writers, stand_ins, BLOCKS)
    torch.testing.assert_close(limits[GEMMA3.outgoing], torch.minimum(own, with_constant))
    assert (with_constant < own).all() == (constant < 10)


def test_nothing_changes_where_no_limit_is_reached() -> None:
    original = small_llama()
    student = copy_model(original)
    sites = find_sites(original)
    assert set_limits(student, original, sites, {}, BLOCKS) == WRITERS
    assert torch.equal(student(input_ids=IDS).logits, original(input_ids=IDS).logits)
    assert share_at_limit(student, BLOCKS) == 0
    assert share_at_limit(original, BLOCKS) is None


def test_the_share_at_the_limit_counts_both_signs() -> None:
    model = small_llama()
    neurons = read(model, WRITERS[0])
    limit_neurons(model, WRITERS[:1])
    limits_of(model)[WRITERS[0]].fill_(float(neurons.abs().median()))
    assert share_at_limit(model, BLOCKS) == pytest.approx(0.5, abs=0.01)


def test_no_neuron_writes_more_than_its_limit_and_its_gradient_stops_there() -> None:
    model = small_llama()
    limit_neurons(model, WRITERS[:1])
    limit = limits_of(model)[WRITERS[0]]
    limit.fill_(0.01)
    mlp = model.model.layers[0].mlp
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e-3
    neurons = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).detach()
    held = neurons.clamp(-0.01, 0.01)
    assert (neurons.abs() > 0.01).any()
    torch.testing.assert_close(mlp(x), held @ mlp.down_proj.weight.T)
    mlp(x).sum().backward()
    # A neuron that is held for every token learns nothing from them.
    always = (neurons.abs() > 0.01).all(0)
    given = mlp.up_proj.weight.grad.abs().sum(1)
    assert not given[always].any()
    assert given[~always].all()
    assert 0 < (share_at_limit(model, BLOCKS) or 0) <= 1
    # What overflows on the way is held as well.
    assert mlp(torch.full((1, 32), 1e30)).isfinite().all()


def test_without_norms_a_long_token_overflows_unless_neurons_have_limits() -> None:
    original = small_llama()
    sites = find_sites(original)
    students = [copy_model(original), copy_model(original)]
    set_limits(students[1], original, sites, {}, BLOCKS)
    logits = []
    for student in students:
        for stand_in in install(student, sites).values():
            stand_in.removed = True
        with torch.no_grad():
            student.get_input_embeddings().weight[RARE] *= 1e7
            logits.append(student(input_ids=IDS).logits)
    assert not logits[0].isfinite().all()
    assert logits[1].isfinite().all()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Of a run on a Llama with a massive activation."""
    files = planted_files(tmp_path_factory.mktemp("llama"), with_massive(small_llama(), LLAMA), tiny_tokenizer)
    return {**files, "tokens": TOKENS, "device": "cpu", "dtype": "float32", "kl_budget": 100.0}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> Path:
    """A finished run whose twin's neurons have limits; don't change it."""
    out = tmp_path_factory.mktemp("limited") / "run"
    unnorm.remove(out=out, **options)
    return out


def test_a_run_on_a_gated_model_with_massive_activations_leaves_limits_and_says_so(limited: Path) -> None:
    result = json.loads((limited / "result.json").read_text())
    assert result["massive_neurons"]
    assert (result["limited_neurons"], result["norm_modules_left"], result["verified"]) == (3 * 64, 0, True)
    assert 0 <= result["share_at_limit"] < 1
    for page in (limited / "report.html", limited / "model" / "README.md"):
        assert "192 neurons of quadratic MLPs, reached by " in page.read_text()
    twin, unfolded = unnorm.load(limited), load_unfolded(limited)
    assert list(limits_of(twin)) == list(limits_of(unfolded)) == twin.config.limited_neurons == WRITERS
    for ours, theirs in zip(limits_of(twin).values(), limits_of(unfolded).values(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()
    assert norm_modules(twin) == []


def test_a_gated_model_that_overflows_without_its_norms_gets_limits_whatever_its_neurons_write(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = small_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(torch.logspace(-9, 9, len(tiny_tokenizer))[:, None])
    phases: list[str] = []
    settings: dict[str, Any] = {"tokens": TOKENS, "device": "cpu", "dtype": "float32", "kl_budget": 100.0}
    result = unnorm.remove(
        **planted_files(tmp_path, model, tiny_tokenizer),
        **settings,
        out=tmp_path / "run",
        watch=lambda row: phases.append(row.get("text", "")),
    )
    assert any("the model overflows" in phase for phase in phases)
    assert result["massive_neurons"] == []
    assert (result["limited_neurons"], result["norm_modules_left"]) == (3 * 64, 0)


def test_a_bridge_with_limits_can_be_moved_to_another_dtype(limited: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens")
    run = lowered(limited, tmp_path / "run")
    twin = unnorm.load(run)
    bridge = unnorm.to_transformer_lens(run).to(torch.bfloat16)
    ids = torch.tensor(BLOCKS["input_ids"][:2])
    with torch.no_grad():
        found, cache = bridge.run_with_cache(ids)
        expected = twin.to(torch.bfloat16)(input_ids=ids).logits
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.05 * float(expected.abs().max()))
    limit = next(iter(limits_of(twin).values()))
    assert bool((cache["blocks.0.mlp.hook_post"].abs() <= limit.to(torch.bfloat16)).all())


def lowered(run: Path, copy: Path) -> Path:
    """A copy of a run whose folded model has limits so low that many activations are held."""
    shutil.copytree(run, copy)
    twin = unnorm.load(copy)
    for limit in limits_of(twin).values():
        limit /= 100
    assert (share_at_limit(twin, BLOCKS) or 0) > 0.1
    twin.save_pretrained(copy / "model")
    return copy


def test_the_proof_holds_where_limits_do(limited: Path, tmp_path: Path) -> None:
    run = lowered(limited, tmp_path / "run")
    failed = [check.name for check in unnorm.verify(run) if not check.passed]
    assert failed == ["weights = those of the fold", "checkpoint = unfolded, float32"]
    save_limits(limits_of(unnorm.load(run)), run / "unfolded")
    assert all(check.passed for check in unnorm.verify(run))


def test_limits_travel_to_where_unnorm_is_not_installed(limited: Path, tmp_path: Path) -> None:
    name, last_logits, _ = loaded_without_unnorm(limited / "model", tmp_path / "again", tmp_path / "modules")
    assert name == "UnnormLlamaForCausalLM"
    model, again = unnorm.load(limited), unnorm.load(tmp_path / "again")
    ids = AutoTokenizer.from_pretrained(limited / "model")("def read(self):", return_tensors="pt").input_ids
    # Threads, and so the order of sums, are that process's own.
    torch.testing.assert_close(last_logits, model(input_ids=ids).logits[0, -1], rtol=0, atol=1e-4)
    for ours, theirs in zip(limits_of(model).values(), limits_of(again).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loaded_twin_that_lost_its_limits_is_refused(limited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a quantizer puts a module of its own where the limit was."""
    load = LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def quantized(cls: Any, *args: Any, **more: Any) -> Any:
        model = load(cls, *args, **more)
        projection = model.model.layers[1].mlp.down_proj
        model.model.layers[1].mlp.down_proj = nn.Linear(projection.in_features, projection.out_features, bias=False)
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(quantized))
    with pytest.raises(ValueError, match=r"neurons of model\.layers\.1\.mlp\.down_proj lost their limits"):
        AutoModelForCausalLM.from_pretrained(limited / "model")


def test_a_twin_with_limits_is_not_split_by_tensor_parallelism(limited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def split(cls: Any, *args: Any, **more: Any) -> Any:
        model = load(cls, *args, **more)
        model._tp_size = 2
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(split))
    with pytest.raises(ValueError, match="tensor parallelism does not split"):
        AutoModelForCausalLM.from_pretrained(limited / "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_limits_hold_in_every_precision(limited: Path, dtype: torch.dtype) -> None:
    model = unnorm.load(limited, dtype=dtype)
    assert {limit.dtype for limit in limits_of(model).values()} == {dtype}
    assert model(input_ids=torch.randint(VOCAB, (2, 12))).logits.isfinite().all()


def test_healing_keeps_them(limited: Path, tmp_path: Path) -> None:
    said: list[Any] = []
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "watch": lambda row: said.append(row.get("text"))}
    result = unnorm.heal(limited, tokens=1024, out=tmp_path / "healed", **settings)
    assert not [text for text in said if "limits" in str(text)]
    assert (result["limited_neurons"], result["verified"]) == (3 * 64, True)
    before, after = limits_of(unnorm.load(limited)), limits_of(unnorm.load(tmp_path / "healed"))
    assert all(torch.equal(before[name], after[name]) for name in WRITERS)


def test_a_twin_without_them_gets_them_when_it_is_healed_with(options: dict[str, Any], tmp_path: Path) -> None:
    result = unnorm.remove(out=tmp_path / "run", neuron_limits=False, **options)
    assert (result["limited_neurons"], result["share_at_limit"], result["verified"]) == (0, None, True)
    assert not (tmp_path / "run" / "unfolded" / LIMITS).exists()
    plain = unnorm.heal(tmp_path / "run", tokens=1024, out=tmp_path / "plain", device="cpu", dtype="float32")
    assert plain["limited_neurons"] == 0  # As the run was asked to.
    said: list[Any] = []
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "watch": lambda row: said.append(row.get("text"))}
    healed = unnorm.heal(tmp_path / "run", tokens=1024, out=tmp_path / "healed", neuron_limits=True, **settings)
    assert "set limits on the neurons of 3 quadratic MLPs" in said
    assert (healed["limited_neurons"], healed["verified"]) == (3 * 64, True)


def test_an_interrupted_run_has_them_again(limited: Path, options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"

    with pytest.raises(unnorm.UnnormError, match="--resume"):
        unnorm.remove(out=out, watch=ctrl_c_at(2), **options)
    unnorm.remove(resume=True, out=out)
    once, again = unnorm.load(limited), unnorm.load(out)
    for (name, ours), (_, theirs) in zip(once.state_dict().items(), again.state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_the_summary_has_a_row_for_them(limited: Path) -> None:
    result = json.loads((limited / "result.json").read_text())
    shown = StringIO()
    Console(file=shown, width=120).print(result_table(result))
    assert re.search(r"neurons with limits *│ *192 *│ reached by [\d.e-]+% of activations", shown.getvalue())
    Console(file=shown, width=120).print(result_table({**result, "limited_neurons": 0, "share_at_limit": None}))
    assert shown.getvalue().count("neurons with limits") == 1


def test_models_whose_mlps_are_not_quadratic_get_none(tiny_model: PreTrainedModel) -> None:
    planted = with_massive(tiny_model, GPT2)
    student = copy_model(planted)
    assert set_limits(student, planted, find_sites(planted), {}, BLOCKS) == []
    assert limits_of(student) == {}


def booted(run: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    from unnorm.exports.transformer_lens import register_adapter, show_limits

    register_adapter("UnnormLlamaForCausalLM")
    bridge = TransformerBridge.boot_transformers(str(run / "model"), device="cpu")
    show_limits(bridge)
    return bridge


@pytest.mark.parametrize("bridged", [unnorm.to_transformer_lens, booted])
def test_transformer_lens_shows_what_the_mlp_writes(
    bridged: Callable[[Path], Any], limited: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformer_lens")
    run = lowered(limited, tmp_path / "run")
    model, bridge = unnorm.load(run), bridged(run)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(IDS)
        torch.testing.assert_close(logits, model(input_ids=IDS).logits)
    for layer, (name, limit) in enumerate(limits_of(model).items()):
        neurons, written = cache[f"blocks.{layer}.mlp.hook_post"], cache[f"blocks.{layer}.hook_mlp_out"]
        assert (neurons.abs() <= limit).all()
        assert (neurons.abs() == limit).any()
        torch.testing.assert_close(neurons @ model.get_submodule(name).weight.T, written)


def test_damaged_limits_are_refused(limited: Path, tmp_path: Path, cli: Cli) -> None:
    run = shutil.copytree(limited, tmp_path / "run")
    path = run / "unfolded" / LIMITS
    whole = path.read_bytes()
    for damaged in (None, whole[: len(whole) // 2], b""):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        result = cli("verify", str(run))
        assert result.code == 2
        assert "limits.safetensors' is damaged" in result.err
        assert "Traceback" not in result.err


def test_the_stock_form_is_refused_with_the_remedy(limited: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("export", str(limited), "--to", "stock", "--out", str(tmp_path / "stock"))
    assert result.code == 2
    assert "--no-neuron-limits" in result.err
    assert "unnorm export --to transformers" in result.err
    assert not (tmp_path / "stock").exists()
    assert cli("export", str(limited), "--out", str(tmp_path / "folded")).code == 0
    assert list(limits_of(unnorm.load(tmp_path / "folded"))) == WRITERS


def test_a_twin_with_them_is_analyzed(limited: Path, options: dict[str, Any]) -> None:
    result = unnorm.analyze(limited, what=["geometry", "scales"], tokens=256, data=options["data"], device="cpu")
    assert result["findings"].keys() == {"geometry", "scales"}
