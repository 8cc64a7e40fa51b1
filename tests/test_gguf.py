"""A quantized GGUF file is read as plain weights: it trains, and what is left of it says nothing of quantization."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import POSITIONS, Cli, small_llama
from unnorm.errors import UnnormError
from unnorm.models.load import load_original

gguf = pytest.importorskip("gguf")

WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 4, 3
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Rotary dimensions of queries and keys in the order that GGUF has them in."""
    return weight.view(HEADS, 2, WIDTH // HEADS // 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)


def tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    weights = {name: value.detach() for name, value in model.named_parameters()}
    named = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(LAYERS):
        for theirs, ours in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            named[f"blk.{layer}.{theirs}.weight"] = interleaved(weight) if theirs in ("attn_q", "attn_k") else weight
    return named


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, original: LlamaForCausalLM
) -> Path:
    """The model in eight bits a weight, norms in float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors(original), original, tiny_tokenizer)


def write_gguf(
    path: Path, weights: dict[str, torch.Tensor], original: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(original.config.rms_norm_eps)
    writer.add_vocab_size(original.config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_types([3] + [1] * (len(state["vocab"]) - 1))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight.numpy())
        else:
            writer.add_tensor(name, gguf.quantize(weight.contiguous().numpy(), eight_bits), raw_dtype=eight_bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_are_the_files(quantized: Path, original: LlamaForCausalLM) -> None:
    loaded, tokenizer = load_original(str(quantized))
    assert tokenizer.eos_token_id == 0
    for name, weight in original.named_parameters():
        found = loaded.get_parameter(name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, weight, atol=0.01, rtol=0)


def test_a_file_that_lacks_weights_is_refused(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    weights = tensors(original)
    del weights["blk.1.ffn_down.weight"]
    path = write_gguf(tmp_path / "part.gguf", weights, original, tiny_tokenizer)
    with pytest.raises(
        UnnormError, match=r"lacks weights of LlamaForCausalLM.*model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        load_original(str(path))


def test_it_trains(quantized: Path, text_file: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "run"
    done = cli("remove", quantized, "--data", text_file, "--tokens", 1024, "--control", "--out", out, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["verified"] and result["tokens"] >= 1024 and result["norm_modules_left"] == 0
    for saved in (out / "model", out / "unfolded", out / "control"):
        assert "quant" not in (saved / "config.json").read_text()


def test_it_is_known_by_what_is_in_it(quantized: Path, tmp_path: Path) -> None:
    for name in ("tiny.GGUF", "tiny"):
        (tmp_path / name).symlink_to(quantized)
        assert type(load_original(str(tmp_path / name))[0]) is LlamaForCausalLM
