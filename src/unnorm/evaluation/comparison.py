"""Token-by-token comparison of a model with the original: distributions, and the contexts that differ most."""

# jaxtyping needs classes in evaluated annotations; NumPy's array types are not, from Python 3.12 and NumPy 2.5 on.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from unnorm.evaluation.metrics import Distances, ModelTokens

WINDOW = 96
"""Tokens per displayed context."""
SHOWN = 6
"""Number of contexts with the largest mean KL, and of those with the largest change in loss; the median is added."""
LOSS_BINS, HISTOGRAM_BINS = 64, 48
LEAST_KL = 1e-6
"""Lower bound on KL: smaller values are rounding error."""

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Histogram:
    """Token counts per bin; there is one more edge than counts."""

    edges: tuple[float, ...]
    counts: Counts


@dataclass(frozen=True)
class Context:
    """Consecutive tokens of one block, with what was measured at the prediction of each.

    Attributes:
        block: index of the block.
        start: position of the first token in the block.
        why: `kl`, `loss` or `typical`, the reason it was chosen.
        tokens: text of each token.
        original_loss: the original's loss on each token, in nats.
        loss: the model's.
        kl: KL(original || model) where the token is predicted, in nats.
        original_entropy: entropy of the original's prediction, in nats.
        entropy: the model's.
        original_guess: the original's most likely token at that position.
        original_confidence: its probability.
        guess: the model's most likely token.
        confidence: its probability.
    """

    block: int
    start: int
    why: str
    tokens: tuple[str, ...]
    original_loss: tuple[float, ...]
    loss: tuple[float, ...]
    kl: tuple[float, ...]
    original_entropy: tuple[float, ...]
    entropy: tuple[float, ...]
    original_guess: tuple[str, ...]
    original_confidence: tuple[float, ...]
    guess: tuple[str, ...]
    confidence: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Distributions over all positions, and selected contexts.

    Attributes:
        loss_edges: bin edges shared by both losses, in nats.
        loss_density: token counts indexed by bin of the original's loss, then of the model's.
        kl: histogram of KL in nats, with log-spaced bins.
        entropy_difference: histogram of the model's entropy minus the original's.
        contexts: the selected contexts, by decreasing mean KL.
    """

    loss_edges: tuple[float, ...]
    loss_density: tuple[Counts, ...]
    kl: Histogram
    entropy_difference: Histogram
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class _Pair:
    model: ModelTokens
    original: ModelTokens
    distances: Distances
    ids: Int[NDArray[np.int32], "block position"]
    tokenizer: PreTrainedTokenizerBase


def compare_tokens(
    model: ModelTokens,
    original: ModelTokens,
    distances: Distances,
    ids: Int[NDArray[np.int32], "block position"],
    tokenizer: PreTrainedTokenizerBase,
) -> Comparison:
    """Summarize the per-token measurements for display."""
    most = max(float(np.quantile(side.loss, 0.9995)) for side in (model, original))
    edges = np.linspace(0, max(most, 1.0), LOSS_BINS + 1)
    x, y = (np.clip(side.loss.ravel(), 0, edges[-1]).astype(np.float64) for side in (original, model))
    density = np.histogram2d(x, y, bins=[edges, edges])[0].astype(int)
    kl = np.maximum(distances.kl, LEAST_KL)
    changes = model.entropy - original.entropy
    widest = max(float(np.quantile(np.abs(changes), 0.999)), 1e-3)
    return Comparison(
        loss_edges=tuple(edges.tolist()),
        loss_density=tuple(tuple(row) for row in density.tolist()),
        kl=_histogram(kl, np.geomspace(LEAST_KL, max(float(kl.max()), 10 * LEAST_KL) * 1.0001, HISTOGRAM_BINS + 1)),
        entropy_difference=_histogram(changes, np.linspace(-widest, widest, HISTOGRAM_BINS + 1)),
        contexts=_contexts(_Pair(model, original, distances, ids, tokenizer)),
    )


def _histogram(values: NDArray[Any], edges: NDArray[np.float64]) -> Histogram:
    counts = np.histogram(np.clip(values.ravel(), edges[0], edges[-1]), bins=edges)[0]
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def _contexts(pair: _Pair) -> tuple[Context, ...]:
    length = min(WINDOW, pair.ids.shape[1] - 1)
    kl = _window_means(pair.distances.kl[:, :-1], length)
    change = _window_means(np.abs(pair.model.loss - pair.original.loss), length)
    by_kl, by_change = (np.argsort(-means.ravel(), kind="stable") for means in (kl, change))
    chosen = {int(window): "kl" for window in by_kl[:SHOWN]}
    for window in by_change[:SHOWN]:
        chosen.setdefault(int(window), "loss")
    middle = int(by_kl[len(by_kl) // 2])
    if middle not in chosen:  # In short texts every window may be one of those.
        chosen[middle] = "typical"
    ordered = sorted(chosen, key=lambda window: -float(kl.ravel()[window]))
    places = [divmod(window, kl.shape[1]) for window in ordered]
    return tuple(
        _context(pair, block, number * length, length, chosen[window])
        for window, (block, number) in zip(ordered, places, strict=True)
    )


def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The token's text inside a sequence: Llama 2's decoder strips the leading space of a token decoded alone."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    starts_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
    return f" {text}" if starts_word and not text.startswith(" ") else text


def _window_means(values: Float[NDArray[Any], "block predicted"], length: int) -> Float[NDArray[Any], "block window"]:
    """Means over consecutive windows; an incomplete window at the end of a block is dropped."""
    windows = values.shape[1] // length
    return values[:, : windows * length].reshape(len(values), windows, length).mean(-1, dtype=np.float64)


def _context(pair: _Pair, block: int, start: int, length: int, why: str) -> Context:
    """The `length` tokens after the first `start + 1` of a block; entry t of a measurement is about token t + 1."""
    at = slice(start, start + length)

    def numbers(values: NDArray[Any], digits: int = 4) -> tuple[float, ...]:
        return tuple(round(float(value), digits) for value in values[block, at])

    def texts(of: NDArray[Any]) -> tuple[str, ...]:
        return tuple(_token_text(pair.tokenizer, int(i)) for i in of)

    return Context(
        block=block,
        start=start + 1,
        why=why,
        tokens=texts(pair.ids[block, start + 1 : start + 1 + length]),
        original_loss=numbers(pair.original.loss),
        loss=numbers(pair.model.loss),
        kl=numbers(pair.distances.kl, 5),
        original_entropy=numbers(pair.original.entropy),
        entropy=numbers(pair.model.entropy),
        original_guess=texts(pair.original.guess[block, at]),
        original_confidence=numbers(pair.original.confidence, 3),
        guess=texts(pair.model.guess[block, at]),
        confidence=numbers(pair.model.confidence, 3),
    )
