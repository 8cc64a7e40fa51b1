"""Run `unnorm remove --tokens 0` on a small, randomly initialized model of every causal-LM class in transformers.

    python benchmarks/families_sweep.py > benchmarks/families_sweep.json
    python benchmarks/families_sweep.py --only bamba bart

The outcome of each class is one of: removed, with the largest difference of float64 logits between the saved twin and
the unfolded model, relative to the largest logit; refused, with the message; not built, where no small configuration
could be guessed; crashed, which must not happen. Classes refused for lack of --in-place are retried with it.
"""

import argparse
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


import datasets
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import unnorm
import unnorm.folding.fold
import unnorm.removal.remove  # Imported once, before forking, for all families.
from unnorm.errors import UnnormError, short
from unnorm.folding.checkpoint import load, load_sites, load_unfolded
from unnorm.json_text import json_text
from unnorm.models.load import model_path
from unnorm.models.probe import trace_inputs

SECONDS = 900
MOST_PARAMETERS = 100_000_000
SIZES = {
    "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth": 2,
    "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim embed_dim attention_hidden_size lru_width "
    "emb_dim hidden_size_global": 32,
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads encoder_num_heads "
    "num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads": 4,
    "num_key_value_heads num_kv_heads n_groups mamba_n_groups mamba_ngroups num_experts_per_tok moe_topk top_k moe_k "
    "linear_num_key_heads": 2,
    "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size intermediate_dim "
    "moe_intermediate_size shared_expert_intermediate_size block_ff_dim expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp": 48,
    "head_dim attention_head_dim d_kv d_head dim_head linear_key_head_dim linear_value_head_dim state_size "
    "mamba_d_state ssm_state_size v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim index_head_dim "
    "global_head_dim swa_head_dim swa_v_head_dim hidden_size_per_layer_input": 8,
    "mamba_n_heads mamba_num_heads num_local_experts num_experts n_routed_experts moe_num_experts mamba_dt_rank "
    "zero_expert_num index_n_heads": 4,
    "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim mamba_headdim": 16,
    "max_position_embeddings n_positions max_seq_len n_ctx": 64,
}
"""Sizes set in every family's configuration, where it has parameters of these names."""

_FOUR_LAYERS = {"num_hidden_layers": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "axk1": {"n_group": 1, "topk_group": 1},
    "bailing_hybrid": {**_FOUR_LAYERS, "num_expert_group": 1, "topk_group": 1},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "kimi_linear": _FOUR_LAYERS,
    "lfm3": _FOUR_LAYERS,
    "qwen4_exp": _FOUR_LAYERS,
    "qwen4_exp_text": _FOUR_LAYERS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "olmo_hybrid": _FOUR_LAYERS,
    "qwen3_5_text": _FOUR_LAYERS,
    "qwen3_5_moe_text": _FOUR_LAYERS,
    "qwen3_next": _FOUR_LAYERS,
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "zamba": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""Additional settings that a family needs."""


def small_config(model_type: str, vocab: int) -> PretrainedConfig:
    """The family's own configuration, with all sizes of known names made small."""
    config_class = type(AutoConfig.for_model(model_type))
    return config_class(**{**_settings(config_class, vocab), **SPECIAL.get(model_type, {})})


def _settings(config_class: type[PretrainedConfig], vocab: int) -> dict[str, Any]:
    known = set(inspect.signature(config_class.__init__).parameters)
    sizes = {name: size for names, size in SIZES.items() for name in names.split()} | dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input"), vocab
    )
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    settings: dict[str, Any] = {name: size for name, size in sizes.items() if name in known}
    if "kv_lora_rank" in known:  # Latent attention has no grouped key/value heads.
        settings |= {"num_key_value_heads": sizes["num_attention_heads"]}
    if "is_decoder" in known:
        settings["is_decoder"] = True
    for name, part in config_class.sub_configs.items():
        if isinstance(part, type) and part is not AutoConfig:
            settings[name] = _settings(part, vocab)
    return settings


def build(model_type: str, vocab: int) -> PreTrainedModel:
    """A model of the class's own random initialization plus noise, so that no gain is one and no bias is zero.

    Raises:
        Exception: whatever the class raises on a guessed configuration.
    """
    config = small_config(model_type, vocab)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters: some sizes go by other names")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_((0.2 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model


