"""Tables of `remove`, `heal`, `verify`, `stats` and `export`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unnorm.paths import quoted
from unnorm.report.sentences import (
    WORSE_THAN_NAIVE,
    knows_naive_removal,
    overflows_everywhere,
    shared_prefix,
    without_norms,
    worse_than_naive,
)
from unnorm.run_directory import MODEL, REPORT
from unnorm.terminal.fitting import Column, FittingTable
from unnorm.terminal.text import mark, shown, verdict, whole

if TYPE_CHECKING:  # These import torch, which would slow down `--help`.
    from unnorm.calibration.scales import ScaleStatistics
    from unnorm.exports.export import Exported
    from unnorm.proof.verify import Check
    from unnorm.sites.site import NormSite


def result_table(result: dict[str, Any]) -> RenderableType:
    """The summary at the end of a run."""
    table = Table(title=escape(without_norms(result, result["model"])), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _result_rows(result):
        table.add_row(*row)
    where = result["directory"]
    return Group(
        table, whole(f"model   {where}/{MODEL}\nreport  {where}/{REPORT}\nproof   unnorm verify {quoted(where)}")
    )


def _result_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [("KL to the original", shown(result["kl"]), _elsewhere(result["kl_elsewhere"]) or "nats per token")]
    if worse_than_naive(result):
        rows.append(("[red]KL, naive removal[/]", shown(result["naive_kl"]), f"[red]{WORSE_THAN_NAIVE}[/]"))
    if not overflows_everywhere(result):
        rows.append(("top-1 agreement", f"{result['top1_agreement']:.1%}", "same most likely next token"))
    increase = _elsewhere(result["lnfree_loss_elsewhere"]) or _increase(result)
    rows += [
        ("loss, original", shown(result["teacher_loss"]), f"{result['validation_tokens']:,} held-out tokens"),
        ("loss, twin", shown(result["lnfree_loss"]), increase),
    ]
    if result["overflowed_blocks"]:
        overflowed = f"{result['overflowed_blocks']:,} of {result['validation_blocks']:,}"
        # Without training, nothing was done about massive activations, and healing can't make up for that.
        heals = result["tokens"] and not overflows_everywhere(result)
        remedy = "train further: unnorm heal" if heals else "start a new run with more --tokens"
        rows.append(("overflows in", overflowed, f"held-out blocks: {remedy}"))
    if result["control_loss"] is not None:
        rows += [
            ("loss, control", shown(result["control_loss"]), "norms kept, same number of tokens"),
            ("gap", shown(result["gap"], "+.4f"), "loss of twin minus loss of control"),
        ]
    if knows_naive_removal(result):
        rows.append(("loss, naive removal", shown(result["naive_loss"]), "constant scales, no training"))
    rows.append(("norm modules left", _norms_left(result), ""))
    limited, share = result.get("limited_neurons"), result.get("share_at_limit")
    if limited and share is not None:
        reached = f"reached by {100 * share:.2g}% of activations on held-out text"
        rows.append(("neurons with limits", f"{limited:,}", reached))
    rows += [
        ("fold error", shown(result["fold_max_abs_error"], ".1e"), "largest difference in a logit, float64"),
        ("proof", "passed" if result["verified"] else "FAILED", "; ".join(result["failed_checks"]) or "unnorm verify"),
    ]
    if result["tokens"]:
        rows.append(("training", f"{result['tokens']:,}", _training(result)))
    if refused := result["skipped_steps"]:
        rows.append(("steps refused", f"{refused:,}", "gradient not finite or exploding"))
    return [*rows, ("time", f"{result['seconds']:.0f} s", f"peak memory {result['peak_memory_mb']:,.0f} MB")]


def _training(result: dict[str, Any]) -> str:
    tokens, text = result["tokens"], result.get("text_tokens") or math.inf
    over = f", {tokens / text:.1f} passes over the text" if tokens > 1.05 * text else ""
    return f"tokens, {result['tokens_per_second']:,.0f} a second{over}"


def _increase(result: dict[str, Any]) -> str:
    """The twin's loss minus the original's on the same tokens, with its interval."""
    if result["lnfree_loss"] is None:
        return ""
    increase = shown(result["lnfree_loss"] - result["teacher_loss"], "+.4f")
    ends = result["loss_increase_ci"]
    return f"{increase}, 95% interval {shown(ends[0], '+.4f')} to {shown(ends[1], '+.4f')}" if ends else increase


def _elsewhere(value: float | None) -> str:
    """A mean over the blocks that do not overflow; empty where all or none do."""
    return "" if value is None else f"{value:.4f} in the blocks that do not overflow"


def _norms_left(result: dict[str, Any]) -> str:
    left = result["norm_modules_left"]
    return f"{left} of {result['sites'] + left}"


def proof_table(checks: Sequence["Check"]) -> RenderableType:
    """The table of `unnorm verify`."""
    numbers = (Column(""), Column("measured"), Column("limit"))
    table = FittingTable((Column("proof", 16), *numbers, Column("what", 16)))
    for check in checks:
        shown = (f"{number:.1e}" if number else "0" for number in (check.value, check.limit))
        table.add_row(escape(check.name), mark(check.passed), *shown, escape(check.detail))
    failed = sum(not check.passed for check in checks)
    return Group(table, Text.from_markup(verdict(failed, len(checks), "checks")))


def sites_table(rows: Sequence[tuple["NormSite", "ScaleStatistics"]]) -> RenderableType:
    """The table of `unnorm stats`, without the path prefix that all norms share, so that it fits 80 columns."""
    caption = (
        "scale: what a token is divided by, at position 0 and, in the other columns, after it\n"
        "spread: std of log scale; larger is harder to remove\n"
        "position 0 at least 10 times the mean: massive activation, harder still"
    )
    headings = ("position 0", "mean", "spread", "smallest", "largest")
    names = (Column("norm site", 8), Column("kind", 6), Column("folds into", 9))
    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = FittingTable((*names, *(Column(heading, right=True) for heading in headings)), style=style)
    prefix = shared_prefix([site.name for site, _ in rows])
    for site, row in rows:
        numbers = (row.position_0, row.mean, row.spread, row.smallest, row.largest)
        into = site.folded_into or ("no weight: --in-place",)
        paths = [name.removeprefix(prefix) for name in (site.name, *into)]
        cells = (paths[0], site.kind, ", ".join(paths[1:]))
        table.add_row(*map(escape, cells), *(f"{number:.3g}" for number in numbers))
    return Group(table, Text(caption, style="dim italic"))


def export_table(exported: "Exported") -> RenderableType:
    """The summary of `unnorm export`."""
    table = Table(
        "precision",
        title=f"{exported.form} form relative to the folded model in float32",
        title_justify="left",
    )
    for heading in ("largest difference in a logit", "relative to largest logit", "KL, nats per token"):
        table.add_column(heading, justify="right")
    for row in exported.errors:
        table.add_row(row.name, *(f"{number:.1e}" if number else "0" for number in (row.max_abs, row.relative, row.kl)))
    return Group(table, whole(f"model  {exported.path}\nload   {exported.load}"), Text(f"note   {exported.note}"))
