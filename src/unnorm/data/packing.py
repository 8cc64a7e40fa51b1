"""Pack documents into blocks of exactly `context` tokens, with end-of-text between documents and no padding.

If the tokenizer puts a token before every text (Gemma, Llama 3), every block begins with it, as in the model's own
training.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unnorm.data.documents import open_documents
from unnorm.data.pieces import pieces, spread
from unnorm.data.token_files import VOCABULARY, Tokens, open_token_files, token_paths
from unnorm.errors import UnnormError, short
from unnorm.models.tokenizer import begin_of_text

_TEXTS_AT_ONCE = 64
_CHARS_AT_ONCE = 1_000_000
_SAYS_EVERY = 15.0  # seconds
_SMALL_SOURCE = 1000
"""First training blocks, whose last tenth is held out if the held-out text does not fill one block."""

_LEAST_HELD_OUT = 8
"""Fewest held-out tokens to measure anything on."""


class HeldOut(NamedTuple):
    """How validation text is kept apart from training text.

    Attributes:
        words: for people, with amounts where there is little of it.
        division: how the source is divided, whatever the context: the same words, the same division.
    """

    words: str
    division: str


@dataclass(frozen=True)
class Blocks:
    """Packed token blocks: each row's `input_ids` is one block of `context` token ids."""

    train: Dataset
    validation: Dataset
    held_out: HeldOut


def build_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int,
    train_blocks: int,
    validation_blocks: int,
    text_field: str | None = None,
    split: str = "train",
    say: Callable[[str], None] = lambda _: None,
) -> Blocks:
    """Read as much of `source` as is asked for (less, if it holds less) and pack it.

    If the held-out text fills less than one block, the last tenth of the first 1,000 training blocks is held out
    instead. While training text is read, `say` gets a progress message every 15 seconds.

    Raises:
        UnnormError: the source cannot be read, holds less than two blocks, or has token ids outside the model's
            vocabulary of `vocab_size`.
    """
    _check_width(source, vocab_size)
    train_tokens, validation_tokens, division = open_tokens(source, tokenizer, text_field, split)
    words = division
    begin = begin_of_blocks(source, tokenizer)
    validation = _cut(validation_tokens(), context, validation_blocks, begin)
    if len(validation):
        train = _cut(train_tokens(), context, train_blocks, begin, say)
    else:
        # Always read enough to fix the held-out part, so that it does not depend on how much is asked for.
        whole = _cut(train_tokens(), context, _SMALL_SOURCE + train_blocks, begin, say)
        first, rest = whole[:_SMALL_SOURCE], whole[_SMALL_SOURCE:]
        held = max(1, len(first) // 10)
        train, validation = np.concatenate([first[:-held], rest])[:train_blocks], first[-held:][:validation_blocks]
        words = f"the last {held} of {'the first ' if len(rest) else ''}{len(first):,} blocks"
    if len(train) == 0 or len(validation) == 0:
        raise _too_little(source, context)
    for blocks in (train, validation):
        _check_ids(source, blocks, vocab_size)
    return Blocks(as_dataset(train), as_dataset(validation), HeldOut(words, division))


def _too_little(source: str, context: int) -> UnnormError:
    return UnnormError(
        f"'{source}' holds fewer than two blocks of {context} tokens, one for training and one for validation. Give "
        "more text or a smaller --context."
    )


def held_out_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int,
    count: int,
    text_field: str | None = None,
    split: str = "train",
) -> tuple[Dataset, HeldOut]:
    """At most `count` blocks of text that no run trains on at any context, and how it is kept apart.

    Held-out text of less than one block becomes one shorter block; what `build_blocks` would hold out instead is
    training text for runs with a shorter context.

    Raises:
        UnnormError: the source cannot be read, has fewer than 8 held-out tokens, or has token ids outside the model's
            vocabulary of `vocab_size`.
    """
    _check_width(source, vocab_size)
    _, validation_tokens, division = open_tokens(source, tokenizer, text_field, split)
    words = division
    begin = begin_of_blocks(source, tokenizer)
    blocks = _cut(validation_tokens(), context, count, begin)
    if not len(blocks):
        rest = np.concatenate([*validation_tokens(), np.empty(0, np.int32)])
        if len(rest) < _LEAST_HELD_OUT:
            raise _too_little(source, context)
        blocks, words = _begun(rest[None], begin), f"{division}, {len(rest)} tokens"
    _check_ids(source, blocks, vocab_size)
    return as_dataset(blocks), HeldOut(words, division)


