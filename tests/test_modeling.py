"""LN-free checkpoints in transformers: loading, generating, re-saving, precisions."""

import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import unnorm
from tests.conftest import VOCAB, Cli
from tests.running import loaded_without_unnorm
from tests.texts import begin_texts
from unnorm.exports import measure
from unnorm.folding import fold
from unnorm.folding.checkpoint import load_sites, load_unfolded
from unnorm.folding.fold import fold_reader
from unnorm.modeling import modeling_unnorm
from unnorm.models.load import load_original, texts_begin_with
from unnorm.models.probe import trace_inputs
from unnorm.proof import verify as proof
from unnorm.proof.verify import check_twin
from unnorm.sites.find import norm_modules
from unnorm.sites.tracing import stream_sources
from unnorm.taper.norms import TaperedNorm


def test_loads_where_unnorm_is_not_installed(finished_run: Path, tmp_path: Path) -> None:
    name, last_logits, generated = loaded_without_unnorm(
        finished_run / "model", tmp_path / "again", tmp_path / "modules"
    )
    assert name == "UnnormGPT2LMHeadModel"
    model = unnorm.load(finished_run)
    ids = AutoTokenizer.from_pretrained(finished_run / "model")("def read(self):", return_tensors="pt").input_ids
    torch.testing.assert_close(last_logits, model(input_ids=ids).logits[0, -1])
    assert generated == model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
    # What it saved again is a whole checkpoint of the same kind.
    resaved = unnorm.load(tmp_path / "again")
    torch.testing.assert_close(resaved(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (tmp_path / "again" / "modeling_unnorm.py").is_file()


def test_auto_classes_load_it_without_the_flag(finished_run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished_run / "model")
    assert norm_modules(model) == []
    assert unnorm.load(finished_run / "model").config.removed_norms == model.config.removed_norms


def test_the_trainer_knows_it_for_a_causal_language_model(finished_run: Path, tmp_path: Path) -> None:
    """With label smoothing it shifts labels itself, by the name of the class."""
    twin = unnorm.load(finished_run)
    trainer = Trainer(twin, TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True))
    ids = trace_inputs(twin, 2, 16)
    with torch.no_grad():
        log_p = twin(input_ids=ids).logits[:, :-1].log_softmax(-1)
        loss = trainer.compute_loss(twin, {"input_ids": ids, "labels": ids})
    nll = -log_p.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, 0.9 * nll - 0.1 * log_p.mean())


