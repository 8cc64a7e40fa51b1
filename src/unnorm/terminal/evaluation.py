"""Tables of `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from unnorm.report.sentences import intervals_over, overflow, truncations
from unnorm.terminal.fitting import Column, FittingTable
from unnorm.terminal.text import shown, whole

if TYPE_CHECKING:  # These import torch, which would slow down `--help`.
    from unnorm.evaluation import Evaluation, Results, Score

LEAST_NAME = 10
"""Minimum width of a name column, in characters."""
LEAST_DATA = 6
"""The same of the names of corpora, which are short."""


def evaluation_tables(results: "Results", out: Path | None = None) -> RenderableType:
    """The tables of `unnorm evaluate`: losses, fidelity, benchmarks, and how they were measured."""
    results = results.with_short_names()
    rows = results.rows
    parts: list[RenderableType] = [_loss_table(rows), _fidelity_table(rows)] if rows else []
    if not results.protocol.get("original"):
        parts.append(
            Text("Nothing to compare with: name the original with --against for KL, agreement and differences.")
        )
    parts += [Text(overflow(row, "{:,}".format)) for row in rows if row.overflowed_blocks]
    parts += [_score_table(results.scores)] if results.scores else []
    parts += [Text(line) for line in truncations(results.scores, "{:,}".format)]
    parts += [Text(line, style="dim") for line in _protocol_lines(results.protocol)]
    parts += [whole(f"page  {out / 'evaluation.html'}")] if out is not None else []
    return Group(*parts)


def _loss_table(rows: Sequence["Evaluation"]) -> FittingTable:
    headings = ("loss", "Δ original", "perplexity", "bits/byte")
    table = _side_by_side("Loss in nats per token, 95% intervals", "data", numbers=headings)
    for row in rows:
        table.add_row(
            escape(row.model),
            escape(row.data),
            _with_interval(_or_dash(row.loss, ".4f"), row.loss_ci, ".3f"),
            _with_interval(_or_dash(row.difference, "+.4f"), row.difference_ci, "+.4f"),
            _with_interval(_or_dash(row.perplexity, ".2f"), row.perplexity_ci, ".2f"),
            _or_dash(row.bits_per_byte, ".4f"),
        )
    return table


def _fidelity_table(rows: Sequence["Evaluation"]) -> FittingTable:
    headings = ("KL", "JSD", "top-1", "top-5", "entropy", "ECE")
    table = _side_by_side("Distance to the original, entropy (Δ original), calibration", "data", numbers=headings)
    for row in rows:
        changed = "" if row.entropy_difference is None else f" ({row.entropy_difference:+.3f})"
        table.add_row(
            escape(row.model),
            escape(row.data),
            _or_dash(row.kl, ".4f"),
            _or_dash(row.jsd, ".4f"),
            _or_dash(row.top1_agreement, ".1%"),
            _or_dash(row.top5_agreement, ".1%"),
            _or_dash(row.entropy, ".3f") + changed,
            _or_dash(row.ece, ".4f"),
        )
    return table


def _score_table(scores: Sequence["Score"]) -> FittingTable:
    headings = ("value", "Δ original")
    table = _side_by_side("Benchmarks via lm-eval, 95% intervals", "benchmark", "metric", numbers=headings)
    for score in scores:
        interval = "" if score.ci is None else f"\n{shown(score.ci[0])} to {shown(score.ci[1])}"
        change = _with_interval(_or_dash(score.difference, "+.4g"), score.difference_ci, "+.4f")
        names = map(escape, (score.model, score.task, score.metric))
        table.add_row(*names, shown(score.value) + interval, change)
    return table


def _side_by_side(title: str, *words: str, numbers: Sequence[str]) -> FittingTable:
    """A table of models in which names may wrap but numbers never do."""
    names = [Column(word, LEAST_DATA if word == "data" else LEAST_NAME) for word in ("model", *words)]
    columns = (*names, *(Column(number, right=True) for number in numbers))
    return FittingTable(
        columns, len(names), title, {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    )


def _with_interval(value: str, interval: tuple[float, float] | None, form: str) -> str:
    return value if interval is None else f"{value}\n{_or_dash(interval[0], form)} to {_or_dash(interval[1], form)}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else shown(value, form)


def _protocol_lines(protocol: dict[str, Any]) -> list[str]:
    lines = [
        f"{row['corpus']}: {row['blocks']:,} blocks of {row['context']} tokens, stride "
        f"{row['stride']}, evenly spaced among "
        f"{row['blocks_read']:,}; {row['predicted_tokens']:,} predicted tokens; held out: {row['held_out']}; "
        f"separator: {row['separator']}; first token {row['first_token']}; "
        f"intervals over {intervals_over(row)}{row['filter'] and '; filtered: ' + row['filter']}"
        for row in protocol["corpora"]
    ]
    lines += [
        f"{row['task']}: {row['items']:,} of {row['of']:,} items"
        + ("" if row["seed"] is None else f", seed {row['seed']}")
        + f", {row['fewshot']} shots, {row['harness']}, context {protocol['context']}; {row['source']}"
        for row in protocol["tasks"]
    ]
    lines += protocol.get("left_out", [])
    return [*lines, f"intervals: {protocol['interval']}; {protocol['dtype']} on {protocol['device']}"]
