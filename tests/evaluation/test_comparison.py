"""Original and twin token by token: each number is that of the model it is said to be of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from unnorm.evaluation import evaluate
from unnorm.evaluation.comparison import Comparison, compare_tokens
from unnorm.evaluation.metrics import Distances, ModelTokens, calibration
from unnorm.report.comparison import make_pair, strength
from unnorm.report.evaluation_figures import calibration_figure, density_figure


def planted(tokenizer: PreTrainedTokenizerFast) -> Comparison:
    """Two blocks of 8 tokens, of which the original predicts all and the model none, with more doubt by 1 nat."""

    def one(loss: float, entropy: float, guess: int, confidence: float) -> ModelTokens:
        losses, entropies = np.full((2, 7), loss, np.float32), np.full((2, 8), entropy, np.float32)
        return ModelTokens(losses, entropies, np.full((2, 8), guess, np.int32), np.full((2, 8), confidence, np.float32))

    distances = Distances(*(np.full((2, 8), 0.5, np.float32) for _ in range(4)))
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    return compare_tokens(one(2, 1.5, 70, 0.25), one(0, 0.5, 80, 0.75), distances, ids, tokenizer)


def test_what_is_compared_is_the_models_beside_the_originals(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = planted(tiny_tokenizer)
    density = np.asarray(found.loss_density)
    assert density[0, -1] == density.sum() == 14  # By the original's loss, then by the model's.
    counts = np.asarray(found.entropy_difference.counts)
    assert counts[np.asarray(found.entropy_difference.edges[:-1]) > 0].sum() == counts.sum() == 16
    context = found.contexts[0]
    for of_original, of_model, values in (
        (context.original_loss, context.loss, (0, 2)),
        (context.original_entropy, context.entropy, (0.5, 1.5)),
        (context.original_confidence, context.confidence, (0.75, 0.25)),
        (context.original_guess, context.guess, tuple(tiny_tokenizer.decode([i]) for i in (80, 70))),
    ):
        assert (set(of_original), set(of_model)) == ({values[0]}, {values[1]})


def test_a_token_that_got_worse_is_not_shown_as_better(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pair = make_pair("pair", planted(tiny_tokenizer))
    assert {token["better"] for token in pair.contexts[0]["tokens"]} == {False}
    assert {value["change"] for value in pair.values[0]} == {"+2.000"}


def test_the_density_has_the_models_loss_upwards(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    heat = next(trace for trace in density_figure(planted(tiny_tokenizer)).data if trace.type == "heatmap")
    assert heat.customdata[-1][0] == 14


def test_a_model_that_is_too_sure_is_below_the_line(tokens: Path, tiny_model_dir: Path) -> None:
    (row,) = evaluate(str(tiny_model_dir), data=str(tokens), tokens=500)
    _, bins = calibration(np.full(100, 0.75), np.array([1] * 50 + [0] * 50))
    figure = calibration_figure([replace(row, calibration=bins)], {row.model: ("#000000", "solid")})
    assert list(figure.data[0].y) == [-0.25]


def test_colours_are_of_the_change_and_of_the_distance(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    shown = make_pair("pair", planted(tiny_tokenizer)).contexts[0]["tokens"]
    assert {(token["d"], token["k"]) for token in shown} == {(strength(2.0), strength(0.5))}
    assert strength(2.0) > strength(0.5)
