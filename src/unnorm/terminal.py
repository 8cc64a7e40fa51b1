"""What a run looks like in a terminal: live progress, and tables at the end."""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from unnorm.calibrate import ScaleStatistics
    from unnorm.evaluation import Evaluation
    from unnorm.exports.export import Exported
    from unnorm.proof import Check
    from unnorm.sites import NormSite


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
    parts = [f"loss {row['loss']:.3f}"]
    parts += [f"KL {row['kl']:.4f}"] if "kl" in row else []
    parts += [f"removed {row['sites_removed']}/{row['sites']}"] if "sites" in row else []
    parts += [f"alpha {row['alpha']:.2f}"] if 0 < row.get("alpha", 0) < 1 else []
    parts += [f"{row['tokens_per_second']:,.0f} tokens/s"] if row["tokens"] else []
    return "  ".join(parts)


def result_table(result: dict[str, Any]) -> RenderableType:
    """The summary at the end of a run."""
    table = Table(title=escape(f"{result['model']} without norms"), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _result_rows(result):
        table.add_row(*row)
    where = result["directory"]
    paths = Text(f"model   {where}/model\nreport  {where}/report.html\nproof   unnorm verify {where}")
    return Group(table, paths)


def _result_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    low, high = result["lnfree_loss_ci"]
    rows = [
        ("KL to the original", f"{result['kl']:.4f}", "nats per token"),
        ("top-1 agreement", f"{result['top1_agreement']:.1%}", "same most likely next token"),
        ("loss, original", f"{result['teacher_loss']:.4f}", f"{result['validation_tokens']:,} held-out tokens"),
        ("loss, norms removed", f"{result['lnfree_loss']:.4f}", f"95% interval {low:.3f} to {high:.3f}"),
    ]
    if result["control_loss"] is not None:
        rows += [
            ("loss, control", f"{result['control_loss']:.4f}", "norms kept, same tokens"),
            ("gap", f"{result['gap']:+.4f}", "norms removed less control"),
        ]
    rows += [
        ("loss, naive removal", f"{result['naive_loss']:.4f}", "constants without training"),
        ("norm modules left", _norms_left(result), ""),
        ("fold error", f"{result['fold_max_abs_error']:.1e}", "largest difference of logits, float64"),
        ("proof", "passed" if result["verified"] else "FAILED", "unnorm verify"),
        ("training", f"{result['tokens']:,}", f"tokens, {result['tokens_per_second']:,.0f} a second"),
        ("time", f"{result['seconds']:.0f} s", f"peak memory {result['peak_memory_mb']:,.0f} MB"),
    ]
    return rows


def proof_table(checks: Sequence["Check"]) -> RenderableType:
    """The rows of `unnorm verify`."""
    table = Table("proof", "", "measured", "limit", "what", title_justify="left")
    for check in checks:
        verdict = "[green]passed[/]" if check.passed else "[bold red]FAILED[/]"
        numbers = (f"{number:.1e}" if number else "0" for number in (check.value, check.limit))
        table.add_row(check.name, verdict, *numbers, check.detail)
    return table


def evaluation_table(rows: Sequence["Evaluation"]) -> RenderableType:
    """The rows of `unnorm evaluate`."""
    table = Table("model", "data", "loss", "95% interval", "perplexity", "KL", "JSD", "top-1", "tokens")
    for row in rows:
        fidelity = (
            ("-", "-", "-")
            if row.kl is None or row.jsd is None or row.top1_agreement is None
            else (f"{row.kl:.4f}", f"{row.jsd:.4f}", f"{row.top1_agreement:.1%}")
        )
        interval = f"{row.loss_ci[0]:.3f} to {row.loss_ci[1]:.3f}"
        numbers = (f"{row.loss:.4f}", interval, f"{row.perplexity:.3f}", *fidelity, f"{row.tokens:,}")
        table.add_row(escape(row.model), escape(row.data), *numbers)
    return table


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


def _audit_losses(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("inputs", "", title="Loss in nats per token", title_justify="left")
    for heading in ("tokens", *_AUDITED):
        table.add_column(heading, justify="right")
    table.add_column("why")
    for row in rows:
        shown = "[green]passed[/]" if row["passed"] else "[bold red]FAILED[/]"
        table.add_row(row["name"], shown, f"{row['tokens']:,}", *_pairs(row, "loss", ".2f"), row["reason"])
    return table


def _audit_norms(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("inputs", title="Norm of the residual that the unembedding reads", title_justify="left")
    for heading in _AUDITED:
        table.add_column(heading, justify="right")
    table.add_column("NaN or infinite in")
    for row in rows:
        overflowed = [
            ", ".join(name for name, finite in row[key].items() if not finite) for key in ("finite", "reference_finite")
        ]
        bad = f"{overflowed[0] or 'none'} ({overflowed[1] or 'none'})" if any(overflowed) else "none"
        table.add_row(row["name"], *_pairs(row, "residual_norm", ".1f"), bad)
    return table


def _audit_worst(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("inputs", title="Where the loss exceeds the reference's most", title_justify="left")
    table.add_column("text", overflow="fold")
    table.add_column("next")
    table.add_column("loss", justify="right")
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
    return shown if len(shown) <= _MOST_SHOWN else "…" + shown[-_MOST_SHOWN:]


_MOST_SHOWN = 60
_MOST_FIXED = 10_000


def sites_table(rows: Sequence[tuple["NormSite", "ScaleStatistics"]]) -> RenderableType:
    """The rows of `unnorm stats`."""
    table = Table("norm site", "kind", "folds into", caption="scale: divisor of a token; spread: deviation of its log")
    for heading in ("position 0", "mean", "spread", "smallest", "largest"):
        table.add_column(heading, justify="right")
    for site, row in rows:
        numbers = (row.position_0, row.mean, row.spread, row.smallest, row.largest)
        into = {"readers": site.readers, "writer": site.writers, "in place": ("no weight: --in-place",)}[
            site.folds_into
        ]
        table.add_row(site.name, site.kind, ", ".join(into), *(f"{number:.3g}" for number in numbers))
    return table


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
    return Group(table, Text(f"model  {exported.path}\nload   {exported.load}\nnote   {exported.note}"))


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
    return Group(table, *skipped, Text(f"page     {result['page']}\nnumbers  {result['numbers']}"))


_ANALYZED = (
    ("{}.error", "attribution", "error of attribution, of the direct effect", ".2%"),
    ("{}.error_of_heads", "attribution", "the same, heads alone", ".2%"),
    ("{}.sum_error", "attribution", "sum of contributions less the logit, largest", ".1e"),
    ("{}.correlation", "patching", "correlation of attribution with activation patching", ".4f"),
    ("{}.error", "patching", "error, of the mean absolute effect", ".1%"),
    ("{}.right_answers", "patching", "right answers", ".0%"),
    ("{}.mean_sink_rate", "sinks", "sink rate, mean of heads", ".1%"),
    ("{}.mean_share", "sinks", "share of attention on position 0, mean of heads", ".1%"),
    ("{}.longest_over_median", "sinks", "longest residual vector over the median", ".2f"),
    ("{}.entropy_neurons.mean_abs_entropy", "neurons", "entropy neurons ablated: entropy, nats", ".2e"),
    ("{}.entropy_neurons.mean_loss", "neurons", "entropy neurons ablated: loss, nats", "+.2e"),
    ("{}.entropy_neurons.mean_abs_entropy_through_norm", "neurons", "the part of it through the final norm", ".2e"),
    ("{}.random_neurons.mean_abs_entropy", "neurons", "random neurons ablated: entropy, nats", ".2e"),
    ("{}.mean_forms_at", "lens", "depth at which predictions form, mean", ".2f"),
)


def _at(numbers: dict[str, Any], path: str) -> float | None:
    for key in path.split("."):
        numbers = numbers[key]
    return numbers  # type: ignore[return-value]
