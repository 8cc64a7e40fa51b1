"""Results in words; empty strings where there is nothing to say."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unnorm.paths import short_name
from unnorm.report.numbers import MISSING, count, finite_or_none, fixed, percent, shortest, significant

if TYPE_CHECKING:  # These import torch, which would slow down `--help`.
    from unnorm.evaluation.results import Evaluation, Score


def without_norms(result: Mapping[str, Any], name: str) -> str:
    """What a twin is called: "without norms", or without some of them if others were kept."""
    name = short_name(name)
    kept, removed = result.get("norm_modules_left") or 0, result.get("sites") or 0
    return f"{name} without {removed} of its {removed + kept} norms" if kept else f"{name} without norms"


WORSE_THAN_NAIVE = "the twin is further from the original: lower --lr, or give more --tokens"
"""What to say of a run whose training did harm."""


def worse_than_naive(result: Mapping[str, Any]) -> bool:
    """Whether training left the twin further from the original than removing the norms without training does."""
    kl, naive = finite_or_none(result.get("kl")), finite_or_none(result.get("naive_kl"))
    known = bool(result.get("tokens")) and knows_naive_removal(result)
    return known and kl is not None and naive is not None and kl > naive


def knows_naive_removal(result: Mapping[str, Any]) -> bool:
    """Whether naive removal was measured on the text of this run, not on another that an earlier run had."""
    return "naive_loss" in result and not result.get("earlier_data")


def overflows_everywhere(result: Mapping[str, Any]) -> bool:
    """Whether every held-out block overflows, so that no token has predictions."""
    blocks = finite_or_none(result.get("validation_blocks"))
    return bool(blocks) and result.get("overflowed_blocks") == blocks


def sources(result: Mapping[str, Any]) -> list[str]:
    """All texts that the twin was trained on, in order, each once."""
    return list(dict.fromkeys([*(result.get("earlier_data") or ()), str(result.get("data"))]))


def own_share(result: Mapping[str, Any]) -> str:
    """How much of the training text the original wrote, beside a corpus; empty where it wrote none."""
    share = finite_or_none(result.get("self_share"))
    return f"{percent(share)} of the training text" if share else ""


def shared_prefix(names: Sequence[str]) -> str:
    """The dotted prefix shared by all paths, such as `transformer.`; empty for a single path."""
    shared = os.path.commonprefix(list(names)) if len(names) > 1 else ""  # noqa: RUF071 (cut at a dot below)
    return shared[: shared.rfind(".") + 1]


def overflowed(result: Mapping[str, Any]) -> str:
    """How many held-out blocks overflow, and the KL and loss in the others; empty where none do."""
    number = finite_or_none(result.get("overflowed_blocks"))
    if not number:
        return ""
    words = f"it overflows in {count(number)} of {count(result.get('validation_blocks'))} held-out blocks"
    return words + elsewhere(result.get("kl_elsewhere"), result.get("lnfree_loss_elsewhere"))


def overflow(row: "Evaluation", number: Callable[[int], str] = count) -> str:
    """In how many blocks of a corpus a model overflows, and the KL and loss in the others; `number` shapes counts."""
    words = f"{row.model} overflows in {number(row.overflowed_blocks)} of {number(row.blocks)} blocks of {row.data}"
    return words + elsewhere(row.kl_elsewhere, row.loss_elsewhere)


def truncations(scores: Iterable["Score"], number: Callable[[int], str] = count) -> list[str]:
    """One sentence for each model and benchmark with requests that were cut to the context; see `overflow`."""
    found = {(score.model, score.task): score.truncated for score in scores if score.truncated}
    return [
        f"{model} on {task}: {number(cut)} requests were longer than the context and lost their beginning"
        for (model, task), cut in found.items()
    ]


def elsewhere(kl: Any, loss: Any) -> str:
    """End of the sentence on overflowing blocks: KL and loss in the others; empty where they are missing."""
    known = {"KL": significant(kl), "loss": fixed(loss)}
    words = ", ".join(f"{name} {number}" for name, number in known.items() if number != MISSING)
    return words and f"; in the others {words}"


def intervals_over(corpus: Mapping[str, Any]) -> str:
    """How many documents or blocks intervals are over; blocks get the caveat that other documents are not covered."""
    words = f"{count(corpus['units'])} {corpus['interval_over']}"
    documents = corpus.get("documents")
    if corpus["interval_over"] == "documents" or documents is None:
        return words
    return f"{words} of {f'{count(documents)} documents' if documents > 1 else 'one document'}, and do not cover others"


def healed(result: Mapping[str, Any]) -> str:
    """How many of the training tokens came from healing the twin of a finished run; empty without healing."""
    if not result.get("twin"):
        return ""
    further = math.prod(result["plan"][key] for key in ("steps", "batch_size", "context"))
    return f"{count(further)} of these tokens, starting from the twin of a finished run"


def limits(result: Mapping[str, Any]) -> str:
    """How many neurons have limits, and how often these are reached on text; empty where none has."""
    if not result.get("limited_neurons"):
        return ""
    share = result.get("share_at_limit")
    reached = "" if share is None else f", reached by {shortest(100 * share, 2)}% of activations on held-out text"
    return f"{count(result['limited_neurons'])} neurons of quadratic MLPs{reached}"


def massive_neurons(neurons: Any) -> str:
    """Each neuron that writes massive activations: its location, the length of its vector and its scaling factor."""
    return "; ".join(
        f"{neuron.get('writer')} {neuron.get('index')} ({significant(neuron.get('length'))} times the usual scale, "
        f"now times {significant(neuron.get('factor'), 2)})"
        for neuron in neurons or []
    )
