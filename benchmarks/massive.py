"""Give a small model a massive activation at position 0, and run each recipe on it; prints JSON.

    python benchmarks/massive.py --model first-gpt2 --keep massive-model > benchmarks/massive.json

Large pretrained models write a vector tens to thousands of times longer than the median into the residual stream at
position 0 in early layers, and remove it again in the last layers (arXiv 2402.17762). A model as small as the bundled
one has not learned that, so the same mechanism is planted: one neuron of the first MLP, which fires at position 0 only,
writes a long vector, and one neuron of the last MLP, which responds only to this vector, removes it. The model is then
trained with its norms on to reproduce its earlier predictions, so that it adapts to the vector as large models have.
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
from unnorm.data import build_blocks
from unnorm.hooks import recorded
from unnorm.models.load import load_original
from unnorm.models.running import copy_model
from unnorm.runs.config import parse_count
from unnorm.terminal.progress import Progress
from unnorm.training.losses import distillation_losses

LENGTH = 60.0
"""Scale of the planted vector, relative to the mean scale of the residual stream where it is written."""
THRESHOLD = 0.6
"""Firing threshold, on a scale from the neuron's mean input elsewhere (0) to that at position 0 (1)."""
SHARPNESS = 20.0
HEALING_STEPS, HEALING_BLOCKS, HEALING_LR = 600, 4, 1e-3
UPSTREAM = ("transformer.wte", "transformer.wpe", "transformer.h.0.ln", "transformer.h.0.attn", "ln_2")
"""Parameters that decide whether the planted neurons fire; they are frozen while the model heals."""


def weakest_neuron(mlp: Any) -> int:
    """The neuron with the smallest product of input and output weight norms."""
    incoming, outgoing = mlp.c_fc.weight, mlp.c_proj.weight
    return int((incoming.norm(dim=0) * outgoing.norm(dim=1)).argmin())


@torch.no_grad()
def set_neuron(mlp: Any, neuron: int, reads: torch.Tensor, vector: torch.Tensor) -> None:
    """Make a neuron fire on the mean input at position 0 but not on the mean input elsewhere, and write `vector`.

    Args:
        mlp: the MLP.
        neuron: index of the neuron.
        reads: inputs of the MLP, (batch, position, width).
        vector: what the neuron adds at position 0, (width).
    """
    at_0, elsewhere = reads[:, 0].mean(0), reads[:, 1:].mean((0, 1))
    direction = (at_0 - elsewhere) / (at_0 - elsewhere).square().sum()  # The two means are 1 apart along it.
    mlp.c_fc.weight[:, neuron] = SHARPNESS * direction
    mlp.c_fc.bias[neuron] = -SHARPNESS * (THRESHOLD + float(elsewhere @ direction))
    mlp.c_proj.weight[neuron] = vector / (SHARPNESS * (1 - THRESHOLD))


@torch.no_grad()
def input_of(model: GPT2LMHeadModel, ids: torch.Tensor, name: str) -> torch.Tensor:
    """The input of a module, (batch, position, width)."""
    with recorded(model, [name]) as record:
        model(input_ids=ids)
    return record[name][0]


def plant(model: GPT2LMHeadModel, ids: torch.Tensor) -> list[tuple[Any, int]]:
    """Plant a neuron that writes a long vector in the first MLP, and one that removes it in the last; return both."""
    stream = input_of(model, ids, "transformer.h.1.ln_1")
    vector = torch.randn(stream.shape[-1], generator=torch.Generator().manual_seed(0))
    vector = (vector - vector.mean()) / vector.norm()
    vector *= LENGTH * float(stream.std(-1).mean()) * len(vector) ** 0.5
    neurons = []
    for layer, written in ((0, vector), (len(model.transformer.h) - 1, -vector)):
        mlp = model.transformer.h[layer].mlp
        neuron = weakest_neuron(mlp)
        set_neuron(mlp, neuron, input_of(model, ids, f"transformer.h.{layer}.mlp"), written)
        neurons.append((mlp, neuron))
    return neurons


def heal(
    model: GPT2LMHeadModel, neurons: list[tuple[Any, int]], original: PreTrainedModel, blocks: torch.Tensor
) -> float:
    """Train all but `UPSTREAM` and the planted neurons, norms on, to match the original's logits; returns last KL."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in UPSTREAM))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=HEALING_LR, weight_decay=0.0)
    kl = torch.zeros(())
    for step, ids in enumerate(blocks.split(HEALING_BLOCKS)[:HEALING_STEPS]):
        with torch.no_grad():
            expected = original(input_ids=ids).logits
        kl, *_ = distillation_losses(model(input_ids=ids).logits, expected, ids)
        kl.backward()
        for mlp, neuron in neurons:
            mlp.c_fc.weight.grad[:, neuron] = 0
            mlp.c_fc.bias.grad[neuron] = 0
            mlp.c_proj.weight.grad[neuron] = 0
        clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = HEALING_LR * min(1.0, step / 20, 1.02 - step / HEALING_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return float(kl.detach())


def make_model(original_model: str, out: Path) -> tuple[float, PreTrainedModel, PreTrainedTokenizerBase]:
    """The final KL of healing, and the model with its massive activation (saved to `out`) and its tokenizer."""
    original, tokenizer = load_original(original_model, False)
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
    """Results of one run with its control and its audit; the error message if it failed."""
    console.rule(recipe)
    with Progress(console) as progress:
        try:
            result = unnorm.remove(
                model=str(model), recipe=recipe, tokens=tokens, control=True, out=directory, watch=progress
            )
        except unnorm.RunInterruptedError:
            raise
        except unnorm.UnnormError as error:
            return {"recipe": recipe, "tokens": tokens, "error": str(error).replace(str(directory), directory.name)}
        audit = unnorm.audit(directory, watch=progress)
    keys = ["teacher_loss", "lnfree_loss", "control_loss", "gap", "kl", "jsd", "top1_agreement", "naive_kl", "tokens"]
    keys += ["skipped_steps", "waited_steps", "set_backs", "norm_modules_left", "fold_max_abs_error", "plan", "seed"]
    classes = [
        {key: row[key] for key in ("name", "passed", "loss", "reference_loss", "finite")} for row in audit["classes"]
    ]
    return {"recipe": recipe, **{key: result[key] for key in keys}, "audit": classes}


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo", help="a GPT-2")
    parser.add_argument("--tokens", type=parse_count, default=400_000)
    parser.add_argument("--recipes", nargs="+", default=["taper", "sequential"])
    parser.add_argument("--keep", type=Path, help="directory for the model; by default it is not kept")
    args = parser.parse_args()
    logging.disable_progress_bar()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory:
        model = args.keep or Path(directory) / "massive"
        kl, *_ = make_model(args.model, model)
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
