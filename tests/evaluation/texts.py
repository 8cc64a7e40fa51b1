"""What is held out, and how benchmarks' files are named."""

from pathlib import Path

import numpy as np
import torch

from tests.conftest import POSITIONS

BLOCKS = 120


def held_out(tokens: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(tokens.parent / "val.bin", dtype="<u2").astype(np.int64)).view(-1, POSITIONS)


def named(files: dict[str, Path], *names: str) -> list[str]:
    return [f"{name}={files[name]}" for name in names or files]
