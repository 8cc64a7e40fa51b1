"""Sequences that no corpus has, added to distillation to teach a twin what the original does on them.

A norm fixes the scale of every input; without it, a model that has only seen ordinary text may be far too confident
on repeated, random or foreign tokens. The original's logits are all the labels that such sequences need.
"""

import math
import string
from collections.abc import Callable

import numpy as np
from jaxtyping import Int
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase

from unnorm.models.tokenizer import token_ids

Ids = Int[np.ndarray, "block position"]

_LARGEST_CODE_POINT = 0x1FBFF
_LARGEST_ALPHABET = 4096
_ASCII = (string.printable, string.ascii_letters, string.digits, string.punctuation, string.whitespace)
_SURROGATES = (0xD800, 0xDFFF)
_CHARACTERS_A_TOKEN = 4
_LONGEST_REPEAT = 16


def stress_blocks(
    text: Ids,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    count: int,
    generator: Generator,
    begin: int | None = None,
) -> Ids:
    """Blocks of random or repeated tokens, of random characters and of broken text, in turn.

    Token 0 of each block is `begin` or random, each token of the vocabulary once before any comes twice.

    Args:
        text: blocks of ordinary text, (block, position), from which broken text is made.
        tokenizer: the model's tokenizer.
        vocab_size: ids are below it.
        count: number of blocks.
        generator: source of all randomness.
        begin: token that the model's texts begin with, if any; every second block begins with it too.

    Returns:
        Token ids, (count, position).
    """
    context = text.shape[1]
    vocabulary = _vocabulary(tokenizer, vocab_size)
    kinds: list[Callable[[], np.ndarray]] = [
        lambda: _few_tokens(vocabulary, context, generator),
        lambda: _random_characters(tokenizer, vocabulary, context, generator),
        lambda: _broken_text(text, vocabulary, generator),
        lambda: _random_characters(tokenizer, vocabulary, context, generator),
        lambda: _cycle(vocabulary, context, generator),
    ]
    blocks = [kinds[index % len(kinds)]() for index in range(count)]
    stacked = np.stack(blocks).astype(np.int32) if blocks else np.empty((0, context), np.int32)
    stacked[:, 0] = _starts(vocabulary, count, generator)
    if begin is not None:
        stacked[::2, 0] = begin
    return stacked


def random_starts(
    text: Ids,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    generator: Generator,
    begin: int | None = None,
) -> Ids:
    """Text with a random first token in every second block: any token may come first, and a block has one first token.

    Where texts begin with a begin-of-text token it comes after that, without which such models are lost: a random token
    in its place costs Gemma 3 270M 1.7 nats on all that follows.

    Args:
        text: token ids, (block, position); not modified.
        tokenizer: the model's tokenizer.
        vocab_size: ids are below it.
        generator: source of all randomness.
        begin: token that each block begins with, if any.
    """
    changed = text.copy()
    first = 0 if begin is None else 1
    changed[::2, first] = _starts(_vocabulary(tokenizer, vocab_size), len(changed[::2]), generator)
    return changed


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Int[np.ndarray, " token"]:
    return np.asarray(sorted(id for id in tokenizer.get_vocab().values() if id < vocab_size), np.int32)


def _starts(vocabulary: np.ndarray, count: int, generator: Generator) -> np.ndarray:
    """So many random tokens, each as often as any other, to within one."""
    return np.resize(generator.permutation(vocabulary), count)


def _few_tokens(vocabulary: np.ndarray, length: int, generator: Generator) -> np.ndarray:
    """Draws from a random subset of the vocabulary, whose size is log-uniform, so half of the blocks repeat a lot."""
    size = round(math.exp(generator.uniform(0, math.log(len(vocabulary)))))
    return generator.choice(generator.choice(vocabulary, size, replace=False), length)


def _cycle(vocabulary: np.ndarray, length: int, generator: Generator) -> np.ndarray:
    """1 to 16 random tokens, repeated over and over."""
    period = generator.choice(vocabulary, generator.integers(1, _LONGEST_REPEAT + 1))
    return np.resize(period, length)


def _random_characters(
    tokenizer: PreTrainedTokenizerBase, vocabulary: np.ndarray, length: int, generator: Generator
) -> np.ndarray:
    """Text drawn from few or many characters of one Unicode range or, half of the time, of one kind of ASCII.

    If the tokenizer has no tokens for it, tokens are drawn from the vocabulary.
    """
    kind = _ascii_kind(generator) if generator.random() < 0.5 else _random_range(generator)
    size = round(math.exp(generator.uniform(0, math.log(min(len(kind), _LARGEST_ALPHABET)))))
    points = generator.choice(generator.choice(kind, size), _CHARACTERS_A_TOKEN * length)
    text = "".join(chr(p) for p in points if not _SURROGATES[0] <= p <= _SURROGATES[1]) or " " * length
    ids = token_ids(text, tokenizer) or generator.choice(vocabulary, length)
    return np.resize(np.asarray(ids), length)


def _ascii_kind(generator: Generator) -> np.ndarray:
    """Code points of all of printable ASCII, or of its letters, digits, punctuation or white space alone."""
    return np.asarray([ord(character) for character in _ASCII[generator.integers(len(_ASCII))]])


def _random_range(generator: Generator) -> np.ndarray:
    """A range of code points; start and length are log-uniform."""
    start = round(math.exp(generator.uniform(0, math.log(_LARGEST_CODE_POINT))))
    return np.arange(start, start + round(math.exp(generator.uniform(0, math.log(_LARGEST_CODE_POINT - start + 1)))))


def _broken_text(text: Ids, vocabulary: np.ndarray, generator: Generator) -> np.ndarray:
    """Ordinary text with scattered tokens, or one stretch, replaced by random tokens or by one repeated token."""
    block = text[generator.integers(len(text))].copy()
    size = 1 if generator.random() < 0.5 else len(block)
    random = np.resize(generator.choice(vocabulary, size), len(block))
    if generator.random() < 0.5:
        return np.where(generator.random(len(block)) < generator.uniform(0, 0.5), random, block)
    start, end = np.sort(generator.integers(0, len(block) + 1, 2))
    block[start:end] = random[start:end]
    return block
