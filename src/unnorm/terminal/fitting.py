"""A table that becomes a list where the terminal is too narrow for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A column of a `FittingTable`.

    Attributes:
        heading: its heading; may be empty.
        least: width in characters down to which its cells may wrap; by default they never wrap.
        right: whether its cells are aligned to the right.
    """

    heading: str
    least: int | None = None
    right: bool = False


@dataclass
class FittingTable:
    """A table whose numbers are never broken; in a narrow terminal, each row is a few lines instead.

    Attributes:
        columns: its columns; the first ones, up to `names`, name the row.
        names: how many columns name the row.
        title: stands above it.
        style: further arguments of rich's `Table`.
        rows: cells in rich markup.
    """

    columns: tuple[Column, ...]
    names: int = 1
    title: str | None = None
    style: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Add a row, in the order of the columns."""
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """As rich asks for it: the table if it fits, otherwise the list."""
        table = self._table()
        frame = table._extra_width + sum(table.padding[1::2]) * len(self.columns)
        if sum(map(self._least_width, range(len(self.columns)))) + frame <= options.max_width:
            yield table
        else:
            yield from self._lines()

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left", **self.style)
        for column in self.columns:
            table.add_column(
                column.heading,
                justify="right" if column.right else "left",
                overflow="fold",
                no_wrap=column.least is None,
                min_width=column.least,
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def _least_width(self, index: int) -> int:
        column = self.columns[index]
        cells = [column.heading, *(Text.from_markup(row[index]).plain for row in self.rows)]
        widest = max(cell_len(line) for cell in cells for line in cell.splitlines() or [""])
        return widest if column.least is None else min(widest, column.least)

    def _lines(self) -> Iterator[Text]:
        if self.title is not None:
            yield Text.from_markup(self.title, style="italic")
        for row in self.rows:
            yield Text.from_markup(", ".join(row[: self.names]), style="bold")
            for column, cell in zip(self.columns[self.names :], row[self.names :], strict=True):
                yield Text.from_markup(
                    f"  {column.heading}  {cell.replace(chr(10), ', ')}" if column.heading else f"  {cell}"
                )
        yield Text()
