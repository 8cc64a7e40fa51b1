"""The plan of one run: settings the user left open, chosen from the model, the recipe and the machine."""

import time
from typing import Literal

import torch
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.models.device import choose_device, free_memory
from unnorm.models.sizes import choose_context, trained_parameters
from unnorm.processes import count_here
from unnorm.runs.config import RemoveConfig
from unnorm.taper.recipes import RECIPES, RecipeName

CPU_TOKENS = 1_600_000
GPU_TOKENS = 20_000_000
CONTROL_STEP_TOKENS = 4096
"""Tokens that a step of the control should have at least; short runs use fewer."""
LEAST_STEP_TOKENS, MOST_STEP_TOKENS = 512, 2**19
SHORT_RUN, SHORT_RUN_STEP_TOKENS = 500_000, 256
"""A run of fewer tokens has too few steps of 512, and takes them half as large (docs/method.md, "Steps")."""
MOST_LR = 2e-3
MEMORY_SHARE = 0.5
"""Share of the memory not taken by weights, gradients and optimizer states that activations may use."""
STATE_BYTES = 20
"""Per parameter: weight, gradient, AdamW's two moments, and the original's weight (GPU) or the last good one (CPU)."""
LEAST_BFLOAT16_GAIN = 1.5
"""Least speedup of a linear layer in bfloat16 with which the whole step gets faster."""
TIMED_WIDTH, TIMED_TURNS = 512, 10


class Plan(BaseModel):
    """The settings with nothing left open: what the run actually uses."""

    device: str
    bfloat16: bool
    compile: bool
    cuda_graph: bool
    tokens: int
    context: int
    batch_size: int
    micro_batch: int
    steps: int
    lr: float
    processes: int

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Precision of the training passes."""
        return "bfloat16" if self.bfloat16 else "float32"

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimizer step, over all processes."""
        return self.batch_size * self.context

    @property
    def training_tokens(self) -> int:
        """Tokens in all steps: what was asked for, rounded to whole steps."""
        return self.steps * self.step_tokens

    @property
    def records_steps(self) -> bool:
        """Whether steps are replayed as a recorded CUDA graph; not with gradient accumulation or several processes."""
        return self.cuda_graph and self.processes == 1 and self.accumulation == 1

    @property
    def accumulation(self) -> int:
        """Micro-batches that each process accumulates for one optimizer step."""
        return self.batch_size // (self.micro_batch * self.processes)


