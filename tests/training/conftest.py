"""A batch to train on."""

import pytest
import torch

from tests.conftest import VOCAB


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "text": torch.ones(2, dtype=torch.bool)}
