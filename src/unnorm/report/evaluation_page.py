"""The evaluation page: models side by side, and each compared token by token with the original."""

from collections.abc import Sequence
from typing import Any

from unnorm.evaluation.results import Evaluation, Results, Score
from unnorm.report import evaluation_figures as figures
from unnorm.report.comparison import make_pair
from unnorm.report.numbers import MISSING, count, fixed, interval, percent, significant
from unnorm.report.sentences import intervals_over, overflow, truncations
from unnorm.report.templates import render_page


def render_evaluation(results: Results) -> str:
    """The whole HTML page, self-contained: scripts and styles are in it, and it loads nothing from the network."""
    results = results.with_short_names()
    rows = results.rows
    original = next(iter(results.protocol.get("original") or {}), None)
    style = figures.styles([row.model for row in rows], original)
    drawn = {"positions": figures.position_figure(rows, style), "calibration": figures.calibration_figure(rows, style)}
    kept = {name: figure for name, figure in drawn.items() if figure is not None}
    pairs = [make_pair(f"{row.model} on {row.data}", row.comparison) for row in rows if row.comparison is not None]
    values = {
        "title": headline(results, original),
        "rows": [_row(row) for row in rows],
        "overflows": [overflow(row) for row in rows if row.overflowed_blocks],
        "scores": [_score(score) for score in results.scores],
        "truncated": truncations(results.scores),
        "style": style,
        "original": original,
        "heights": {name: int(figure.layout.height) for name, figure in kept.items()},
        "protocol": _protocol(results.protocol),
    }
    return render_page("evaluation.html", values, kept, pairs)


def headline(results: Results, original: str | None) -> str:
    """The page title: which models, against which original."""
    models = list(dict.fromkeys([*(row.model for row in results), *(score.model for score in results.scores)]))
    others = [name for name in models if name != original]
    named = ", ".join(others[:-1]) + " and " + others[-1] if len(others) > 1 else "".join(others or models)
    return named if original is None or not others else f"{named} against {original}"


def _row(row: Evaluation) -> dict[str, Any]:
    return {
        "model": row.model,
        "data": row.data,
        "loss": fixed(row.loss),
        "interval": interval(row.loss_ci),
        "difference": fixed(row.difference, sign=True),
        "difference_interval": _signed(row.difference_ci),
        "resolved": row.difference_ci is not None and not row.difference_ci[0] <= 0 <= row.difference_ci[1],
        "perplexity": fixed(row.perplexity, 2),
        "perplexity_interval": "" if row.perplexity_ci is None else interval(row.perplexity_ci, 2),
        "bits_per_byte": fixed(row.bits_per_byte),
        "kl": significant(row.kl),
        "jsd": significant(row.jsd),
        "top1": percent(row.top1_agreement),
        "top5": percent(row.top5_agreement),
        "entropy": fixed(row.entropy, 3),
        "entropy_difference": fixed(row.entropy_difference, 3, sign=True),
        "ece": fixed(row.ece),
    }


def _score(score: Score) -> dict[str, Any]:
    small = abs(score.value) < 1e4
    shown = (lambda value: fixed(value, 4)) if small else (lambda value: significant(value))
    return {
        "model": score.model,
        "task": score.task,
        "metric": score.metric,
        "value": shown(score.value),
        "interval": MISSING if score.ci is None else f"{shown(score.ci[0])} to {shown(score.ci[1])}",
        "difference": fixed(score.difference, sign=True) if small else significant(score.difference),
        "difference_interval": _signed(score.difference_ci),
        "count": f"{count(score.items)} of {count(score.of)}",
    }


def _signed(ends: Sequence[float] | None) -> str:
    return MISSING if ends is None else f"{fixed(ends[0], sign=True)} to {fixed(ends[1], sign=True)}"


def _protocol(protocol: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and descriptions of how it was measured."""
    rows = []
    for corpus in protocol.get("corpora", []):
        rows += [
            (
                str(corpus["corpus"]),
                f"{corpus['source']}; held out: {corpus['held_out']}. {count(corpus['blocks'])} blocks of "
                f"{count(corpus['context'])} tokens, stride {count(corpus['stride'])}, evenly spaced among "
                f"{count(corpus['blocks_read'])}: {count(corpus['predicted_tokens'])} predicted tokens, "
                f"{count(corpus['bytes'])} bytes of text. Separator: {corpus['separator']}. The first token "
                f"{corpus['first_token']}. Intervals are over {intervals_over(corpus)}. "
                f"SHA-256 of the token ids: {corpus['tokens_sha256']}."
                f"{corpus['filter'] and ' Filtered: ' + corpus['filter'] + '.'}",
            )
        ]
    for task in protocol.get("tasks", []):
        drawn = "" if task["seed"] is None else f", drawn with seed {task['seed']}"
        rows += [
            (
                str(task["task"]),
                f"{task['source']}; {count(task['items'])} of {count(task['of'])} items{drawn}, "
                f"{task['fewshot']} shots, {task['harness']}, context {count(protocol.get('context'))}. "
                f"SHA-256 of the items: {task['items_sha256']}.",
            )
        ]
    rows += [("left out", reason) for reason in protocol.get("left_out", [])]
    rows += [("intervals", f"{protocol.get('interval')}")]
    digests = {**(protocol.get("original") or {}), **protocol.get("models", {})}
    rows += [("weights, SHA-256", ", ".join(f"{name} {digest}" for name, digest in digests.items()))]
    versions = ", ".join(f"{name} {number}" for name, number in protocol.get("versions", {}).items())
    return [*rows, ("run", f"{protocol.get('dtype')} on {protocol.get('device')}; {versions}")]