def make_plan(config: RemoveConfig, model: PreTrainedModel, processes: int = 1) -> Plan:
    """Choose what the user left open.

    Raises:
        UnnormError: the device is missing, the context is longer than the model's or too short, a step takes more
            tokens than there are or can't be shared by the processes, or training does not fit in memory.
    """
    device = choose_device(config.device)
    context = choose_context(config.context, model)
    tokens = config.tokens if config.tokens is not None else (GPU_TOKENS if device == "cuda" else CPU_TOKENS)
    least = SHORT_RUN_STEP_TOKENS if tokens < SHORT_RUN else LEAST_STEP_TOKENS
    wanted = min(max(tokens // RECIPES[config.recipe].steps_wanted, least), MOST_STEP_TOKENS)
    batch_size = config.batch_size or max(1, round(wanted / context))
    if tokens and config.batch_size and batch_size % processes:
        raise UnnormError(
            f"The run takes {batch_size:,} blocks per step, which {processes} processes can't share evenly. Use a "
            "number of processes that divides it."
        )
    batch_size = processes * max(1, round(batch_size / processes))
    if batch_size > 1 and 0 < tokens < batch_size * context / 2:
        raise UnnormError(
            f"--tokens {tokens:,} is less than one step, which takes {batch_size:,} blocks of {context:,} tokens. "
            "Give more tokens, or a smaller --batch-size or --context."
        )
    micro_batch = _micro_batch(config, model, device, context, batch_size // processes, processes) if tokens else 1
    return Plan(
        device=device,
        bfloat16=config.dtype == "bfloat16" or (config.dtype == "auto" and _fast_bfloat16(device)),
        compile=config.compile,
        cuda_graph=config.cuda_graph is not False and device == "cuda",
        tokens=tokens,
        context=context,
        batch_size=batch_size,
        micro_batch=micro_batch,
        steps=max(1, round(tokens / (batch_size * context))) if tokens else 0,
        lr=config.lr or default_lr(model, config.recipe),
        processes=processes,
    )


def control_plan(plan: Plan) -> Plan:
    """The same tokens in larger steps where steps are small, since labels are noisier than a teacher's logits.

    With 1.6 million tokens the control of `first-gpt2` ends at 3.072 nats with 4,096 tokens per step (its
    original: 3.099, `benchmarks/first.json`); with 512 it ended above the original. A weaker control would flatter the
    twin.
    """
    wanted = max(1, min(round(CONTROL_STEP_TOKENS / plan.step_tokens), plan.steps // 10))
    # Smaller ones in a short run: at least ten if the twin takes that many, and the twin's tokens to within 3%.
    factor = next(n for n in range(wanted, 0, -1) if abs(round(plan.steps / n) * n - plan.steps) <= 0.03 * plan.steps)
    return plan.model_copy(update={"batch_size": plan.batch_size * factor, "steps": round(plan.steps / factor)})


def healing_plan(plan: Plan, spent: int) -> Plan:
    """The plan with the learning rate that a single run over all tokens, `spent` and planned, would have reached.

    As under the taper's linear decay, whatever the recipe's.

    For `first-gpt2` after 300 thousand tokens (KL 0.0529), as many again bring KL to 0.0473 when started at
    half the usual rate, to 0.0476 at 0.7 times and to 0.0485 at the full rate.
    """
    return plan.model_copy(update={"lr": plan.lr * plan.tokens / max(1, plan.tokens + spent)})


def default_lr(model: PreTrainedModel, recipe: RecipeName) -> float:
    """Peak learning rate: the recipe's at width 768, scaled by 1 / sqrt(width), at most `MOST_LR`."""
    return min(MOST_LR, RECIPES[recipe].lr_at_768 * (768 / int(model.config.get_text_config().hidden_size)) ** 0.5)


def _micro_batch(
    config: RemoveConfig, model: PreTrainedModel, device: str, context: int, most: int, processes: int
) -> int:
    """Blocks at once: the largest divisor of `most` that is at most what was asked for, or whose activations fit."""
    states, free = _states_and_free(config, model, device, processes)
    if states > free:
        raise UnnormError(
            f"Training this model takes {states / 1e9:.1f} GB on {device} for weights, gradients and the optimizer "
            f"alone, but {free / 1e9:.1f} GB are free. Use a smaller model or a larger "
            "machine; --tokens 0 needs far less."
        )
    fit = config.micro_batch or max(1, int((free - states) * MEMORY_SHARE / (context * _token_bytes(model))))
    return max(size for size in range(1, most + 1) if most % size == 0 and size <= fit)


def scarce_memory(config: RemoveConfig, plan: Plan, model: PreTrainedModel) -> str:
    """A warning if the activations of a micro-batch may not fit beside the states; empty if they should."""
    states, free = _states_and_free(config, model, plan.device, plan.processes)
    token = _token_bytes(model) // (2 if plan.bfloat16 else 1)
    needed = plan.micro_batch * plan.context * token
    if not plan.steps or states + needed <= free:
        return ""
    fits = (free - states) // token
    remedy = f"; a --context of {fits:,} should fit" if plan.micro_batch == 1 and fits > 1 else ""
    return (
        f"memory may not suffice: of {free / 1e9:.1f} GB on {plan.device}, weights, gradients and the optimizer take "
        f"{states / 1e9:.1f}, and {plan.micro_batch} blocks of {plan.context:,} tokens about {needed / 1e9:.1f}{remedy}"
    )


def _states_and_free(config: RemoveConfig, model: PreTrainedModel, device: str, processes: int) -> tuple[int, int]:
    """Bytes that weights, gradients, AdamW's moments and the second model take, and bytes that are free for them."""
    unties = RECIPES[config.recipe].equalizes and config.twin is None
    parameters = trained_parameters(model) if unties else sum(p.numel() for p in model.parameters())
    in_buckets = 4 if processes > 1 else 0  # Of gradients, for their exchange.
    free = free_memory(device) // (count_here() if device == "cpu" else 1)
    return (STATE_BYTES + in_buckets) * parameters, free


def _token_bytes(model: PreTrainedModel) -> int:
    """Float32 activations of a token, about: 40 times the width for each layer, and 6 times the vocabulary.

    The latter is for logits and their softmax, of student and teacher.
    """
    config = model.config.get_text_config()
    return int(4 * (40 * config.hidden_size * config.num_hidden_layers + 6 * config.vocab_size))


def _fast_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    # AMX has matrix units for it. AVX-512's instructions made training three times as fast on one processor and a
    # quarter slower on another.
    return bool(able.get("amx_bf16")) or (bool(able.get("avx512_bf16")) and _bfloat16_gain() > LEAST_BFLOAT16_GAIN)


@torch.no_grad()
def _bfloat16_gain() -> float:
    """Measured speedup of a linear layer under bfloat16 autocast over float32, on this machine."""
    layer, x = nn.Linear(TIMED_WIDTH, TIMED_WIDTH), torch.ones(LEAST_STEP_TOKENS, TIMED_WIDTH)

    def seconds(bfloat16: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            start = time.perf_counter()
            layer(x)
            return time.perf_counter() - start

    # Alternating, so that other work on the machine slows both; the first turn is a warm-up.
    turns = [(seconds(False), seconds(True)) for _ in range(TIMED_TURNS + 1)][1:]
    return min(turn[0] for turn in turns) / min(turn[1] for turn in turns)
