"""Text, benchmark items and a second model to evaluate."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.conftest import POSITIONS, stdlib_text
from tests.evaluation.texts import BLOCKS


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """nanoGPT's files: `val.bin` beside `train.bin`, of real text in short documents."""
    lines = stdlib_text("os", "inspect", "pathlib", "typing").split("\n\n")
    ids = [i for text in lines for i in [*tiny_tokenizer(text)["input_ids"], 0]][: BLOCKS * POSITIONS]
    directory = tmp_path_factory.mktemp("tokens")
    np.array(ids[:1000], dtype="<u2").tofile(directory / "train.bin")
    np.array(ids, dtype="<u2").tofile(directory / "val.bin")
    return directory / "train.bin"


@pytest.fixture(scope="session")
def other_model(tiny_model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The tiny model with changed weights: far enough for every measure to differ."""
    model = deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def other_dir(
    tmp_path_factory: pytest.TempPathFactory, other_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    directory = tmp_path_factory.mktemp("models") / "other"
    other_model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three benchmarks in the form of their files."""
    directory = tmp_path_factory.mktemp("benchmarks")
    words = stdlib_text("os").split()[200:]
    hella = [
        {"ctx": " ".join(words[i : i + 5]), "label": i % 4, "endings": [words[i + 5 + k] + " it" for k in range(4)]}
        for i in range(24)
    ]
    lambada = [{"context": " ".join(words[i : i + 4]), "continuation": words[i + 4][:6]} for i in range(24)]
    pages = "".join(f" = Page {i} = \n \n {' '.join(words[30 * i : 30 * i + 30])} \n \n" for i in range(12))
    paths = {"hellaswag": directory / "h.jsonl", "lambada": directory / "l.jsonl", "wikitext": directory / "w.txt"}
    for name, rows in (("hellaswag", hella), ("lambada", lambada)):
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths["wikitext"].write_text(pages)
    return paths
