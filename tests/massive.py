"""Models with a massive activation, which one neuron writes at position 0."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import VOCAB, small_llama
from tests.families import FAMILIES, random_model
from unnorm.hooks import recorded
from unnorm.models.linear import linear_weight
from unnorm.models.running import copy_model

WIDTH = 32
RARE, PLANTED, SECOND = 7, 5, 9
"""A token that stands at position 0 and nowhere else, the neuron that fires on it, and one that may do so too."""
IDS = torch.randint(RARE + 1, VOCAB, (8, WIDTH), generator=torch.Generator().manual_seed(0))
IDS[:, 0] = RARE
BLOCKS = Dataset.from_dict({"input_ids": IDS.tolist()})


class Mlp(NamedTuple):
    """Paths: the linear layers that a neuron's input comes from, the one that it writes with, the next norm."""

    incoming: tuple[str, ...]
    outgoing: str
    next_norm: str


GPT2 = Mlp(("transformer.h.0.mlp.c_fc",), "transformer.h.0.mlp.c_proj", "transformer.h.1.ln_1")
LLAMA = Mlp(
    ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
    "model.layers.1.mlp.down_proj",
    "model.layers.2.input_layernorm",
)

GEMMA3 = Mlp(
    ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    "model.layers.0.mlp.down_proj",
    "model.layers.1.input_layernorm",
)
BEHIND = "model.layers.0.post_feedforward_layernorm"


@torch.no_grad()
def read(model: nn.Module, name: str) -> torch.Tensor:
    with recorded(model, [name]) as record:
        model(input_ids=IDS)
    return record[name][0]


@torch.no_grad()
def with_massive(model: PreTrainedModel, mlp: Mlp, length: float = 100.0) -> PreTrainedModel:
    """A copy of the model in which one neuron writes a long vector at position 0, and little elsewhere."""
    model = copy_model(model).eval()
    model.get_input_embeddings().weight[RARE] *= 5
    reads = read(model, mlp.incoming[0])
    at_0, elsewhere = reads[:, 0].mean(0), reads[:, 1:].mean((0, 1))
    direction = (at_0 - elsewhere) / (at_0 - elsewhere).square().sum()
    for linear in map(model.get_submodule, mlp.incoming):
        linear_weight(linear)[PLANTED] = 10 * direction
        if linear.bias is not None:
            linear.bias[PLANTED] = -5 - 10 * elsewhere @ direction
    fires = read(model, mlp.outgoing)[:, 0, PLANTED].mean()
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    linear_weight(model.get_submodule(mlp.outgoing))[:, PLANTED] = length * vector / fires
    return model


@torch.no_grad()
def with_two_massive(times: float) -> PreTrainedModel:
    """A small Llama in which a second neuron fires as the first does, and writes `times` its vector."""
    model = with_massive(small_llama(), LLAMA)
    for weight in (linear_weight(model.get_submodule(name)) for name in LLAMA.incoming):
        weight[SECOND] = weight[PLANTED]
    columns = linear_weight(model.get_submodule(LLAMA.outgoing)).T
    columns[SECOND] = times * columns[PLANTED]
    return model


@torch.no_grad()
def with_massive_before_a_norm() -> PreTrainedModel:
    """A small Gemma 3 in which the norm after an MLP makes one feature long, which one neuron writes at position 0."""
    config = FAMILIES["gemma3"][0]()
    config.vocab_size = VOCAB
    model = with_massive(random_model(lambda: config).float(), GEMMA3, length=1.0)
    weight = linear_weight(model.get_submodule(GEMMA3.outgoing))
    long = weight[:, PLANTED].norm()
    weight[0] /= 100
    weight[:, PLANTED] = long * torch.eye(32)[0]
    gain = model.get_submodule(BEHIND).weight
    gain[0] = 100 * (1 + gain[0]) - 1
    return model


def planted_files(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A planted model and text in which its massive activation shows, written, as options of a run."""
    model.save_pretrained(directory / "planted")
    tokenizer.save_pretrained(directory / "planted")
    text = directory / "text.jsonl"
    rare = tokenizer.decode([RARE])
    text.write_text("".join(f'{{"text": "{rare} {number} is not {number + 1}"}}\n' for number in range(3000)))
    return {"model": str(directory / "planted"), "data": str(text)}
