"""Families beyond GPT-2: sites found by tracing alone, folded exactly, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from unnorm.errors import UnnormError
from unnorm.fold import fold, install, prove_sites
from unnorm.sites import find_sites, norm_modules, trace_inputs

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA_LIKE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **IDS,
}
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}
GPT_LIKE = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
OPT_LIKE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
}

Make = Callable[[], PretrainedConfig]
FAMILIES: dict[str, tuple[Make, int]] = {
    "gpt2": (lambda: hf.GPT2Config(**GPT_LIKE), 5),
    "gpt_neo": (
        lambda: hf.GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            **IDS,
        ),
        5,
    ),
    "gptj": (lambda: hf.GPTJConfig(**GPT_LIKE, rotary_dim=4), 3),
    "gpt_neox, parallel": (lambda: hf.GPTNeoXConfig(**LLAMA_LIKE), 5),
    "gpt_neox, sequential": (lambda: hf.GPTNeoXConfig(**LLAMA_LIKE, use_parallel_residual=False), 5),
    "opt": (lambda: hf.OPTConfig(**OPT_LIKE, word_embed_proj_dim=32), 5),
    "opt, projected": (lambda: hf.OPTConfig(**OPT_LIKE, word_embed_proj_dim=16), 5),
    "falcon": (
        lambda: hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS),
        3,
    ),
    "phi": (lambda: hf.PhiConfig(**LLAMA_LIKE), 3),
    "stablelm": (lambda: hf.StableLmConfig(**GROUPED), 5),
    "llama": (lambda: hf.LlamaConfig(**GROUPED), 5),
    "llama, tied, biased": (
        lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        5,
    ),
    "mistral": (lambda: hf.MistralConfig(**GROUPED), 5),
    "qwen2": (lambda: hf.Qwen2Config(**GROUPED), 5),
    "smollm3": (lambda: hf.SmolLM3Config(**GROUPED), 5),
    "granite": (lambda: hf.GraniteConfig(**GROUPED), 5),
    "starcoder2, not in our list": (lambda: hf.Starcoder2Config(**GROUPED), 5),
    "gpt_bigcode, not in our list": (lambda: hf.GPTBigCodeConfig(**GPT_LIKE), 5),
}
REFUSED: dict[str, Make] = {
    "qwen3, query and key norms": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma2, post-norm": lambda: hf.Gemma2Config(**GROUPED, head_dim=8),
    "olmo2, post-norm": lambda: hf.Olmo2Config(**LLAMA_LIKE),
    "opt, post-norm": lambda: hf.OPTConfig(**OPT_LIKE, word_embed_proj_dim=32, do_layer_norm_before=False),
    "mixtral, experts in one tensor": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
}


def random_model(make: Make) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape)
            parameter.copy_(1 + noise if parameter.ndim == 1 and name.endswith("weight") else noise)
    return model


def removed_twin(model: PreTrainedModel) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The twin, ids, and the logits that it should have."""
    sites, ids = find_sites(model), trace_inputs(model, 2, 12)
    for number, stand_in in enumerate(install(model, sites).values()):
        stand_in.log_constant.fill_(0.3 - 0.2 * number)
        stand_in.removed = True
    return fold(model, sites), ids, model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_found_by_tracing_and_folded_exactly(family: str) -> None:
    make, count = FAMILIES[family]
    model = random_model(make)
    sites = find_sites(model)
    assert len(sites) == count
    assert prove_sites(model, sites) < 1e-8
    twin, ids, expected = removed_twin(model.double())
    assert norm_modules(twin) == []
    torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("family", ["llama, tied, biased", "gpt_neox, parallel", "opt", "stablelm"])
@pytest.mark.parametrize("recipe", ["taper", "sequential"])
def test_removed_end_to_end(
    family: str, recipe: str, tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    config = FAMILIES[family][0]()
    config.vocab_size = len(tiny_tokenizer)
    random_model(lambda: config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"context": 32, "batch_size": 8, "tokens": 30 * 256, "device": "cpu", "kl_budget": 100}
    result = unnorm.remove(
        model=str(tmp_path / "model"), data=str(text_file), out=tmp_path / "run", recipe=recipe, **options
    )
    assert (result["norm_modules_left"], result["verified"]) == (0, True)
    assert unnorm.load(tmp_path / "run").config.model_type == f"unnorm_{config.model_type}"


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_site_named(family: str) -> None:
    with pytest.raises(UnnormError, match=r"norm '(model|lm_head)[.\w]*norm\w*'"):
        find_sites(random_model(REFUSED[family]))
