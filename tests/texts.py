"""Text and token ids written to files of every kind, and read again."""

import bz2
import csv
import gzip
import importlib
import json
import lzma
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from unnorm.data import Blocks, build_blocks
from unnorm.data.documents import Documents
from unnorm.data.files import COMPRESSIONS

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BEGIN = "!"


def begin_texts(tokenizer: PreTrainedTokenizerFast) -> int:
    """Make a tokenizer put a begin-of-text token before every text, as Gemma's does; return its id."""
    tokenizer.bos_token = BEGIN
    begin = tokenizer.bos_token_id
    post = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    tokenizer.backend_tokenizer.post_processor = post
    return begin


DOCUMENTS = [f'Document {i}: naïve\n  text,\twith "quotes" and {"words " * (i % 7)}' for i in range(120)]
CONTEXT = 16

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd.compress,
}
if find_spec("lz4"):
    COMPRESS[".lz4"] = lambda content: importlib.import_module("lz4.frame").compress(content)


def write(path: Path, documents: list[str], column: str = "text") -> Path:
    """Documents as a file of the format that its name says; a text file is one document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = next(s for s in path.suffixes if s not in COMPRESSIONS)
    if suffix in (".txt", ".md"):
        path.write_text("\n".join(documents), newline="")
    elif suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(documents)))
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", column), *enumerate(documents)])
    else:
        pq.write_table(pa.table({"id": range(len(documents)), column: documents}), path)
    if path.suffix in COMPRESS:
        path.write_bytes(COMPRESS[path.suffix](path.read_bytes()))
    return path


def write_ids(path: Path, ids: np.ndarray) -> Path:
    ids.astype("<u2").tofile(path)
    return path


def sides(documents: Documents) -> tuple[list[str], list[str]]:
    return list(documents.train()), list(documents.validation())


def pack(
    source: Path | str,
    tokenizer: PreTrainedTokenizerFast,
    train_blocks: int = 10_000,
    validation_blocks: int = 10_000,
    context: int = CONTEXT,
    vocab_size: int = 65_536,
    split: str = "train",
) -> Blocks:
    return build_blocks(str(source), tokenizer, vocab_size, context, train_blocks, validation_blocks, split=split)


def ids_of(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    return np.array(blocks.train["input_ids"]), np.array(blocks.validation["input_ids"])


def stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The definition: each document's ids, with end-of-text after it."""
    return [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
