"""Summary of the per-token measurements of one model on one corpus."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Int
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.evaluation.comparison import compare_tokens
from unnorm.evaluation.corpora import Corpus, count_bytes, documents_of
from unnorm.evaluation.intervals import bootstrap_interval
from unnorm.evaluation.metrics import Distances, ModelTokens, calibration, measure_tokens
from unnorm.evaluation.results import Evaluation, perplexity
from unnorm.progress import Watch


def evaluate_model(
    model: PreTrainedModel,
    blocks: Dataset,
    original: PreTrainedModel | None = None,
    name: str = "model",
    data: str = "data",
    batch_size: int = 4,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Evaluate a model on packed blocks, in its own dtype with sums in float64.

    Args:
        model: any causal language model.
        blocks: rows of `input_ids`, all of one length. Intervals are over documents if a column `document` numbers
            each token's document and there are at least 30, otherwise over blocks.
        original: the model to compare with, on the same device.
        name: the model's name in the result.
        data: the corpus's name in the result.
        batch_size: blocks per forward pass.
        tokenizer: decodes tokens, for bits per byte and the token-by-token comparison; None leaves both out.
        watch: called with `{"kind": "progress", "tokens": …}`.
    """
    ids = np.asarray(blocks["input_ids"][:])
    text_bytes = 0 if tokenizer is None else count_bytes(ids, tokenizer)
    corpus = Corpus(name=data, source=data, blocks=blocks, documents=documents_of(blocks), text_bytes=text_bytes)
    ours, theirs, distances = measure_tokens(model, blocks, original, batch_size, watch)
    return summarize(name, corpus, ours, theirs, distances, tokenizer)


def summarize(
    name: str,
    corpus: Corpus,
    ours: ModelTokens,
    theirs: ModelTokens | None,
    distances: Distances | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Evaluation:
    """Means over a model's tokens on a corpus, with intervals.

    Args:
        name: the model's name.
        corpus: the corpus measured on; its units are those of the bootstrap.
        ours: the model's per-token measurements.
        theirs: the same of the original; None leaves out everything relative to the original.
        distances: distances between the original's and the model's predictions; goes with `theirs`.
        tokenizer: decodes tokens for the comparison; None leaves it out.
    """
    ids = np.asarray(corpus.blocks["input_ids"][:])
    kind, units = corpus.units()
    sizes = np.bincount(units.ravel())
    sums = np.bincount(units.ravel(), ours.loss.ravel().astype(np.float64))
    loss = _mean(ours.loss)
    overflowed = np.asarray(~(np.isfinite(ours.confidence).all(1) & np.isfinite(ours.loss).all(1)))
    elsewhere = ~overflowed if overflowed.any() and not overflowed.all() else None
    ece, bins = calibration(ours.confidence[:, :-1], ours.guess[:, :-1] == ids[:, 1:])
    evaluation = Evaluation(
        model=name,
        data=corpus.name,
        loss=loss,
        loss_ci=bootstrap_interval(sums, sizes),
        perplexity=perplexity(loss),
        tokens=ours.loss.size,
        context=corpus.context,
        kl=None,
        jsd=None,
        top1_agreement=None,
        position_loss=tuple(ours.loss.mean(0, dtype=np.float64).tolist()),
        bits_per_byte=loss * ours.loss.size / (math.log(2) * corpus.text_bytes) if corpus.text_bytes else None,
        entropy=_mean(ours.entropy),
        ece=ece,
        calibration=bins,
        interval_over=kind,
        units=len(sizes),
        unit_losses=tuple(sums.tolist()),
        unit_tokens=tuple(sizes.tolist()),
        blocks=len(overflowed),
        overflowed_blocks=int(overflowed.sum()),
        loss_elsewhere=None if elsewhere is None else _mean(ours.loss[elsewhere]),
    )
    if theirs is None or distances is None:
        return evaluation
    changes = np.bincount(units.ravel(), (ours.loss - theirs.loss).ravel().astype(np.float64))
    return replace(
        _beside_original(evaluation, ours, theirs, distances, ids, tokenizer),
        difference=loss - _mean(theirs.loss),
        difference_ci=bootstrap_interval(changes, sizes),
    )


def _beside_original(
    evaluation: Evaluation,
    ours: ModelTokens,
    theirs: ModelTokens,
    distances: Distances,
    ids: Int[NDArray[np.int32], "block position"],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Evaluation:
    """Add the measurements relative to the original."""
    comparable = np.isfinite(distances.kl).all(1)
    return replace(
        evaluation,
        kl=max(_mean(distances.kl), 0.0),  # Of two equal models it may be below by rounding.
        kl_elsewhere=_mean(distances.kl[comparable]) if comparable.any() and not comparable.all() else None,
        jsd=_mean(distances.jsd),
        top1_agreement=_mean(distances.top1),
        top5_agreement=_mean(distances.top5),
        entropy_difference=_mean(ours.entropy) - _mean(theirs.entropy),
        comparison=compare_tokens(ours, theirs, distances, ids, tokenizer) if tokenizer and comparable.all() else None,
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))
