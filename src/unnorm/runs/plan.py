"""The plan of one run: what is chosen for the user, from the model, the recipe and the machine."""

import time
from typing import Literal

import torch
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from unnorm.errors import UnnormError
from unnorm.models.device import choose_device, free_memory
from unnorm.models.sizes import choose_context
from unnorm.runs.config import RemoveConfig
from unnorm.taper.recipes import RECIPES, RecipeName

CPU_TOKENS = 1_600_000
GPU_TOKENS = 20_000_000
CONTROL_STEP_TOKENS = 4096
"""Tokens that the control's steps have at least."""
LEAST_STEP_TOKENS, MOST_STEP_TOKENS = 512, 2**19
MOST_LR = 2e-3
MEMORY_SHARE = 0.5
"""Share of the memory that the states leave free which activations may take."""
STATE_BYTES = 20
"""For each parameter: weight, gradient and AdamW's two moments; on a GPU the original's too, on a CPU the last good."""
LEAST_BFLOAT16_GAIN = 1.5
"""How many times as fast a linear layer must be in bfloat16 for the whole step to gain."""
TIMED_WIDTH, TIMED_TURNS = 512, 10


class Plan(BaseModel):
    """The settings with nothing left open: what a run was really done with."""

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
        """Whether steps are replayed from a record: not those that add up gradients, or share them with others."""
        return self.cuda_graph and self.processes == 1 and self.accumulation == 1

    @property
    def accumulation(self) -> int:
        """Micro-batches that each process adds up for one optimizer step."""
        return self.batch_size // (self.micro_batch * self.processes)


def make_plan(config: RemoveConfig, model: PreTrainedModel, processes: int = 1) -> Plan:
    """Choose what the user left open.

    Raises:
        UnnormError: the device is not there, the context is longer than the model's, or a step takes more tokens than
            there are.
    """
    device = choose_device(config.device)
    context = choose_context(config.context, model)
    tokens = config.tokens if config.tokens is not None else (GPU_TOKENS if device == "cuda" else CPU_TOKENS)
    wanted = min(max(tokens // RECIPES[config.recipe].steps_wanted, LEAST_STEP_TOKENS), MOST_STEP_TOKENS)
    batch_size = config.batch_size or max(1, round(wanted / context))
    if batch_size > processes and 0 < tokens < batch_size * context / 2:
        raise UnnormError(
            f"--tokens {tokens:,} are less than one step, which takes {batch_size:,} blocks of {context:,} tokens. "
            "Give more tokens, or a smaller --batch-size or --context."
        )
    batch_size = processes * max(1, round(batch_size / processes))
    micro_batch = _micro_batch(model, context, batch_size // processes, device, config.micro_batch) if tokens else 1
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
    """The same tokens in larger steps, where steps are small: labels are noisier than a teacher's logits.

    With 1.6 million tokens the bundled model's control ends at 3.072 nats with 4,096 tokens a step (original: 3.099,
    `benchmarks/demo.json`); with 512 it ended above the original. A weaker control would flatter the twin.
    """
    wanted = max(1, min(round(CONTROL_STEP_TOKENS / plan.step_tokens), plan.steps // 10))
    # In a short run smaller ones: ten of them, where the twin takes as many, and its tokens to a few hundredths.
    factor = next(n for n in range(wanted, 0, -1) if abs(round(plan.steps / n) * n - plan.steps) <= 0.03 * plan.steps)
    return plan.model_copy(update={"batch_size": plan.batch_size * factor, "steps": round(plan.steps / factor)})


def healing_plan(plan: Plan, spent: int) -> Plan:
    """The learning rate starts where it would stand in one run of all tokens, `spent` ones and those of the plan.

    After 300 thousand tokens of the bundled model (KL 0.0529) as many more bring KL to 0.0473 from half the usual rate,
    to 0.0476 from 0.7 times and to 0.0485 from all of it.
    """
    return plan.model_copy(update={"lr": plan.lr * plan.tokens / max(1, plan.tokens + spent)})


def default_lr(model: PreTrainedModel, recipe: RecipeName) -> float:
    """Peak learning rate: the recipe's, by the inverse root of the model's width."""
    return min(MOST_LR, RECIPES[recipe].lr_at_768 * (768 / int(model.config.get_text_config().hidden_size)) ** 0.5)


def _micro_batch(model: PreTrainedModel, context: int, most: int, device: str, asked: int | None) -> int:
    """Blocks at once: the largest divisor of `most` that is not more than was asked for, else whose activations fit.

    Activations of a block's pass, in float32: some 40 widths a layer and token, and the logits and their softmax,
    of student and teacher, 6 times over.
    """
    config = model.config.get_text_config()
    numbers = context * (40 * config.hidden_size * config.num_hidden_layers + 6 * config.vocab_size)
    states = STATE_BYTES * sum(p.numel() for p in model.parameters())
    free = free_memory(device)
    if states > free:
        raise UnnormError(
            f"Training this model takes {states / 1e9:.1f} GB on {device} for weights, gradients and the optimizer "
            f"alone, and {free / 1e9:.1f} GB are free. Take a smaller model or a larger "
            "machine; --tokens 0 needs far less."
        )
    fit = asked or max(1, int((free - states) * MEMORY_SHARE / (4 * numbers)))
    return max(size for size in range(1, most + 1) if most % size == 0 and size <= fit)


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
    """How many times as fast as in float32 a linear layer is under autocast, here and now."""
    layer, x = nn.Linear(TIMED_WIDTH, TIMED_WIDTH), torch.ones(LEAST_STEP_TOKENS, TIMED_WIDTH)

    def seconds(bfloat16: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            start = time.perf_counter()
            layer(x)
            return time.perf_counter() - start

    # By turns, so that other work on the machine slows both; the first turn is for warming up.
    turns = [(seconds(False), seconds(True)) for _ in range(TIMED_TURNS + 1)][1:]
    return min(turn[0] for turn in turns) / min(turn[1] for turn in turns)
