"""What a run looks like in a terminal: live progress, and tables at the end."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from unnorm.runs.directory import MODEL, REPORT

if TYPE_CHECKING:
    from unnorm.calibration.scales import ScaleStatistics
    from unnorm.evaluation import Evaluation, Results, Score
    from unnorm.exports.export import Exported
    from unnorm.proof.verify import Check
    from unnorm.sites.site import NormSite


_DAY = 24 * 3600.0
LEAST_NAME = 10
"""Characters of a name that stand side by side at least."""


class Progress:
    """Shows a run as it goes: a live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: RichProgress | None = None
        self.task: Any = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
                transient=True,
                speed_estimate_period=_DAY,  # A long run tells its tokens once in minutes.
            )
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, row: dict[str, Any], /) -> None:
        """Take one row of metrics or a phase."""
        if row["kind"] == "phase":
            self._phase(row)
        elif self.live is not None:
            self.live.update(self.task, completed=row["tokens"], numbers=_numbers(row))
        elif row["kind"] == "validation":
            self.console.print(f"  {row['tokens']:>12,} tokens  {_numbers(row)}", highlight=False, soft_wrap=True)

    def _phase(self, row: dict[str, Any]) -> None:
        if self.live is None:
            self.console.print(row["text"], markup=False, highlight=False, soft_wrap=True)
            return
        if self.task is not None:
            self.live.remove_task(self.task)
        self.live.console.print(f"[dim]{escape(row['text'])}[/]", highlight=False)
        self.task = self.live.add_task(row["text"].partition(":")[0], total=row.get("tokens"), numbers="")


