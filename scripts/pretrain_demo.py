"""Pretrain the bundled demo model: a small GPT-2 on the Python standard library's source files.

    python scripts/pretrain_demo.py --out src/unnorm/demo --threads 1

Writes the model (safetensors), its tokenizer and `pretrain_log.jsonl`. The same seed, Python version, machine and
number of threads give the same model. Takes about half an hour on one CPU core. Each row of the log says how many
held-out blocks its validation loss is of.

The text is gone over five times, with dropout, so that fine-tuning on more of it hardly improves the model
(`docs/method.md`). Attention weights have no dropout, since that would nearly double the time.

The benchmarks' other models are made by the same script (`benchmarks/README.md`): the first bundled model, models of
other text, and models of other families, which have no dropout:

    python scripts/pretrain_demo.py --out first-gpt2 --dropout 0 --steps 2000
    python scripts/pretrain_demo.py --data books_val.jsonl.xz --out books-gpt2 --dropout 0 --steps 400
    python scripts/pretrain_demo.py --family llama --out demo-llama --steps 500
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from unnorm.data import STDLIB, build_blocks, open_documents

VOCAB, CONTEXT = 4096, 256
MOST_BLOCKS = 200_000
END_OF_TEXT = "<|endoftext|>"
WARMUP, FINAL_LR_SHARE = 100, 0.01


def train_tokenizer(data: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned from the training documents only."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        open_documents(data).train(), vocab_size=VOCAB, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(family: str, layers: int, width: int, heads: int, dropout: float) -> PreTrainedModel:
    ids = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if family == "gpt2":
        shares = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": 0.0}
        sizes = {"n_positions": CONTEXT, "n_layer": layers, "n_embd": width, "n_head": heads}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **shares, **ids))
    sizes = {
        "max_position_embeddings": CONTEXT,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_dim": width // heads,
        "num_key_value_heads": heads,
        # A gated MLP has three matrices instead of two.
        "intermediate_size": 4 * width if family == "gpt_neox" else 8 * width // 3,
        "tie_word_embeddings": True,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **ids))


def build_optimizer(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to one hundredth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def validation_loss(model: torch.nn.Module, blocks: torch.Tensor, batch_size: int) -> float:
    model.eval()
    batches = blocks.split(batch_size)
    total = sum(model(input_ids=b, labels=b).loss.item() * len(b) for b in batches)
    model.train()
    return total / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default=STDLIB)
    parser.add_argument("--family", default="gpt2", choices=["gpt2", "gpt_neox", "llama", "qwen3"])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.2, help="of GPT-2's residual stream and embeddings")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.data)
    blocks = build_blocks(args.data, tokenizer, VOCAB, CONTEXT, MOST_BLOCKS, validation_blocks=1000)
    stream = torch.tensor(blocks.train["input_ids"]).flatten()
    held_out = torch.tensor(blocks.validation["input_ids"])

    model = build_model(args.family, args.layers, args.width, args.heads, args.dropout).train()
    compiled = torch.compile(model)
    optimizer = build_optimizer(model, args.lr)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "pretrain_log.jsonl").open("w")
    start = time.perf_counter()
    for step in range(args.steps):
        at = torch.randint(len(stream) - CONTEXT, (args.batch_size,))
        batch = torch.stack([stream[i : i + CONTEXT] for i in at.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_share(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        last = step + 1 == args.steps
        if last or (step + 1) % 250 == 0:
            sample = held_out if last else held_out[:: max(1, len(held_out) // 64)]
            row = {
                "step": step + 1,
                "tokens": (step + 1) * args.batch_size * CONTEXT,
                "train_loss": round(loss.item(), 4),
                "validation_blocks": len(sample),
                "validation_loss": round(validation_loss(model, sample, args.batch_size), 4),
                "seconds": round(time.perf_counter() - start),
            }
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
    log.close()
    model.config.use_cache = model.generation_config.use_cache = True
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
