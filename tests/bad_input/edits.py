"""Changes for the worse to the files of a model or a run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

Edit = Callable[[Path], None]

GPT2_SIZES = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}


def edit_config(**values: object) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def write(name: str, content: bytes) -> Edit:
    return lambda directory: (directory / name).write_bytes(content) and None


def truncate(name: str, size: int) -> Edit:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size]) and None


def delete(*names: str) -> Edit:
    def edit(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return edit


def poison(value: float) -> Edit:
    def edit(directory: Path) -> None:
        model = transformers.GPT2LMHeadModel.from_pretrained(directory)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
        model.save_pretrained(directory)

    return edit


def shrink_vocabulary(directory: Path) -> None:
    config = transformers.GPT2Config(vocab_size=200, **GPT2_SIZES)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def replace_by_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Trap(directory / "SPRUNG")}))
