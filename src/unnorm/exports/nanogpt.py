"""A GPT-2 twin in nanoGPT's form: its key names and `nn.Linear` layout, as safetensors plus a JSON config.

nanoGPT's own class has LayerNorms and a tied unembedding without bias. To load this form, replace `ln_1`, `ln_2` and
`ln_f` with `nn.Identity`, and `lm_head` with `nn.Linear(n_embd, vocab_size)`.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from unnorm.auto_classes import TYPE_PREFIX
from unnorm.errors import UnnormError
from unnorm.exports.measure import PROBE_SHAPE, FormError, compare, refuse_kept_norms
from unnorm.models.probe import trace_inputs

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOLERANCE = 1e-4
NOTE = (
    "Without LayerNorms and with an untied unembedding that has a bias: in nanoGPT's class put nn.Identity for ln_1, "
    'ln_2 and ln_f, a new nn.Linear for lm_head, and nn.GELU(approximate=config["gelu_approximate"]) in each MLP.'
)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

Weights = dict[str, Tensor]


def write_nanogpt(folded: PreTrainedModel, out: Path) -> list[FormError]:
    """Write the nanoGPT form of a GPT-2 twin, and measure its error after reading it back.

    Raises:
        UnnormError: the model is not a GPT-2, is one that nanoGPT's class can't compute, or kept norms.
    """
    refuse_kept_norms(folded, "A nanoGPT form")
    config = nanogpt_config(folded)
    save_file(nanogpt_weights(folded), out / WEIGHTS)
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    ids = trace_inputs(folded, *PROBE_SHAPE)
    with torch.no_grad():
        reference = folded(input_ids=ids).logits
        row = compare("float32", reference, forward(load_file(out / WEIGHTS), config, ids))
    if not row.relative <= TOLERANCE:
        raise UnnormError(
            f"nanoGPT's class would compute different logits (difference {row.max_abs:.1e}): this model is a GPT-2 "
            "with its own kind of attention. Use: unnorm export --to transformers"
        )
    return [row]


def nanogpt_weights(folded: PreTrainedModel) -> Weights:
    """The twin's weights under nanoGPT's names, linear layers as (out, in)."""
    return {
        key: (value.T if key.endswith(_TRANSPOSED) else value).contiguous().clone()
        for key, value in folded.state_dict().items()
    }


def nanogpt_config(folded: PreTrainedModel) -> dict[str, Any]:
    """`model_args` for nanoGPT's `GPTConfig`, and the differences from nanoGPT's class.

    Raises:
        UnnormError: the model is not a GPT-2, or its MLP is of a kind that nanoGPT does not have.
    """
    config = folded.config
    family = config.model_type.removeprefix(TYPE_PREFIX)
    if family != "gpt2":
        raise UnnormError(
            f"A nanoGPT form is only for GPT-2s; this model is a {family}. Use: unnorm export --to transformers"
        )
    if config.activation_function not in _ACTIVATIONS or config.n_inner not in (None, 4 * config.n_embd):
        raise UnnormError(
            f"nanoGPT has GELU and an MLP 4 times as wide as the model; this model has {config.activation_function} "
            f"and a width of {config.n_inner or 4 * config.n_embd}. Use: unnorm export --to transformers"
        )
    sizes = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return {
        "model_args": {"block_size": config.n_positions, **sizes, "dropout": 0.0, "bias": True},
        "norms": False,
        "tied_unembedding": False,
        "lm_head_bias": "lm_head" in (config.added_biases or []),
        "gelu_approximate": _ACTIVATIONS[config.activation_function],
    }


@torch.no_grad()
def forward(
    weights: Weights, config: dict[str, Any], ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position vocab"]:
    """The logits that the form defines: nanoGPT's forward pass without norms."""
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: ids.shape[1]]
    for layer in range(config["model_args"]["n_layer"]):
        block = f"transformer.h.{layer}"
        x = x + _attention(weights, block, config["model_args"]["n_head"], x)
        hidden = F.gelu(_linear(weights, f"{block}.mlp.c_fc", x), approximate=config["gelu_approximate"])
        x = x + _linear(weights, f"{block}.mlp.c_proj", hidden)
    return _linear(weights, "lm_head", x)


def _attention(
    weights: Weights, block: str, n_head: int, x: Float[Tensor, "batch position width"]
) -> Float[Tensor, "batch position width"]:
    parts = _linear(weights, f"{block}.attn.c_attn", x).split(x.shape[-1], dim=-1)
    q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in parts)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _linear(weights, f"{block}.attn.c_proj", mixed.transpose(1, 2).flatten(2))


def _linear(weights: Weights, name: str, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token out"]:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
