"""Large models: folded and proved without copies, written in shards, loaded wherever there is room."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
import unnorm.folding.checkpoint
from tests.families import FAMILIES, IN_PLACE, float64_copy, random_model, removed_twin
from unnorm.folding.fold import FoldedWeights, empty_twin, fold
from unnorm.models.probe import trace_inputs
from unnorm.models.running import copy_model
from unnorm.proof.blockwise import float64_logits
from unnorm.sites.find import find_sites
from unnorm.taper.stand_ins import install

MODELS = {
    "gpt2": FAMILIES["gpt2"][0],
    "qwen3": FAMILIES["qwen3"][0],
    "olmo": FAMILIES["olmo"][0],
    "bloom": FAMILIES["bloom"][0],
    "gpt-oss": FAMILIES["gpt-oss"][0],
    "opt, post-norm, projected": IN_PLACE["opt, post-norm, projected"],
}


@pytest.mark.parametrize("family", MODELS)
def test_a_block_at_a_time_computes_what_a_copy_in_float64_does(family: str) -> None:
    model = random_model(MODELS[family])
    ids = trace_inputs(model, 2, 12)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(float64_logits(model, ids), float64_copy(model)(input_ids=ids).logits)
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()} == before
    assert float64_logits(model.bfloat16(), ids).dtype == torch.float64


@pytest.mark.parametrize("family", MODELS)
def test_weights_folded_one_by_one_are_those_of_the_twin(family: str) -> None:
    model = random_model(MODELS[family])
    sites = find_sites(model, in_place=True)
    twin, ids, expected = removed_twin(model, sites)
    weights = FoldedWeights(model, sites)
    empty = empty_twin(model, sites, weights)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert twin.state_dict().keys() == set(weights)
    double = float64_logits(empty, ids, FoldedWeights(model, sites, torch.float64))
    torch.testing.assert_close(double, float64_logits(model, ids), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-4)


def test_a_twin_owes_nothing_to_the_model_that_it_was_folded_from() -> None:
    model = random_model(FAMILIES["llama, tied, biased"][0])
    sites = find_sites(model)
    twin, ids, _ = removed_twin(model, sites)
    before = twin(input_ids=ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(input_ids=ids).logits, before)


def test_a_copy_may_share_its_weights() -> None:
    model = random_model(FAMILIES["llama, tied, biased"][0])
    shared, own = copy_model(model, share=True), copy_model(model)
    ids, expected = trace_inputs(model), model(input_ids=trace_inputs(model)).logits
    install(shared, find_sites(model))
    assert torch.equal(model(input_ids=ids).logits, expected)
    pairs = zip(model.parameters(), own.parameters(), strict=True)
    assert all(mine.data_ptr() != theirs.data_ptr() for mine, theirs in pairs)
    assert shared.lm_head.weight is shared.model.embed_tokens.weight
    assert shared.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.fixture
def sharded(tmp_path: Path, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint in bfloat16 and in shards."""
    copy_model(tiny_model).bfloat16().save_pretrained(tmp_path / "original", max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(tmp_path / "original")
    assert len(list((tmp_path / "original").glob("*.safetensors"))) > 1
    return tmp_path / "original"


def test_shards_in_shards_out(sharded: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unnorm.folding.checkpoint, "SHARD", "40KB")
    out = tmp_path / "run"
    result = unnorm.remove(model=str(sharded), data=str(text_file), tokens=0, out=out, device="cpu")
    assert (result["norm_modules_left"], result["verified"]) == (0, True)
    for part in ("model", "unfolded"):
        assert len(list((out / part).glob("*.safetensors"))) > 1
    folded = fold(unnorm.folding.checkpoint.load_unfolded(out), unnorm.folding.checkpoint.load_sites(out)[0])
    saved: Any = unnorm.load(out)
    for key, value in folded.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    # Nothing that is held in memory and not on a disk is missing in the files.
    names = json.loads((out / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert names.keys() == set(saved.state_dict())
    assert sum((out / "model" / name).stat().st_size for name in set(names.values())) > 4 * saved.num_parameters()


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_twin_over_several_devices(family: str, tmp_path: Path) -> None:
    """One block on a disk, as `device_map="auto"` puts it where memory is short."""
    twin, ids, expected = removed_twin(random_model(FAMILIES[family][0]))
    twin.save_pretrained(tmp_path / "model")
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    inner = blocks.partition(".")[0]
    names = [f"{inner}.{name}" for name, _ in getattr(twin, inner).named_children() if f"{inner}.{name}" != blocks]
    places = dict.fromkeys([*names, f"{blocks}.0", "lm_head"], "cpu") | {f"{blocks}.1": "disk"}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert next(loaded.get_submodule(f"{blocks}.1").parameters()).is_meta
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
