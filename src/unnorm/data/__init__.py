"""Text from any source, packed into blocks of tokens."""

from unnorm.data.documents import open_documents
from unnorm.data.files import OWN_TEXT, STDLIB
from unnorm.data.packing import (
    OVERSAMPLING,
    Blocks,
    HeldOut,
    as_dataset,
    batches,
    begin_of_blocks,
    build_blocks,
    column_of,
    evenly_spaced,
)
from unnorm.data.sampling import own_text
from unnorm.data.stress import random_starts, stress_blocks

__all__ = [
    "OVERSAMPLING",
    "OWN_TEXT",
    "STDLIB",
    "Blocks",
    "HeldOut",
    "as_dataset",
    "batches",
    "begin_of_blocks",
    "build_blocks",
    "column_of",
    "evenly_spaced",
    "open_documents",
    "own_text",
    "random_starts",
    "stress_blocks",
]
