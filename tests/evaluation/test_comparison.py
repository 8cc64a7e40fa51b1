"""Original and twin token by token: each number is that of the model it is said to be of."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from unnorm.evaluation.comparison import Comparison, compare_tokens
from unnorm.evaluation.metrics import Distances, ModelTokens
from unnorm.report.comparison import make_pair


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