def _numbers(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}"] if "loss" in row else []
    parts += [f"KL {row['kl']:.4f}"] if "kl" in row else []
    parts += [f"removed {row['sites_removed']}/{row['sites']}"] if "sites" in row else []
    parts += [f"alpha {row['alpha']:.2f}"] if 0 < row.get("alpha", 0) < 1 else []
    parts += [f"{row['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in row and row["tokens"] else []
    return "  ".join(parts)


def result_table(result: dict[str, Any]) -> RenderableType:
    """The summary at the end of a run."""
    from unnorm.report.sentences import without_norms  # With torch, which `--help` does not wait for.

    table = Table(title=escape(without_norms(result, result["model"])), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _result_rows(result):
        table.add_row(*row)
    where = result["directory"]
    return Group(
        table, _whole(f"model   {where}/{MODEL}\nreport  {where}/{REPORT}\nproof   unnorm verify {quote(where)}")
    )


def _whole(lines: str) -> Text:
    """Paths and commands, which are copied: however long, they are not broken into lines."""
    return Text(lines, no_wrap=True, overflow="ignore")


def _result_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [
        ("KL to the original", f"{result['kl']:.4f}", _elsewhere(result["kl_elsewhere"]) or "nats per token"),
        ("top-1 agreement", f"{result['top1_agreement']:.1%}", "same most likely next token"),
        ("loss, original", f"{result['teacher_loss']:.4f}", f"{result['validation_tokens']:,} held-out tokens"),
        (
            "loss, twin",
            f"{result['lnfree_loss']:.4f}",
            _elsewhere(result["lnfree_loss_elsewhere"]) or _increase(result),
        ),
    ]
    if result["overflowed_blocks"]:
        overflowed = f"{result['overflowed_blocks']:,} of {result['validation_blocks']:,}"
        rows.append(("overflows in", overflowed, "held-out blocks: train it on with unnorm heal"))
    if result["control_loss"] is not None:
        rows += [
            ("loss, control", f"{result['control_loss']:.4f}", "norms kept, as many tokens"),
            ("gap", f"{result['gap']:+.4f}", "loss of twin - loss of control"),
        ]
    rows += [
        ("loss, naive removal", _loss_or_overflow(result["naive_loss"]), "constants without training"),
        ("norm modules left", _norms_left(result), ""),
        *_limits(result),
        ("fold error", f"{result['fold_max_abs_error']:.1e}", "largest difference of logits, float64"),
        ("proof", "passed" if result["verified"] else "FAILED", "unnorm verify"),
        *([("training", f"{result['tokens']:,}", _training(result))] if result["tokens"] else []),
        *_refused_steps(result),
        ("time", f"{result['seconds']:.0f} s", f"peak memory {result['peak_memory_mb']:,.0f} MB"),
    ]
    return rows


def _training(result: dict[str, Any]) -> str:
    tokens, text = result["tokens"], result.get("text_tokens") or math.inf
    over = f", {tokens / text:.1f} times over the text" if tokens > 1.05 * text else ""
    return f"tokens, {result['tokens_per_second']:,.0f} a second{over}"


def _refused_steps(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    refused = result["skipped_steps"]
    return [("steps refused", f"{refused:,}", "gradients not finite, or 100 times the usual")] if refused else []


def _limits(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    count, share = result.get("limited_neurons"), result.get("share_at_limit")
    if not count or share is None:
        return []
    return [("neurons with limits", f"{count:,}", f"reached by {100 * share:.2g}% of activations on held-out text")]


def proof_table(checks: Sequence["Check"]) -> RenderableType:
    """The rows of `unnorm verify`."""
    table = Table()
    for heading in ("proof", "", "measured", "limit", "what"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("", "measured", "limit"))
    for check in checks:
        verdict = "[green]passed[/]" if check.passed else "[bold red]FAILED[/]"
        numbers = (f"{number:.1e}" if number else "0" for number in (check.value, check.limit))
        table.add_row(check.name, verdict, *numbers, check.detail)
    return table


def evaluation_tables(results: "Results", out: Path | None = None) -> RenderableType:
    """What `unnorm evaluate` gives: losses, fidelity, benchmarks, and how they were measured."""
    results = results.with_short_names()
    rows = results.rows
    parts: list[RenderableType] = [_loss_table(rows), _fidelity_table(rows)] if rows else []
    if not results.protocol.get("original"):
        parts.append(
            Text("Nothing to compare with: name the original with --against for KL, agreement and differences.")
        )
    parts += [Text(_overflow_line(row)) for row in rows if row.overflowed_blocks]
    parts += [_score_table(results.scores)] if results.scores else []
    parts += [Text(line, style="dim") for line in _protocol_lines(results.protocol)]
    parts += [_whole(f"page  {out / 'evaluation.html'}")] if out is not None else []
    return Group(*parts)


def _loss_table(rows: Sequence["Evaluation"]) -> Table:
    numbers = ("loss", "Δ original", "perplexity", "bits/byte")
    table = _side_by_side("Loss in nats per token, 95% intervals", "data", numbers=numbers)
    for row in rows:
        table.add_row(
            escape(row.model),
            escape(row.data),
            _with_interval(f"{row.loss:.4f}", row.loss_ci, ".3f"),
            _with_interval(_or_dash(row.difference, "+.4f"), row.difference_ci, "+.4f"),
            f"{row.perplexity:.2f}",
            _or_dash(row.bits_per_byte, ".4f"),
        )
    return table


def _increase(result: dict[str, Any]) -> str:
    """The loss less the original's on the same tokens, with its interval."""
    increase = f"{result['lnfree_loss'] - result['teacher_loss']:+.4f}"
    ends = result["loss_increase_ci"]
    return f"{increase}, 95% interval {ends[0]:+.4f} to {ends[1]:+.4f}" if ends else increase


def _loss_or_overflow(loss: float | None) -> str:
    return f"{loss:.4f}" if loss is not None and math.isfinite(loss) else "overflows"


def _elsewhere(value: float | None) -> str:
    """What a mean is over the blocks that do not overflow; nothing where all do, or none."""
    return "" if value is None else f"{value:.4f} in the blocks that do not overflow"


def _overflow_line(row: "Evaluation") -> str:
    line = f"{row.model} overflows in {row.overflowed_blocks:,} of {row.blocks:,} blocks of {row.data}"
    if row.loss_elsewhere is None:
        return line
    return f"{line}; in the others loss {row.loss_elsewhere:.4f}, KL {_or_dash(row.kl_elsewhere, '.4f')}"


def _fidelity_table(rows: Sequence["Evaluation"]) -> Table:
    numbers = ("KL", "JSD", "top-1", "top-5", "entropy", "ECE")
    table = _side_by_side("Distance to the original, entropy (Δ original), calibration", "data", numbers=numbers)
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


def _score_table(scores: Sequence["Score"]) -> Table:
    numbers = ("value", "Δ original")
    table = _side_by_side("Benchmarks through lm-eval, 95% intervals", "benchmark", "metric", numbers=numbers)
    for score in scores:
        interval = "" if score.ci is None else f"\n{_number(score.ci[0])} to {_number(score.ci[1])}"
        table.add_row(
            escape(score.model),
            escape(score.task),
            score.metric,
            _number(score.value) + interval,
            _with_interval(_or_dash(score.difference, "+.4g"), score.difference_ci, "+.4f"),
        )
    return table


def _side_by_side(title: str, *words: str, numbers: Sequence[str]) -> Table:
    """A table of models whose words may wrap and whose numbers never do."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("model", *words):
        table.add_column(heading, overflow="fold", min_width=None if heading == "data" else LEAST_NAME)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _with_interval(value: str, interval: tuple[float, float] | None, form: str) -> str:
    return value if interval is None else f"{value}\n{interval[0]:{form}} to {interval[1]:{form}}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < _MOST_FIXED else f"{value:.3g}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _protocol_lines(protocol: dict[str, Any]) -> list[str]:
    from unnorm.report.sentences import intervals_over  # With torch, which `--help` does not wait for.

    lines = [
        f"{row['corpus']}: {row['blocks']:,} blocks of {row['context']} tokens, stride {row['stride']}, evenly out of "
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
    return [*lines, f"intervals: {protocol['interval']}; {protocol['dtype']} on {protocol['device']}"]


def _norms_left(result: dict[str, Any]) -> str:
    left = result["norm_modules_left"]
    return f"{left} of {result['sites'] + left}"


def audit_tables(result: dict[str, Any]) -> RenderableType:
    """What `unnorm audit` gives: verdicts with loss, residual norms, and the worst input of each class."""
    reference = escape(result["reference"])
    failed = sum(not row["passed"] for row in result["classes"])
    total = len(result["classes"])
    verdict = f"[bold red]{failed} of {total} classes FAILED[/]" if failed else f"[green]all {total} classes passed[/]"
    return Group(
        _audit_losses(result["classes"]),
        _audit_norms(result["classes"]),
        _audit_worst(result["classes"]),
        Text.from_markup(f"{verdict}; in brackets the reference, {reference}"),
    )


def _audit_table(title: str, *left: str, right: Sequence[str], last: str | None = None) -> Table:
    """A table of input classes, in which nothing is cut where the terminal is narrow."""
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
        shown = "[green]passed[/]" if row["passed"] else "[bold red]FAILED[/]"
        table.add_row(row["name"], shown, f"{row['tokens']:,}", *_pairs(row, "loss", ".2f"), row["reason"])
    return table


def _audit_norms(rows: Sequence[dict[str, Any]]) -> Table:
    table = _audit_table("Norm of the residual that the unembedding reads", right=_AUDITED, last="NaN or infinite in")
    for row in rows:
        overflowed = [
            ", ".join(name for name, finite in row[key].items() if not finite) for key in ("finite", "reference_finite")
        ]
        bad = f"{overflowed[0] or 'none'} ({overflowed[1] or 'none'})" if any(overflowed) else "none"
        table.add_row(row["name"], *_pairs(row, "residual_norm", ".1f"), bad)
    return table


def _audit_worst(rows: Sequence[dict[str, Any]]) -> Table:
    table = _audit_table("Where the loss exceeds the reference's most", "text", "next", right=("loss",))
    for row in rows:
        for worst in row["worst"][:1]:
            loss = f"{_shown(worst['loss'], '.2f')} ({_shown(worst['reference_loss'], '.2f')})"
            table.add_row(row["name"], Text(_printable(worst["text"])), Text(_printable(worst["next"])), loss)
    return table


_AUDITED = ("99.9%", "99.99%", "largest")


def _pairs(row: dict[str, Any], key: str, form: str) -> list[str]:
    ours, theirs = row[key], row[f"reference_{key}"]
    return [f"{_shown(ours[name], form)} ({_shown(theirs[name], form)})" for name in ours]


def _shown(value: float | None, form: str) -> str:
    return "inf" if value is None else format(value, form if value < _MOST_FIXED else ".1e")


def _printable(text: str) -> str:
    """Text on one line; what a terminal can't show, or obeys, is escaped. The end, which is read last, is kept."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if shown.isspace():
        shown = shown.replace(" ", "␣")
    return shown if len(shown) <= _MOST_SHOWN else "…" + shown[-_MOST_SHOWN:]


_MOST_SHOWN = 60
_MOST_FIXED = 10_000


def sites_table(rows: Sequence[tuple["NormSite", "ScaleStatistics"]]) -> RenderableType:
    """The rows of `unnorm stats`, with paths less the prefix that all norms share, so that they fit 80 columns."""
    caption = (
        "scale: what a token is divided by; spread: std of log scale, larger is harder\n"
        "position 0 at 10 times the mean or more: a massive activation, harder still"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    for heading in ("norm site", "kind", "folds into"):
        table.add_column(heading, overflow="fold")
    for heading in ("position 0", "mean", "spread", "smallest", "largest"):
        table.add_column(heading, justify="right", no_wrap=True)
    prefix = site_prefix([site.name for site, _ in rows])
    for site, row in rows:
        numbers = (row.position_0, row.mean, row.spread, row.smallest, row.largest)
        into = site.folded_into or ("no weight: --in-place",)
        names = [name.removeprefix(prefix) for name in (site.name, *into)]
        table.add_row(names[0], site.kind, ", ".join(names[1:]), *(f"{number:.3g}" for number in numbers))
    return table


def site_prefix(names: Sequence[str]) -> str:
    """The dotted prefix, such as `transformer.`, that all paths share; none for a single path."""
    shared = os.path.commonprefix(list(names)) if len(names) > 1 else ""  # noqa: RUF071 (cut at a dot below)
    return shared[: shared.rfind(".") + 1]


def export_table(exported: "Exported") -> RenderableType:
    """The summary of `unnorm export`."""
    table = Table(
        "precision",
        title=f"{exported.form} form against the folded model in float32",
        title_justify="left",
    )
    for heading in ("largest difference of logits", "of the largest logit", "KL, nats per token"):
        table.add_column(heading, justify="right")
    for row in exported.errors:
        table.add_row(row.name, *(f"{number:.1e}" if number else "0" for number in (row.max_abs, row.relative, row.kl)))
    return Group(table, _whole(f"model  {exported.path}\nload   {exported.load}"), Text(f"note   {exported.note}"))


def analysis_table(result: dict[str, Any]) -> RenderableType:
    """The summary of `unnorm analyze`."""
    table = Table("analysis", "what", title=escape(f"{result['directory']} beside {result['original']}"))
    table.title_justify = "left"
    for heading in ("original", "twin"):
        table.add_column(heading, justify="right")
    for key, name, what, form in _ANALYZED:
        numbers = result["findings"].get(name)
        if numbers is not None:
            values = (_at(numbers, key.format(model)) for model in ("original", "twin"))
            table.add_row(name, what, *("-" if value is None else format(value, form) for value in values))
    skipped = [Text(f"{name} left out: {reason}") for name, reason in result["skipped"].items()]
    return Group(table, *skipped, _whole(f"page     {result['page']}\nnumbers  {result['numbers']}"))


_ANALYZED = (
    ("{}.error", "attribution", "attribution error over direct effect", ".2%"),
    ("{}.error_of_heads", "attribution", "the same, heads alone", ".2%"),
    ("{}.sum_error", "attribution", "max |sum of contributions - logit|", ".1e"),
    ("{}.correlation", "patching", "correlation of attribution and activation patching", ".4f"),
    ("{}.error", "patching", "error over mean absolute effect", ".1%"),
    ("{}.right_answers", "patching", "right answers", ".0%"),
    ("{}.mean_sink_rate", "sinks", "sink rate, mean over heads", ".1%"),
    ("{}.mean_share", "sinks", "attention on position 0, mean over heads", ".1%"),
    ("{}.longest_over_median", "sinks", "longest residual vector over median", ".2f"),
    ("{}.entropy_neurons.mean_abs_entropy", "neurons", "entropy neurons ablated: entropy, nats", ".2e"),
    ("{}.entropy_neurons.mean_abs_entropy_through_norm", "neurons", "the part of it through the final norm", ".2e"),
    ("{}.entropy_neurons.mean_loss", "neurons", "entropy neurons ablated: loss, nats", "+.2e"),
    ("{}.random_neurons.mean_abs_entropy", "neurons", "random neurons ablated: entropy, nats", ".2e"),
    ("{}.random_neurons.mean_abs_entropy_through_norm", "neurons", "the part of it through the final norm", ".2e"),
    ("{}.mean_forms_at", "lens", "mean depth at which predictions form", ".2f"),
    ("mean_spread.{}", "scales", "std of log scale, mean over sites", ".3f"),
    ("mean_change.{}", "geometry", "mean relative weight change", ".1%"),
)


def _at(numbers: dict[str, Any], path: str) -> float | None:
    value: Any = numbers
    for key in path.split("."):
        value = value.get(key)
    return None if value is None else float(value)
