"""A small model with a massive activation at position 0, and what each recipe makes of it; prints JSON.

    python benchmarks/massive.py > benchmarks/massive.json

Large pretrained models write a vector tens to thousands of times longer than the median into the residual stream at
position 0 (arXiv 2402.17762). The bundled model is too small to have learned that, so it is planted as large models
have it: one neuron of the first MLP that fires at position 0 alone writes a long vector. The model is then trained
with its norms on, to predict what it predicted before, so that it lives with the vector as those models do.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import unnorm
from unnorm.config import parse_count
from unnorm.data import build_blocks
from unnorm.losses import distillation_losses
from unnorm.models import copy_model, load_original
from unnorm.terminal import Progress

LENGTH = 60.0
"""Of the planted vector, in scales of the stream where it is written."""
THRESHOLD = 0.7
"""Between a neuron's mean input elsewhere (0) and at position 0 (1)."""
HEALING_STEPS, HEALING_BLOCKS, HEALING_LR = 400, 4, 3e-4


@torch.no_grad()
def plant(model: GPT2LMHeadModel, ids: torch.Tensor) -> int:
    """Make the first MLP's weakest neuron write a long vector at position 0, in place; returns its index."""
    block, reads, streams = model.transformer.h[0], [], []
    handles = [
        block.ln_2.register_forward_hook(lambda _, args, output: reads.append(output)),
        model.transformer.h[1].ln_1.register_forward_pre_hook(lambda _, args: streams.append(args[0])),
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    read, stream = reads[0], streams[0]
    at_0, elsewhere = read[:, 0].mean(0), read[:, 1:].mean((0, 1))
    direction = (at_0 - elsewhere) / (at_0 - elsewhere).square().sum()  # 1 apart along it, on average.
    sharpness = 40.0
    incoming, outgoing = block.mlp.c_fc, block.mlp.c_proj
    neuron = int((incoming.weight.norm(dim=0) * outgoing.weight.norm(dim=1)).argmin())
    incoming.weight[:, neuron] = sharpness * direction
    incoming.bias[neuron] = -sharpness * (THRESHOLD + float(elsewhere @ direction))
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(stream.shape[-1], generator=generator)
    vector = (vector - vector.mean()) / vector.norm()
    length = LENGTH * float(stream.std(-1).mean()) * stream.shape[-1] ** 0.5
    outgoing.weight[neuron] = length / (sharpness * (1 - THRESHOLD)) * vector
    return neuron


def heal(model: GPT2LMHeadModel, neuron: int, original: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Train all but the planted neuron, norms on, to give the original's logits; the last KL, nats per token."""
    mlp = model.transformer.h[0].mlp
    optimizer = torch.optim.AdamW(model.parameters(), lr=HEALING_LR, weight_decay=0.0)
    kl = torch.zeros(())
    for step, ids in enumerate(blocks.split(HEALING_BLOCKS)[:HEALING_STEPS]):
        with torch.no_grad():
            expected = original(input_ids=ids).logits
        kl, *_ = distillation_losses(model(input_ids=ids).logits, expected, ids)
        kl.backward()
        for planted in (mlp.c_fc.weight.grad[:, neuron], mlp.c_fc.bias.grad[neuron], mlp.c_proj.weight.grad[neuron]):
            planted.zero_()
        clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = HEALING_LR * min(1.0, step / 20, 1.02 - step / HEALING_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return float(kl)


def make_model(out: Path) -> tuple[float, PreTrainedModel, PreTrainedTokenizerBase]:
    """The bundled model with its massive activation, saved to `out`, and the KL that it ended with."""
    original, tokenizer = load_original("demo", False)
    original.requires_grad_(False)
    vocab_size, context = int(original.config.vocab_size), int(original.config.n_positions)
    wanted = HEALING_STEPS * HEALING_BLOCKS
    train = build_blocks("stdlib", tokenizer, vocab_size, context, wanted, 1).train
    blocks = torch.tensor(train["input_ids"])
    model = copy_model(original).requires_grad_(True)
    kl = heal(model, plant(model, blocks[:16]), original, blocks)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return kl, model, tokenizer


def measure(model: Path, recipe: str, tokens: int, directory: Path, console: Console) -> dict[str, Any]:
    """One run with its control and its audit; or why there is none."""
    console.rule(recipe)
    with Progress(console) as progress:
        try:
            result = unnorm.remove(
                model=str(model), recipe=recipe, tokens=tokens, control=True, out=directory, watch=progress
            )
        except unnorm.UnnormError as error:
            return {"recipe": recipe, "tokens": tokens, "error": str(error)}
        audit = unnorm.audit(directory, watch=progress)
    keys = ("teacher_loss", "lnfree_loss", "control_loss", "gap", "kl", "jsd", "top1_agreement", "naive_kl", "tokens")
    keys += ("skipped_steps", "waited_steps", "set_backs", "norm_modules_left", "fold_max_abs_error", "plan", "seed")
    classes = [
        {key: row[key] for key in ("name", "passed", "loss", "reference_loss", "finite")} for row in audit["classes"]
    ]
    return {"recipe": recipe, **{key: result[key] for key in keys}, "audit": classes}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, default=400_000)
    parser.add_argument("--recipes", nargs="+", default=["taper", "sequential"])
    args = parser.parse_args()
    logging.disable_progress_bar()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "massive"
        kl, *_ = make_model(model)
        scales = [
            {
                "site": row.site,
                "position_0": row.position_0,
                "geometric_mean": row.geometric_mean,
                "largest": row.largest,
            }
            for _, row in unnorm.stats(str(model))
        ]
        runs = [measure(model, recipe, args.tokens, Path(directory) / recipe, console) for recipe in args.recipes]
    json.dump({"healed_kl": kl, "scales": scales, "runs": runs}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
