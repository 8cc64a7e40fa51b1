"""Sequences that no corpus has, for the distillation stream: nothing else teaches a twin what the original does there.

A norm holds every input's scale; without it a model that has only met ordinary text may answer repeated, random or
foreign tokens with far too much confidence. The original's logits are all the labels that such sequences need.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Int
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase

from unnorm.data.packing import token_ids

Ids = Int[np.ndarray, "block position"]

_LARGEST_CODE_POINT = 0x1FBFF
_LARGEST_ALPHABET = 4096
_ASCII = (0x20, 0x7F)
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
    """Blocks of tokens from small and large random vocabularies, of random characters, and of broken text, in turn.

    Args:
        text: blocks of ordinary text, (block, position); what the broken text is made of.
        tokenizer: the model's.
        vocab_size: ids are below it.
        count: how many blocks.
        generator: source of everything random.
        begin: token that the model's texts begin with, if they do; every second block does too.

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
    stacked[:, 0] = generator.choice(vocabulary, count)
    if begin is not None:
        stacked[::2, 0] = begin
    return stacked


def random_starts(text: Ids, tokenizer: PreTrainedTokenizerBase, vocab_size: int, generator: Generator) -> Ids:
    """Text with another token at position 0 of every second block: anything may stand there, and it comes once a block.

    Args:
        text: token ids, (block, position); left as it is.
        tokenizer: the model's.
        vocab_size: ids are below it.
        generator: source of everything random.
    """
    changed = text.copy()
    changed[::2, 0] = generator.choice(_vocabulary(tokenizer, vocab_size), len(changed[::2]))
    return changed


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Int[np.ndarray, " token"]:
    return np.asarray(sorted(id for id in tokenizer.get_vocab().values() if id < vocab_size), np.int32)


def _few_tokens(vocabulary: np.ndarray, length: int, generator: Generator) -> np.ndarray:
    """Draws from 1 to all of the vocabulary's tokens; the number is log-uniform, so half of the blocks repeat a lot."""
    size = round(math.exp(generator.uniform(0, math.log(len(vocabulary)))))
    return generator.choice(generator.choice(vocabulary, size, replace=False), length)


def _cycle(vocabulary: np.ndarray, length: int, generator: Generator) -> np.ndarray:
    """A few random tokens, over and over."""
    period = generator.choice(vocabulary, generator.integers(1, _LONGEST_REPEAT + 1))
    return np.resize(period, length)


def _random_characters(
    tokenizer: PreTrainedTokenizerBase, vocabulary: np.ndarray, length: int, generator: Generator
) -> np.ndarray:
    """Draws from a few or many characters of one range of Unicode; every second time that is printable ASCII.

    Where the tokenizer has no tokens for them, draws from the vocabulary.
    """
    start, end = _ASCII if generator.random() < 0.5 else _random_range(generator)
    size = round(math.exp(generator.uniform(0, math.log(min(end - start, _LARGEST_ALPHABET)))))
    alphabet = start + generator.integers(0, end - start, size)
    points = generator.choice(alphabet, _CHARACTERS_A_TOKEN * length)
    text = "".join(chr(p) for p in points if not _SURROGATES[0] <= p <= _SURROGATES[1]) or " " * length
    ids = token_ids(text, tokenizer) or generator.choice(vocabulary, length)
    return np.resize(np.asarray(ids), length)


def _random_range(generator: Generator) -> tuple[int, int]:
    """Start and end, both log-uniform."""
    start = round(math.exp(generator.uniform(0, math.log(_LARGEST_CODE_POINT))))
    return start, start + round(math.exp(generator.uniform(0, math.log(_LARGEST_CODE_POINT - start + 1))))


def _broken_text(text: Ids, vocabulary: np.ndarray, generator: Generator) -> np.ndarray:
    """Ordinary text in which a share of the tokens, or one stretch of them, is random or one and the same."""
    block = text[generator.integers(len(text))].copy()
    size = 1 if generator.random() < 0.5 else len(block)
    random = np.resize(generator.choice(vocabulary, size), len(block))
    if generator.random() < 0.5:
        return np.where(generator.random(len(block)) < generator.uniform(0, 0.5), random, block)
    start, end = np.sort(generator.integers(0, len(block) + 1, 2))
    block[start:end] = random[start:end]
    return block
