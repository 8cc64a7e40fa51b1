"""Shared building blocks of all figures: colours, panels, axes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from unnorm.report.numbers import finite_or_none
from unnorm.report.sentences import shared_prefix

# Light colour -> dark colour. The page replaces these exact strings, so figures use no others.
ACCENT, INK, SOFT, RULE, PAPER = "#0a6c74", "#24292e", "#6f777e", "#dfe2e4", "#fdfdfc"
RUST, PLUM, OLIVE = "#a8481f", "#7a3e9d", "#7c7a12"
DARK_COLOURS = {
    ACCENT: "#54bfc4",
    INK: "#e4e6e8",
    SOFT: "#979fa6",
    RULE: "#33383d",
    PAPER: "#16191c",
    RUST: "#f0a070",
    PLUM: "#c9a0e6",
    OLIVE: "#c8c35a",
}

MOST_TICKS = 24
LEAST_TICKS = 3
"""Of a log axis: with fewer, no value can be read from it."""
MOST_POSITION_BINS = 48


def short_names(names: Sequence[str]) -> list[str]:
    """Site names without the dotted prefix that all of them share."""
    prefix = shared_prefix(names)
    return [name.removeprefix(prefix) for name in names]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: 1, 2 and 5 of each decade, powers of ten over many, all digits over few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few, fine = ((1, 2, 5), range(1, 10)) if len(decades) <= 4 else ((1,), (1, 2, 5))
    for digits in (few, fine):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        if sum(low <= tick <= high for tick in ticks) >= LEAST_TICKS:
            return ticks
    return [float(f"{value:.2g}") for value in (low, math.sqrt(low * high), high)]


def draw_line(
    figure: Figure, panel: int, x: Iterable[float], y: list[float], name: str, colour: str, dash: str
) -> None:
    """Add a line to a panel."""
    line = {"color": colour, "width": 1.8, "dash": dash}
    figure.add_scatter(x=list(x), y=y, name=name, mode="lines", line=line, hovertemplate="%{y:.4f}", row=panel, col=1)


def draw_ranges(
    figure: Figure,
    model: str,
    ranges: Mapping[str, Sequence[float | None]],
    places: Mapping[str, float],
    middle: str,
) -> None:
    """Add a bar from low to high for each name, with a dot in between and an optional diamond for position 0.

    Args:
        figure: one panel.
        model: `original` or `twin`, which stand side by side.
        ranges: low, middle, high and position 0 (or None) of each name.
        places: x coordinate of each name.
        middle: what the dot shows (`mean` or `median`).
    """
    colour, shift = {"original": (SOFT, -0.17), "twin": (ACCENT, 0.17)}[model]
    x = [places[name] + shift for name in ranges]
    crowded = len(places) > 16
    # One line with gaps for all ranges: a separate trace for each would be slow with a hundred of them.
    figure.add_scatter(
        x=[value for place in x for value in (place, place, None)],
        y=[value for row in ranges.values() for value in (row[0], row[2], None)],
        mode="lines",
        line={"color": colour, "width": 3 if crowded else 7},
        opacity=0.35,
        hoverinfo="skip",
    )
    texts = [f"{name}<br>{model}: {row[0]:.3g} to {row[2]:.3g}" for name, row in ranges.items()]
    for column, symbol, what in ((1, "circle", middle), (3, "diamond-open", "position 0")):
        size = (4 if crowded else 8) + (column == 3)
        figure.add_scatter(
            x=x,
            y=[row[column] for row in ranges.values()],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": size, "line": {"color": colour, "width": 1.6}},
            text=texts,
            hovertemplate=f"%{{text}}<br>{what} %{{y:.4g}}<extra></extra>",
        )


def thinned_ticks(names: Sequence[str]) -> dict[str, Any]:
    """At most `MOST_TICKS` ticks at integer positions, labelled with the names there."""
    shown = list(range(0, len(names), math.ceil(max(1, len(names)) / MOST_TICKS)))
    return {"tickmode": "array", "tickvals": shown, "ticktext": [names[place] for place in shown]}


def panels(heights: list[float], spacing: float | None = None) -> Figure:
    """Panels one below the other on a shared x axis; heights and the spacing between them are shares of 1."""
    spacing = spacing or 0.2 / (1 + len(heights))
    figure = make_subplots(rows=len(heights), cols=1, shared_xaxes=True, row_heights=heights, vertical_spacing=spacing)
    figure.update_layout(hovermode="x")
    return figure


def name_panel(figure: Figure, panel: int, title: str) -> None:
    """A title over a panel."""
    # Above the panel, not rotated along the axis: easier to read, and it saves width on phones.
    axis = "" if panel == 1 else str(panel)
    figure.add_annotation(
        text=title,
        x=0,
        y=1,
        xref="paper",
        yref=f"y{axis} domain",
        xanchor="left",
        yanchor="bottom",
        yshift=5,
        showarrow=False,
        font={"color": INK, "size": 13},
    )


def log_axis(figure: Figure, panel: int, values: Iterable[float]) -> None:
    """Make a panel's y axis logarithmic, with round ticks covering the values."""
    positive = [v for v in values if finite_or_none(v) is not None and v > 0]
    if not positive:
        return
    low, high = min(positive) / 1.15, max(positive) * 1.15
    ticks = log_ticks(low, high)
    axis = figure.layout["yaxis" if panel == 1 else f"yaxis{panel}"]
    axis.update(
        type="log",
        range=[math.log10(low), math.log10(high)],
        tickmode="array",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )


def position_axis(figure: Figure, longest: int) -> None:
    """Make the axis of positions logarithmic, with ticks at powers of two (of four if longer than 256)."""
    ticks = [2**i for i in range(0, longest.bit_length(), 1 if longest <= 256 else 2)]
    figure.update_xaxes(type="log", tickmode="array", tickvals=ticks, ticktext=[str(tick) for tick in ticks])


def bin_positions(losses: Sequence[float], most: int = MOST_POSITION_BINS) -> tuple[list[float], list[float]]:
    """Mean position and mean loss of bins with geometrically spaced edges; short contexts keep every position.

    Entry i of `losses` belongs to position i + 1, since position 0 is not predicted.
    """
    n = len(losses)
    edges = range(n + 1) if n <= most else sorted({round((n + 1) ** (i / most)) - 1 for i in range(most + 1)})
    bins = [(start, losses[start:end]) for start, end in pairwise(edges)]
    return [start + (len(part) + 1) / 2 for start, part in bins], [sum(part) / len(part) for _, part in bins]


def finish(figure: Figure, height: int, x_title: str) -> Figure:
    """Apply the look that all figures share. The page draws the legend itself, so that it wraps like text."""
    # Nothing from plotly's own template is needed, and leaving it out makes the page smaller.
    figure.update_layout(
        template="none",
        height=height,
        showlegend=False,
        margin={"l": 48, "r": 20, "t": 28, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor=PAPER,  # plotly derives the background of hover labels from it.
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": SOFT},
        hoverlabel={"font": {"size": 12}},
        dragmode=False,
    )
    figure.update_xaxes(
        showgrid=False,
        zeroline=False,
        linecolor=RULE,
        showline=True,
        tickcolor=RULE,
        ticks="outside",
        ticklabeloverflow="allow",
        automargin=True,
    )
    figure.update_yaxes(gridcolor=RULE, zeroline=False, automargin=True)
    last = max((axis for axis in figure.layout if axis.startswith("xaxis")), key=lambda axis: int(axis[5:] or 1))
    figure.layout[last].title = {"text": x_title, "standoff": 8}
    return figure
