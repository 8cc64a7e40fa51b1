"""Evaluation text: held-out blocks of tokens, and the document each token belongs to."""

# jaxtyping needs classes in evaluated annotations; NumPy's array types are not, from Python 3.12 and NumPy 2.5 on.
from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from unnorm.data import OVERSAMPLING, column_of, evenly_spaced
from unnorm.data.packing import HeldOut, begin_of_blocks, open_tokens
from unnorm.errors import UnnormError
from unnorm.runs.text import TextSource

EVALUATION_TOKENS = 50_000
"""Held-out tokens to evaluate on, or all there are if fewer."""
LEAST_DOCUMENTS = 30
"""Minimum for intervals over documents: fewer say little about what other documents would give."""
FILTER_TOKENS = 10_000_000
"""Tokens read to find which ones occur in a corpus, when another corpus is filtered by it."""


_NOT_SAID = HeldOut("", "")


class NothingLeftError(UnnormError):
    """The filter of a corpus left none of its blocks."""


@dataclass(frozen=True)
class Corpus:
    """Packed blocks of one corpus.

    Attributes:
        name: its name in results.
        source: where it comes from, as in `--data`.
        blocks: rows of `input_ids`, all of one length.
        documents: document number of every token, or None where nothing separates documents.
        text_bytes: bytes of UTF-8 text in the predicted tokens.
        read: number of blocks read minus those filtered out; `blocks` are evenly spaced among them.
        separator: the token after every document, in words.
        held_out: how it was kept apart from training text.
        begin: the token that every block begins with, in words.
        filter: which blocks were filtered out after reading, in words; empty if none were.
    """

    name: str
    source: str
    blocks: Dataset
    documents: Int[NDArray[np.int64], "block position"] | None
    text_bytes: int
    read: int = 0
    separator: str = ""
    held_out: HeldOut = _NOT_SAID
    begin: str = ""
    filter: str = ""

    @property
    def context(self) -> int:
        """Tokens per block."""
        return len(self.blocks[0]["input_ids"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids in order, as little-endian 32-bit integers."""
        return hashlib.sha256(column_of(self.blocks, "input_ids").astype("<i4").tobytes()).hexdigest()

    def units(self) -> tuple[str, Int[NDArray[np.int64], "block predicted"]]:
        """The bootstrap unit, `documents` or `blocks`, and the unit index of each predicted token."""
        predicted = (len(self.blocks), self.context - 1)
        if self.documents is not None:
            of_token = np.unique(self.documents[:, 1:], return_inverse=True)[1].reshape(predicted)
            if of_token.max() + 1 >= LEAST_DOCUMENTS:
                return "documents", of_token
        return "blocks", np.broadcast_to(np.arange(predicted[0])[:, None], predicted)

    def protocol(self) -> dict[str, Any]:
        """Exactly what was predicted from what, as plain values."""
        kind, units = self.units()
        return {
            "corpus": self.name,
            "source": self.source,
            "held_out": self.held_out.words,
            "context": self.context,
            "stride": self.context,
            "blocks": len(self.blocks),
            "blocks_read": self.read,
            "filter": self.filter,
            "predicted_tokens": units.size,
            "bytes": self.text_bytes,
            "separator": self.separator,
            "first_token": f"of each block is given, not predicted; {self.begin}",
            "interval_over": kind,
            "units": int(units.max()) + 1,
            "documents": None if self.documents is None else len(np.unique(self.documents[:, 1:])),
            "tokens_sha256": self.fingerprint,
        }


def open_corpus(
    name: str,
    text: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int,
    tokens: int,
    filtered_by: TextSource | None = None,
) -> Corpus:
    """The held-out part of a text, packed; the same tokenizer and arguments always give the same blocks.

    Args:
        name: its name in results.
        text: where it is from.
        tokenizer: its end-of-text token separates documents.
        vocab_size: number of token embeddings of the models.
        context: tokens per block.
        tokens: number of tokens at most, rounded up to whole blocks.
        filtered_by: other text; blocks with a token that does not occur in its first `FILTER_TOKENS` are left out.

    Raises:
        UnnormError: the text can't be read, is too little, or is divided in another way than when a run read it.
        NothingLeftError: the filter leaves no block.
    """
    count = max(1, math.ceil(tokens / context))
    found, held_out = text.held_out(tokenizer, vocab_size, context, OVERSAMPLING * count)
    blocks = with_documents(found, tokenizer)
    left_out = ""
    if filtered_by is not None:
        keep = tokens_in(filtered_by, tokenizer, vocab_size)
        blocks = blocks.select(np.flatnonzero(keep[column_of(blocks, "input_ids")].all(1)))
        left_out = (
            f"left out are {len(found) - len(blocks):,} of {len(found):,} blocks, with a token that the first "
            f"{FILTER_TOKENS:,} of {filtered_by.data} lack"
        )
        if not len(blocks):
            raise NothingLeftError(
                f"Nothing is left of '{name}': each of its {len(found)} blocks has a token that does not occur in the "
                f"text of '{filtered_by.data}'. Give more of that text, or evaluate on the unfiltered corpus."
            )
    read = len(blocks)
    blocks = evenly_spaced(blocks, count)
    return Corpus(
        name=name,
        source=text.data,
        blocks=blocks.select_columns("input_ids"),
        documents=documents_of(blocks),
        read=read,
        separator=_separator(tokenizer),
        held_out=held_out,
        text_bytes=count_bytes(column_of(blocks, "input_ids"), tokenizer),
        begin=_beginning(text.data, tokenizer),
        filter=left_out,
    )


def tokens_in(
    text: TextSource, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Bool[NDArray[np.bool_], " vocab"]:
    """Which ids occur in the first `FILTER_TOKENS` tokens of a training text.

    Raises:
        UnnormError: the text can't be read.
    """
    occurs = np.zeros(vocab_size, dtype=np.bool_)
    seen = 0
    train_tokens, *_ = open_tokens(text.data, tokenizer, text.text_field, text.split)
    for ids in train_tokens():
        occurs[ids[ids < vocab_size]] = True
        seen += len(ids)
        if seen >= FILTER_TOKENS:
            break
    begin = begin_of_blocks(text.data, tokenizer)
    if begin is not None and begin < vocab_size:
        occurs[begin] = True
    return occurs


def count_bytes(ids: Int[NDArray[np.int32], "block position"], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text of all tokens but the first of each block; special tokens count as none.

    A character that is split at the edge of a block may be counted a few bytes off. 0 if some tokens are the unknown
    one, whose text is lost.
    """
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) and (ids[:, 1:] == tokenizer.unk_token_id).any():
        return 0

    def total(rows: Int[NDArray[np.int32], "block position"]) -> int:
        texts = tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode("utf-8", errors="replace")) for text in texts)

    return total(ids) - total(ids[:, :1])


def with_documents(blocks: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Add each token's document number as `document` to contiguous blocks, if the tokenizer has an end-of-text token.

    The separator belongs to the document before it.
    """
    if tokenizer.eos_token_id is None:
        return blocks
    ends = column_of(blocks, "input_ids").ravel() == int(tokenizer.eos_token_id)
    numbers = np.cumsum(ends) - ends
    return blocks.add_column("document", list(numbers.reshape(len(blocks), -1)))


def documents_of(blocks: Dataset) -> Int[NDArray[np.int64], "block position"] | None:
    """Each token's document number as added by `with_documents`, or None if it was not."""
    if "document" not in blocks.column_names:
        return None
    numbers = column_of(blocks, "document")
    return numbers if numbers.shape == column_of(blocks, "input_ids").shape else None


def _beginning(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    begin = begin_of_blocks(source, tokenizer)
    return (
        "no beginning-of-text token is added"
        if begin is None
        else f"it is {tokenizer.convert_ids_to_tokens(begin)} (id {begin})"
    )


def _separator(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token_id is None:
        return "none"
    return f"{tokenizer.eos_token} (id {tokenizer.eos_token_id}) after each document, predicted like any other token"
