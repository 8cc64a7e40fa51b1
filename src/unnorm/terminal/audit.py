"""Tables of `audit`."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unnorm.terminal.text import mark, shown, verdict

_AUDITED = ("99.9%", "99.99%", "largest")
_MOST_SHOWN = 60
"""Characters shown of a text."""
_ENOUGH = 10_000
"""Tokens in a class needed for the 99.99th percentile to differ from the largest loss."""


def audit_tables(result: dict[str, Any]) -> RenderableType:
    """The tables of `unnorm audit`: verdicts with losses, residual norms, and the worst input of each class."""
    rows = result["classes"]
    passed = verdict(sum(not row["passed"] for row in rows), len(rows), "classes")
    ends = [f"{passed}; in brackets: the reference, {escape(result['reference'])}"]
    if few := [row["name"] for row in rows if row["tokens"] < _ENOUGH]:
        where = "in every class (more --tokens change that)" if len(few) == len(rows) else f"in {', '.join(few)}"
        ends += [
            f"One token decides, since the 99.99th percentile of fewer than {_ENOUGH:,} tokens is the largest loss: "
            f"{escape(where)}."
        ]
    if not all(row["passed"] for row in rows):
        ends += [
            f"Limits: {result['limits']['p99.99']:g} times the reference's 99.99th percentile and "
            f"{result['limits']['largest']:g} times its largest loss. More training may help: unnorm heal DIR"
        ]
    return Group(
        _audit_losses(rows),
        _audit_norms(rows),
        _audit_worst(rows),
        Text.from_markup("\n".join(ends)),
    )


def _audit_table(title: str, *left: str, right: Sequence[str], last: str | None = None) -> Table:
    """A table of input classes that wraps instead of cutting text where the terminal is narrow."""
    table = Table(title=title, title_justify="left")
    for heading in ("inputs", *left):
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", overflow="fold")
    if last is not None:
        table.add_column(last, overflow="fold")
    return table


def _audit_losses(rows: Sequence[dict[str, Any]]) -> Table:
    table = _audit_table("Loss in nats per token", "", right=("tokens", *_AUDITED), last="why")
    for row in rows:
        numbers = _pairs(row, "loss", ".2f")
        table.add_row(row["name"], mark(row["passed"]), f"{row['tokens']:,}", *numbers, row["reason"])
    return table


def _audit_norms(rows: Sequence[dict[str, Any]]) -> Table:
    table = _audit_table(
        "Norm of the residual vector that the unembedding reads", right=_AUDITED, last="NaN or infinite in"
    )
    for row in rows:
        overflowed = [
            ", ".join(name for name, finite in row[key].items() if not finite) for key in ("finite", "reference_finite")
        ]
        bad = f"{overflowed[0] or 'none'} ({overflowed[1] or 'none'})" if any(overflowed) else "none"
        table.add_row(row["name"], *_pairs(row, "residual_norm", ".1f"), bad)
    return table


def _audit_worst(rows: Sequence[dict[str, Any]]) -> Table:
    table = _audit_table("Largest excess of loss over the reference", "text", "next", right=("loss",))
    for row in rows:
        for worst in row["worst"][:1]:
            loss = f"{shown(worst['loss'], '.2f')} ({shown(worst['reference_loss'], '.2f')})"
            table.add_row(row["name"], Text(_printable(worst["text"])), Text(_printable(worst["next"])), loss)
    return table


def _pairs(row: dict[str, Any], key: str, form: str) -> list[str]:
    ours, theirs = row[key], row[f"reference_{key}"]
    return [f"{shown(ours[name], form)} ({shown(theirs[name], form)})" for name in ours]


def _printable(text: str) -> str:
    """Text on one line, with control and unprintable characters escaped; long text keeps its end, read last."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if shown.isspace():
        shown = shown.replace(" ", "␣")
    return shown if len(shown) <= _MOST_SHOWN else "…" + shown[-_MOST_SHOWN:]