def attempt(model_type: str, directory: Path, in_place: bool) -> dict[str, Any]:
    """Remove every norm of the saved model, and compare the saved twin directly with the unfolded model."""
    out = directory / f"run-{in_place}"
    text = directory / "text.txt"
    text.write_text(inspect.getsource(inspect)[:10_000])
    result = unnorm.remove(
        model=str(directory / "model"), data=str(text), context=32, tokens=0, device="cpu", out=out, in_place=in_place
    )
    sites, _ = load_sites(out)
    twin, unfolded = load(out).double(), load_unfolded(out).double()
    for model in (twin, unfolded):
        model.config._experts_implementation = "eager"  # The fused experts do not support float64.
    checks = [check for check in unnorm.verify(out) if not check.passed]
    ids = trace_inputs(twin, 2, 24)
    with torch.no_grad():
        expected, given = unfolded(input_ids=ids).logits, twin(input_ids=ids).logits
        fresh = unnorm.folding.fold.fold(unfolded, sites)(input_ids=ids).logits
    top = float(expected.abs().max())
    return {
        "outcome": "removed",
        "sites": len(sites),
        "folds_into": dict(Counter(site.folds_into for site in sites)),
        "float64_error": float((fresh - expected).abs().max()) / top,
        "checkpoint_error": float((given - expected).abs().max()) / top,
        "generates_alike": alike(load(out), AutoModelForCausalLM.from_pretrained(directory / "model"), ids[:, :8]),
        "verified": result["verified"],
        "failed_checks": [f"{check.name}: {check.detail}" for check in checks],
    }


def alike(twin: PreTrainedModel, original: PreTrainedModel, ids: torch.Tensor) -> bool | None:
    """Whether the twin generates the same with and without cache; None where the original does not, or fails."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    try:
        if not torch.equal(*(original.generate(ids, use_cache=cache, **options) for cache in (True, False))):
            return None
    except Exception:  # A fault of the original, not of the removal.
        return None
    return torch.equal(*(twin.generate(ids, use_cache=cache, **options) for cache in (True, False)))


def sweep_one(model_type: str, pipe: Any) -> None:
    """Try one family, in a process of its own; the row is sent through the pipe."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    row: dict[str, Any] = {"family": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    tokenizer = AutoTokenizer.from_pretrained(model_path("demo"))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            build(model_type, len(tokenizer)).save_pretrained(directory / "model")
        except Exception as error:
            pipe.send(row | {"outcome": "not built", "message": f"{type(error).__name__}: {short(error)}"})
            return
        tokenizer.save_pretrained(directory / "model")
        for in_place in (False, True):
            try:
                row |= attempt(model_type, directory, in_place)
                break
            except UnnormError as error:
                said = str(error).replace(name, "…")
                if not in_place and "--in-place" in said:
                    row["without_in_place"] = said
                    continue
                row |= {"outcome": "refused", "message": said}
                break
            except Exception as error:
                row |= {"outcome": "crashed", "message": f"{type(error).__name__}: {error}"}
                row["traceback"] = traceback.format_exc().replace(name, "…").splitlines()[-8:]
                break
    pipe.send(row)


def sweep(model_type: str) -> dict[str, Any]:
    """The row of one family, even if its process dies or hangs."""
    mine, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=sweep_one, args=(model_type, other))
    process.start()
    other.close()
    row = {"family": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    try:
        row = mine.recv() if mine.poll(SECONDS) else row | {"outcome": "crashed", "message": f"took {SECONDS} s"}
    except EOFError:
        row |= {"outcome": "crashed", "message": "the process died"}
    process.kill()
    process.join()
    return row


def main() -> None:
    """Run the sweep that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    families = sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith("unnorm_"))
    parser.add_argument("--only", nargs="+", choices=families, metavar="MODEL_TYPE")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    args = parser.parse_args()
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(sweep, args.only or families):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    counts = dict(Counter(row["outcome"] for row in rows))
    print(json_text({"transformers": version("transformers"), "outcomes": counts, "families": rows}))


if __name__ == "__main__":
    main()
