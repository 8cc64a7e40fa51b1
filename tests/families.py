"""Small random models of many families, and their twins."""

from collections.abc import Callable

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from unnorm.folding.fold import fold
from unnorm.models.probe import trace_inputs
from unnorm.models.running import copy_model
from unnorm.sites.find import find_sites
from unnorm.sites.site import NormSite
from unnorm.taper.stand_ins import install


def float64_copy(model: PreTrainedModel) -> PreTrainedModel:
    """An independent copy that computes in float64."""
    copy = copy_model(model).double()
    copy.config._experts_implementation = "eager"  # The fused experts do not support float64.
    return copy


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
DEEPSEEK = {
    **LLAMA_LIKE,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
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
    "granite": (lambda: hf.GraniteConfig(**GROUPED, logits_scaling=8.0), 5),
    "starcoder2, not in our list": (lambda: hf.Starcoder2Config(**GROUPED), 5),
    "gpt_bigcode, not in our list": (lambda: hf.GPTBigCodeConfig(**GPT_LIKE), 5),
}
GEMMA = {**GROUPED, "head_dim": 8}
FAMILIES |= {
    "qwen3": (lambda: hf.Qwen3Config(**GROUPED, head_dim=8), 9),
    "gemma": (lambda: hf.GemmaConfig(**GEMMA), 5),
    "gemma2": (lambda: hf.Gemma2Config(**GEMMA), 9),
    "gemma3": (lambda: hf.Gemma3TextConfig(**GEMMA), 13),
    "olmo": (lambda: hf.OlmoConfig(**LLAMA_LIKE), 5),
    "olmo2": (lambda: hf.Olmo2Config(**LLAMA_LIKE), 9),
    "bloom": (lambda: hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, **IDS), 6),
    "falcon, two norms": (
        lambda: hf.FalconConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            new_decoder_architecture=True,
            **IDS,
        ),
        5,
    ),
    "phi, query and key norms": (lambda: hf.PhiConfig(**LLAMA_LIKE, qk_layernorm=True), 7),
    "glm4, not in our list": (lambda: hf.Glm4Config(**GROUPED, head_dim=8), 9),
    "cohere, not in our list": (lambda: hf.CohereConfig(**GROUPED), 3),
    "cohere, query and key norms, not in our list": (lambda: hf.CohereConfig(**GROUPED, use_qk_norm=True), 7),
    "nemotron, not in our list": (lambda: hf.NemotronConfig(**GROUPED), 5),
}
FAMILIES |= {
    "mixtral": (lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4), 5),
    "qwen3 moe": (
        lambda: hf.Qwen3MoeConfig(
            **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
        9,
    ),
    "qwen2 moe, shared expert": (
        lambda: hf.Qwen2MoeConfig(
            **GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        ),
        5,
    ),
    "lfm2, not in our list": (
        lambda: hf.Lfm2Config(**GROUPED, block_ff_dim=48, layer_types=["conv", "full_attention"]),
        7,
    ),
    "exaone4, not in our list": (lambda: hf.Exaone4Config(**GROUPED), 9),
    "jetmoe, not in our list": (
        lambda: hf.JetMoeConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_key_value_heads=4,
            kv_channels=8,
            intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            **IDS,
        ),
        5,
    ),
    "zamba, not in our list": (
        lambda: hf.ZambaConfig(
            **LLAMA_LIKE | {"num_hidden_layers": 4},
            num_key_value_heads=4,
            attention_hidden_size=64,
            attention_head_dim=16,
            n_mamba_heads=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
            layers_block_type=["mamba", "hybrid"] * 2,
        ),
        9,
    ),
    "gpt-oss": (lambda: hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4), 5),
}
IN_PLACE: dict[str, Make] = {
    "opt, post-norm": lambda: hf.OPTConfig(**OPT_LIKE, word_embed_proj_dim=32, do_layer_norm_before=False),
    "opt, post-norm, projected": lambda: hf.OPTConfig(**OPT_LIKE, word_embed_proj_dim=16, do_layer_norm_before=False),
    "bart decoder, not in our list": lambda: hf.BartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, **IDS
    ),
    "granite moe, not in our list": lambda: hf.GraniteMoeConfig(**GROUPED, num_local_experts=4),
    "phimoe, not in our list": lambda: hf.PhimoeConfig(**GROUPED, num_local_experts=4),
    "dbrx, not in our list": lambda: hf.DbrxConfig(
        vocab_size=64,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
        **IDS,
    ),
    "jamba, not in our list": lambda: hf.JambaConfig(
        **GROUPED,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=0,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    "deepseek v3, router in float32": lambda: hf.DeepseekV3Config(**DEEPSEEK),
}


def random_model(make: Make) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Small where they are tied to the unembedding: soft caps on logits would hide all differences.
            noise = (0.02 if "embed" in name else 0.2) * torch.randn(parameter.shape)
            parameter.copy_(1 + noise if parameter.ndim == 1 and name.endswith("weight") else noise)
    return model


def removed_twin(
    model: PreTrainedModel, sites: list[NormSite] | None = None
) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The twin, ids, and the logits that it should have."""
    sites, ids = sites or find_sites(model), trace_inputs(model, 2, 12)
    for number, stand_in in enumerate(install(model, sites).values()):
        stand_in.log_constant.fill_(1.2 - 0.2 * (number % 5))
        stand_in.removed = True
    return fold(model, sites), ids, model(input_ids=ids).logits
