"""Prompts, and what of models and finished runs the tests of analyses share."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

import unnorm
from unnorm.analysis.material import Material
from unnorm.analysis.prompts import PromptPair
from unnorm.folding.checkpoint import load_sites
from unnorm.models.load import load_original
from unnorm.models.probe import trace_inputs

BRIDGED = ["gpt2", "gpt_neox, parallel", "llama", "qwen3"]
# Each letter with the space before it is one of the tiny tokenizer's tokens.
PAIRS = [
    PromptPair("k a c e c", "k a c e a", " n", " p"),
    PromptPair("k a i n i", "k a i n a", " p", " t"),
    PromptPair("k f c e c t", "k f c e f t", " n", " a"),
    PromptPair("k f i e i t", "k f i e f t", " c", " p"),
]


def original_of(run: Path) -> PreTrainedModel:
    return load_original(str(run.parent / "model"))[0]


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def hooked_logits(
    model: PreTrainedModel, name: str, edit: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """Logits with one module's input edited."""
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        return logits(model, ids)
    finally:
        handle.remove()


def material_of(run: Path) -> Material:
    from datasets import Dataset

    original, tokenizer = load_original(str(run.parent / "model"))
    twin = unnorm.load(run)
    blocks = Dataset.from_dict({"input_ids": trace_inputs(twin, 3, 20).tolist()})
    sites, constants = load_sites(run)
    return Material(original, twin, tokenizer, blocks, PAIRS, sites, constants, batch_size=2)
