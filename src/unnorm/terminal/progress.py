"""Live progress on a terminal; quiet and plain elsewhere."""

import os
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

_DAY = 24 * 3600.0


class Progress:
    """Shows the progress of a run: a live line on a terminal, occasional plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: RichProgress | None = None
        self.task: Any = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and os.environ.get("RANK", "0") == "0":  # Other processes would erase its line.
            self.live = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(min_width=7, no_wrap=True)),
                console=self.console,
                transient=True,
                speed_estimate_period=_DAY,  # A long run reports its tokens only every few minutes.
            )
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, row: dict[str, Any], /) -> None:
        """Show one row of metrics, or the start of a phase."""
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