def test_generates_the_same_with_and_without_cache(finished_run: Path) -> None:
    model = unnorm.load(finished_run)
    prompt = trace_inputs(model, 2, 9)
    with_cache, without = (
        model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert with_cache.tolist() == without.tolist()
    assert model.config.use_cache
    step = model(input_ids=prompt[:, :5], use_cache=True)
    rest = model(input_ids=prompt[:, 5:], past_key_values=step.past_key_values)
    torch.testing.assert_close(rest.logits, model(input_ids=prompt).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_left_padding_in_a_batch_changes_nothing(finished_run: Path) -> None:
    model = unnorm.load(finished_run)
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "model", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["import os", "def walk(top, topdown=True, onerror=None):"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, text in zip(together, texts, strict=True):
        alone = model.generate(
            **tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert row[-8:].tolist() == alone[0, -8:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_in_every_precision(finished_run: Path, dtype: torch.dtype) -> None:
    model, exact = unnorm.load(finished_run, dtype=dtype), unnorm.load(finished_run)
    ids = trace_inputs(model, 2, 12)
    logits = model(input_ids=ids).logits
    assert logits.dtype == dtype
    expected = exact(input_ids=ids).logits
    error = float(((logits.float() - expected).abs().max() / expected.abs().max()).detach())
    assert error < {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


def test_unembedding_is_its_own(finished_run: Path) -> None:
    model = unnorm.load(finished_run)
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    assert model.lm_head.bias is not None
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_round_trip_of_the_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    model = unnorm.load(finished_run)
    model.save_pretrained(tmp_path)
    again = unnorm.load(tmp_path)
    for (name, first), (other, second) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(first, second)


def test_anyone_can_rebuild_the_unfolded_model(finished_run: Path) -> None:
    """From `sites.json` and the stock class alone: every norm divided by its constant scale."""
    stock = GPT2LMHeadModel.from_pretrained(finished_run / "unfolded")
    for site in json.loads((finished_run / "sites.json").read_text()):
        norm = stock.get_submodule(site["name"])
        norm.forward = lambda x, norm=norm, c=site["constant_scale"]: (
            (x - x.mean(-1, keepdim=True)) / c * norm.weight + norm.bias
        )
    ids = trace_inputs(stock, 2, 16)
    torch.testing.assert_close(unnorm.load(finished_run)(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_verify_passes_then_fails_on_a_changed_weight(finished_run: Path, tmp_path: Path) -> None:
    assert all(check.passed for check in unnorm.verify(finished_run))
    broken = tmp_path / "broken"
    shutil.copytree(finished_run, broken)
    model = unnorm.load(broken)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] += 0.05
    model.save_pretrained(broken / "model")
    failed = [check.name for check in unnorm.verify(broken) if not check.passed]
    assert failed == ["weights = those of the fold", "checkpoint = unfolded, float32"]


@pytest.mark.parametrize("weight", ["transformer.wte.weight", "transformer.wpe.weight"])
def test_verify_looks_at_weights_that_few_tokens_read(weight: str, finished_run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(finished_run, broken)
    model = unnorm.load(broken)
    unread = next(i for i in range(VOCAB) if i not in trace_inputs(model, 2, 16)) if "wte" in weight else -1
    with torch.no_grad():
        model.get_parameter(weight)[unread] *= 1.0001
    model.save_pretrained(broken / "model")
    (failed,) = [check for check in unnorm.verify(broken) if not check.passed]
    assert failed.name == "weights = those of the fold" and failed.detail.endswith(weight)
    assert failed.value > failed.limit


def test_verify_wants_every_weight_of_the_fold_and_no_other(finished_run: Path) -> None:
    twin = unnorm.load(finished_run)
    del twin.lm_head._parameters["bias"]
    twin.lm_head.register_parameter("bias", None)
    checks = {check.name: check for check in check_twin(twin, load_unfolded(finished_run), load_sites(finished_run)[0])}
    failed = checks["weights = those of the fold"]
    assert failed.value == math.inf and failed.detail.endswith("lm_head.bias")


def test_verify_knows_what_code_a_checkpoint_brings_along(finished_run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(finished_run, broken)

    def failed() -> list[str]:
        return [check.detail for check in unnorm.verify(broken) if not check.passed]

    with (broken / "model" / "modeling_unnorm.py").open("a") as file:
        file.write("\n# Edited.\n")
    assert failed() == [
        "modeling_unnorm.py is not this version's; `unnorm.load(DIR).save_pretrained(DIR/model)` writes that"
    ]
    unnorm.load(broken).save_pretrained(broken / "model")
    assert failed() == []
    (broken / "model" / "custom_generate").mkdir()
    (broken / "model" / "custom_generate" / "generate.py").write_text("")
    *_, row = unnorm.verify(broken)
    differences = "number of differences from the code that trust_remote_code=True runs"
    assert row.passed and row.detail == f"{differences}, besides custom_generate/generate.py"
    settings = broken / "model" / "tokenizer_config.json"
    plain = settings.read_text()
    settings.write_text(json.dumps(json.loads(plain) | {"auto_map": {"AutoTokenizer": [None, "other/repo--tok.Tok"]}}))
    assert failed() == ["tokenizer_config.json names code that is not beside it: other/repo--tok.Tok"]
    settings.write_text(plain)
    (broken / "model" / "modeling_unnorm.py").unlink()
    assert failed() == ["there is no modeling_unnorm.py"]
    config = json.loads((broken / "model" / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other.Model"
    (broken / "model" / "config.json").write_text(json.dumps(config))
    assert failed() == ["there is no modeling_unnorm.py; config.json names other classes to load"]


def test_verify_and_export_try_a_twin_on_texts_that_begin_as_its_own_do(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model like Gemma is lost without its begin-of-text token, and shows rounding there alone."""
    run, probes = tmp_path / "run", []
    shutil.copytree(finished_run, run)

    def spied(*given: Any) -> torch.Tensor:
        probes.append(trace_inputs(*given))
        return probes[-1]

    for module in (proof, measure):
        monkeypatch.setattr(module, "trace_inputs", spied)
    assert texts_begin_with(run / "model") is None
    unnorm.verify(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    begin = begin_texts(tokenizer)
    tokenizer.save_pretrained(run / "model")
    assert texts_begin_with(run / "model") == begin
    assert all(check.passed for check in unnorm.verify(run))
    for form in ("transformers", "stock"):
        unnorm.export(run, form, out=tmp_path / form)
    plain, *begun = probes
    assert len(begun) == 3 and all((ids[:, 0] == begin).all() for ids in begun)
    assert (plain[:, 0] != begin).any() and torch.equal(plain[:, 1:], begun[0][:, 1:])
    (run / "model" / "tokenizer.json").write_text("no tokenizer")
    assert texts_begin_with(run / "model") is None


def test_a_probe_begins_with_no_token_that_the_model_lacks(tiny_model: PreTrainedModel) -> None:
    assert torch.equal(trace_inputs(tiny_model, 2, 8, VOCAB + 9), trace_inputs(tiny_model, 2, 8))


def failed_checks(run: Path, twin: PreTrainedModel) -> list[str]:
    return [check.name for check in check_twin(twin, load_unfolded(run), load_sites(run)[0]) if not check.passed]


def test_verify_finds_a_norm_that_came_back(finished_run: Path) -> None:
    twin = unnorm.load(finished_run)
    twin.transformer.h[0].ln_1 = torch.nn.LayerNorm(32)
    failed = failed_checks(finished_run, twin)
    assert "no module is a norm" in failed
    assert "no operation of a norm runs" in failed
    assert "every read is affine" in failed


@pytest.mark.parametrize("power", [-0.5, 0.5])
def test_verify_finds_a_norm_written_as_a_root_of_a_mean(power: float, finished_run: Path) -> None:
    class Normalizing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.square().mean(-1, keepdim=True) + 1e-6
            return x * mean**power if power < 0 else x / mean.sqrt()

    twin = unnorm.load(finished_run)
    twin.transformer.h[0].mlp.act = Normalizing()
    assert "no operation of a norm runs" in failed_checks(finished_run, twin)


@pytest.mark.parametrize("fault", ["a millionth off", "without its bias"])
def test_verify_finds_a_fold_that_is_not_exact(fault: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inexact(weight: torch.Tensor, bias: torch.Tensor | None, norm: TaperedNorm) -> tuple[torch.Tensor, Any]:
        folded, new_bias = fold_reader(weight, bias, norm)
        return (folded * (1 + 1e-6), new_bias) if fault == "a millionth off" else (folded, bias)

    twin = unnorm.load(finished_run)
    monkeypatch.setattr(fold, "fold_reader", inexact)
    assert failed_checks(finished_run, twin) == ["folded = unfolded, float64", "weights = those of the fold"]


@pytest.mark.parametrize("left_out", ["transformer.h.0.mlp.c_proj", "transformer.h.1.attn.c_proj", "transformer.wpe"])
def test_verify_finds_a_writer_that_was_left_out(
    left_out: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others(*arguments: Any) -> dict[str, dict[str, float]]:
        found = stream_sources(*arguments).items()
        return {reader: {name: 1.0 for name in sources if name != left_out} for reader, sources in found}

    monkeypatch.setattr(proof, "stream_sources", others)
    assert failed_checks(finished_run, unnorm.load(finished_run)) == ["contributions add up to the logits"]


def test_a_twin_on_the_hub_loads_by_its_name(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def fetch(name: str) -> str:
        asked.append(name)
        return str(finished_run / "model")

    monkeypatch.setattr("unnorm.folding.checkpoint.snapshot_download", fetch)
    assert unnorm.load("me/norm-free").config.removed_norms
    (tmp_path / "run").mkdir()
    shutil.copy(finished_run / "sites.json", tmp_path / "run")
    with pytest.raises(unnorm.UnnormError, match="No model in 'run/control'"):
        unnorm.load("run/control")
    assert asked == ["me/norm-free"]
    monkeypatch.undo()
    with pytest.raises(unnorm.UnnormError, match="'me/norm-free': neither a local directory nor a hub model"):
        unnorm.load("me/norm-free")


def test_transformers_4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would pass over the rotary angles in the config, and compute other logits without a word."""
    source = Path(inspect.getfile(modeling_unnorm))
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ImportError, match="needs transformers 5"):
        exec(compile(source.read_text(), str(source), "exec"), {"__name__": "copied"})


def test_the_bundled_model_generates_from_its_cache() -> None:
    model, tokenizer = load_original("demo")
    ids = tokenizer("import", return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert found.past_key_values is not None


def test_verify_finds_a_norm_that_came_back_beside_those_kept(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    unnorm.remove(str(tiny_model_dir), data=str(text_file), out=run, tokens=0, keep="ln_f", device="cpu")
    sites, name = load_sites(run)[0], "norms left are those kept"
    for place, module in (("transformer.h.0.ln_1", torch.nn.LayerNorm(32)), ("transformer.ln_f", torch.nn.Identity())):
        twin = unnorm.load(run)
        assert {check.name: check.passed for check in check_twin(twin, load_unfolded(run), sites)}[name]
        twin.set_submodule(place, module)
        assert not {check.name: check.passed for check in check_twin(twin, load_unfolded(run), sites)}[name], place


def test_a_stock_model_in_place_of_the_twin_fails_the_proof(
    finished_run: Path, tiny_model_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "model")
    shutil.copytree(tiny_model_dir, run / "model")
    done = cli("verify", run, "--json")
    assert done.code == 1, done.err
    failed = {row["name"] for row in json.loads(done.out)["checks"] if not row["passed"]}
    assert {"no module is a norm", "no operation of a norm runs", "weights = those of the fold"} <= failed


def test_a_twin_with_fewer_layers_can_be_loaded(finished_run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished_run / "model", n_layer=1)
    assert len(model.transformer.h) == 1 and norm_modules(model) == []
    whole = unnorm.load(finished_run)
    whole.transformer.h = whole.transformer.h[:1]
    ids = trace_inputs(model)
    torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["GPTJ", "Falcon", "Llama", "Mixtral"])
def test_what_can_be_switched_is_what_can_be_in_the_stock_class(family: str) -> None:
    """In a process of its own: what a stock class answered first would be inherited."""
    stock, able = f"{family}ForCausalLM", ("_can_set_attn_implementation", "_can_set_experts_implementation")
    code = f"""
import transformers
from unnorm.modeling import modeling_unnorm
twin = getattr(modeling_unnorm, "Unnorm{stock}")
found = [getattr(twin, name)() for name in {able}]
assert found == [getattr(transformers.{stock}, name)() for name in {able}], found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