def open_tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, text_field: str | None = None, split: str = "train"
) -> tuple[Callable[[], Iterator[Tokens]], Callable[[], Iterator[Tokens]], str]:
    """Training and held-out token ids from text or nanoGPT's token files, and in words how they are kept apart.

    Training text from local files comes in pieces from all over them (`spread`); other text comes in order.

    Raises:
        UnnormError: the source can't be read.
    """
    if paths := token_paths(source):
        return open_token_files(source, paths, split)
    documents = open_documents(source, text_field, split)
    return (
        lambda: token_stream(spread(documents.train) if documents.local else documents.train(), tokenizer),
        lambda: token_stream(documents.validation(), tokenizer),
        documents.held_out,
    )


def begin_of_blocks(source: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which every block of a source begins: as every text does; none for token files, taken as is."""
    return None if token_paths(source) else begin_of_text(tokenizer)


def _begun(blocks: Tokens, begin: int | None) -> Tokens:
    return blocks if begin is None else np.insert(blocks, 0, begin, axis=1)


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Each document's token ids followed by end-of-text; many documents are tokenized at a time.

    A very long document is yielded in several pieces.
    """
    end: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for batch in _batches(texts):
        try:
            found = tokenizer([piece for piece, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # The tokenizers library raises plain Exception.
            raise UnnormError(
                f"The tokenizer can't encode this text ({short(error)}): it has no token for some of the characters, "
                "and no unknown token. Give text without them."
            ) from error
        for ids, (_, is_last) in zip(found, batch, strict=True):
            yield np.asarray(ids + end if is_last else ids, dtype=np.int32)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    for text in texts:
        for piece in pieces(text, _CHARS_AT_ONCE):
            batch.append(piece)
            if len(batch) == _TEXTS_AT_ONCE or sum(len(text) for text, _ in batch) > _CHARS_AT_ONCE:
                yield batch
                batch = []
    if batch:
        yield batch


def _cut(
    pieces: Iterable[Tokens],
    context: int,
    most: int,
    begin: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Tokens:
    """Join pieces of tokens and cut them into at most `most` whole blocks; the rest is dropped.

    With `begin`, each block is that token followed by context - 1 tokens of text.
    """
    length = context if begin is None else context - 1
    kept: list[Tokens] = []
    total = 0
    said = time.monotonic()
    for piece in pieces:
        kept.append(piece)
        total += len(piece)
        if total >= most * length:
            break
        if time.monotonic() - said > _SAYS_EVERY:
            said = time.monotonic()
            say(f"read {total:,} of at most {most * length:,} tokens")
    blocks = min(total // length, most)
    joined = np.concatenate(kept) if kept else np.empty(0, np.int32)
    return _begun(joined[: blocks * length].reshape(blocks, length), begin)


def _check_width(source: str, vocab_size: int) -> None:
    if vocab_size > VOCABULARY and token_paths(source):
        raise UnnormError(
            f"'{source}' can't hold this model's text: its token ids have 16 bits, but the model's vocabulary has "
            f"{vocab_size:,} tokens. Give the text itself."
        )


def _check_ids(source: str, ids: Tokens, vocab_size: int) -> None:
    if ids.max() >= vocab_size:
        if not token_paths(source):
            raise UnnormError(
                f"'{source}' has token id {ids.max()}, a special token for which the model has no embedding (its "
                f"vocabulary ends at {vocab_size - 1}). Leave such text out."
            )
        raise UnnormError(
            f"'{source}' has token id {ids.max()}, but the model's vocabulary ends at {vocab_size - 1}: "
            "it was made with another tokenizer. Give the text itself, or token ids of this model's tokenizer."
        )


def as_dataset(blocks: Tokens) -> Dataset:
    """Token ids of shape (block, position) as rows of `input_ids`."""
    features = Features({"input_ids": List(Value("int32"), length=blocks.shape[1])})
    return Dataset.from_dict({"input_ids": blocks}, features=features)


def column_of(blocks: Dataset, name: str = "input_ids") -> NDArray[Any]:
    """A column of (block, position) as an array; through Python lists it would take three times the memory."""
    return np.asarray(blocks.with_format("numpy")[name][:])


OVERSAMPLING = 4
"""Factor by which more text is read, then thinned evenly: neighbouring blocks share a document and are redundant."""


def evenly_spaced(blocks: Dataset, count: int) -> Dataset:
    """At most `count` rows, evenly spaced: neighbouring blocks often come from one document."""
    count = min(count, len(blocks))
    return blocks.select([i * len(blocks) // count for i in range(count)])


def batches(blocks: Dataset, batch_size: int, device: torch.device) -> Iterator[Int[Tensor, "batch position"]]:
    """The rows of `blocks` in order, `batch_size` at a time."""
    for start in range(0, len(blocks), batch_size):
        yield torch.tensor(blocks[start : start + batch_size]["input_ids"], device=device)
