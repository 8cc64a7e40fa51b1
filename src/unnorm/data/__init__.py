"""Text from any source, made into packed blocks of tokens."""

from unnorm.data.documents import STDLIB, Documents, open_documents
from unnorm.data.packing import Blocks, as_dataset, build_blocks
from unnorm.data.stress import random_starts, stress_blocks

__all__ = [
    "STDLIB",
    "Blocks",
    "Documents",
    "as_dataset",
    "build_blocks",
    "open_documents",
    "random_starts",
    "stress_blocks",
]
