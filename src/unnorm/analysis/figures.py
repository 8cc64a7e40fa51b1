"""Figure types shared by the analyses: the original in soft grey, the twin in the accent colour."""

from collections.abc import Mapping, Sequence

from plotly.graph_objects import Figure

from unnorm.report.drawing import (
    ACCENT,
    INK,
    PAPER,
    SOFT,
    draw_ranges,
    finish,
    log_axis,
    name_panel,
    panels,
    position_axis,
    thinned_ticks,
)
from unnorm.report.numbers import finite_or_none

COLOURS = {"original": SOFT, "twin": ACCENT}
WRITTEN_CELLS = 120
"""Heat maps with at most this many cells show the number in each cell."""

Grid = Sequence[Sequence[float | None]]


def heat_map(grid: Grid, columns: Sequence[str], rows: Sequence[str], form: str, what: str) -> Figure:
    """One value per layer (from the top down) and head, with the numbers in the cells where there is room."""
    return heat_maps({"": grid}, columns, rows, form, what)


def heat_maps(grids: Mapping[str, Grid], columns: Sequence[str], rows: Sequence[str], form: str, what: str) -> Figure:
    """Several heat maps, one below the other, on a common colour scale."""
    height = len(grids) * (70 + 26 * min(len(rows), 18)) + 50
    figure = panels([1 / len(grids)] * len(grids), 44 / height)  # Room for a panel's name.
    values = [v for grid in grids.values() for row in grid for v in row if v is not None]
    written = len(columns) * len(rows) <= WRITTEN_CELLS
    for panel, (name, grid) in enumerate(grids.items(), start=1):
        figure.add_heatmap(
            z=grid,
            customdata=[[f"{row}, {column}" for column in columns] for row in rows],
            zmin=0,
            zmax=2.0 * max([1e-9, *values]),  # Keeps numbers readable on the darkest cell.
            colorscale=[[0, PAPER], [1, ACCENT]],
            showscale=False,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            hovertemplate=f"%{{customdata}}: {what} %{{z:{form}}}<extra>{name}</extra>",
            **({"texttemplate": f"%{{z:{form}}}", "textfont": {"color": INK, "size": 11}} if written else {}),
            row=panel,
            col=1,
        )
        if name:
            name_panel(figure, panel, name)
    finish(figure, height, "")
    figure.update_yaxes(autorange="reversed", showgrid=False, **thinned_ticks(rows))
    figure.update_xaxes(showline=False, ticks="", tickangle=0 if len(columns) <= 8 else -90, **thinned_ticks(columns))
    figure.update_layout(hovermode="closest")
    return figure


def dot_rows(
    names: Sequence[str], values: Mapping[str, Sequence[float | None]], title: str, log: bool = False
) -> Figure:
    """One dot for each name (along the x axis) and model."""
    figure = panels([1.0])
    places = list(range(len(names)))
    for model, column in values.items():
        # Zero can't be shown on a log axis.
        shown = [v if not log or (finite_or_none(v) or 0) > 0 else None for v in column]
        shift = -0.12 if model == "original" else 0.12  # Side by side, as one would hide the other.
        figure.add_scatter(
            x=[place + shift for place in places],
            y=shown,
            mode="markers",
            marker={"color": COLOURS[model], "size": 8 if len(names) <= 80 else 5},
            text=list(names),
            hovertemplate=f"%{{text}}, {model}: %{{y:.4g}}<extra></extra>",
            cliponaxis=False,
        )
    _name_places(figure, names)
    if log:
        log_axis(figure, 1, [v for column in values.values() for v in column if v is not None])
    else:
        figure.update_yaxes(rangemode="tozero")
    name_panel(figure, 1, title)
    figure.update_layout(hovermode="closest")
    return finish(figure, 380, "")


def range_rows(
    names: Sequence[str], ranges: Mapping[str, Sequence[Sequence[float | None]]], title: str, at: float | None = None
) -> Figure:
    """A bar from low to high with a dot for the median and an optional diamond, by name and model, on a log axis.

    Args:
        names: labels along the x axis.
        ranges: by model: low, median, high and diamond (or None) for each name.
        title: title of the y axis.
        at: where to draw a horizontal line.
    """
    figure = panels([1.0])
    if at is not None:
        figure.add_hline(y=at, line={"color": INK, "width": 1.2}, layer="below")
    places = {name: float(place) for place, name in enumerate(names)}
    for model, rows in ranges.items():
        draw_ranges(figure, model, dict(zip(names, rows, strict=True)), places, "median")
    _name_places(figure, names)
    log_axis(figure, 1, [v for rows in ranges.values() for row in rows for v in row if v is not None])
    name_panel(figure, 1, title)
    figure.update_layout(hovermode="closest")
    return finish(figure, 440, "")


def scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[str]]],
    x_title: str,
    y_title: str,
    *,
    diagonal: bool = False,
    log_y: bool = False,
    marked: dict[str, list[int]] | None = None,
) -> Figure:
    """Named points by model, optionally with some drawn larger (`marked`) and with the line y = x (`diagonal`)."""
    figure = panels([1.0])
    if diagonal:
        ends = [v for x, y, _ in points.values() for v in (*x, *y)]
        low, high = min(ends, default=0.0), max(ends, default=1.0)
        line = {"color": INK, "width": 1.2}
        figure.add_scatter(x=[low, high], y=[low, high], mode="lines", line=line, hoverinfo="skip")
    value = y_title.removesuffix(" (log)")
    for model, (x, y, names) in points.items():
        many = len(x) > 200
        chosen = (marked or {}).get(model, [])
        sizes = [(5 if many else 9) * (2 if place in chosen else 1) for place in range(len(x))]
        figure.add_scatter(
            x=list(x),
            y=list(y),
            mode="markers",
            marker={"color": COLOURS[model], "size": sizes, "opacity": 0.6, "line": {"width": 0}},
            text=list(names),
            hovertemplate=f"%{{text}}, {model}<br>{x_title} %{{x:.4g}}<br>{value} %{{y:.4g}}<extra></extra>",
        )
    if log_y:
        log_axis(figure, 1, [v for _, y, _ in points.values() for v in y])
    name_panel(figure, 1, y_title)
    figure.update_layout(hovermode="closest")
    return finish(figure, 440, x_title)


def bundle(
    lines: Sequence[tuple[str, str, float, Sequence[float]]],
    x_title: str,
    y_title: str,
    *,
    places: Sequence[Sequence[float]] | None = None,
) -> Figure:
    """Many lines, on log axes.

    Args:
        lines: model, name, weight from 0 (thin) to 1 (thick), and values.
        x_title: title of the x axis.
        y_title: title of the y axis.
        places: x coordinates of each line's values; by default 1, 2, 3, …
    """
    figure = panels([1.0])
    at = places or [[float(i + 1) for i in range(len(values))] for *_, values in lines]
    for (model, name, weight, values), x in zip(lines, at, strict=True):
        figure.add_scatter(
            x=list(x),
            y=[v if v > 0 else None for v in values],
            mode="lines",
            # The original's lines are wider, so that they stay visible under the twin's where the two coincide.
            line={"color": COLOURS[model], "width": (0.8 + 2 * weight) * (2.5 if model == "original" else 1)},
            opacity=0.5 + 0.5 * weight,
            name=name,
            hovertemplate=f"{name}: %{{y:.4g}} at %{{x}}<extra></extra>",
        )
    longest = max((max(x) for x in at), default=1.0)
    position_axis(figure, int(longest))
    log_axis(figure, 1, [v for *_, values in lines for v in values])
    name_panel(figure, 1, y_title)
    figure.update_layout(hovermode="closest")
    return finish(figure, 440, x_title)


def line_panels(names: Sequence[str], by_panel: Mapping[str, Mapping[str, Sequence[float]]], x_title: str) -> Figure:
    """Panels one below the other, each with one line per model over the same named x positions."""
    figure = panels([1 / len(by_panel)] * len(by_panel))
    for panel, (title, lines) in enumerate(by_panel.items(), start=1):
        for model, values in lines.items():
            figure.add_scatter(
                x=list(range(len(names))),
                y=list(values),
                mode="lines+markers",
                line={"color": COLOURS[model], "width": 1.8},
                marker={"color": COLOURS[model], "size": 6},
                hovertemplate=f"{model}: %{{y:.4g}}",
                name=model,
                row=panel,
                col=1,
            )
        name_panel(figure, panel, title)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(**thinned_ticks(names))
    return finish(figure, 200 * len(by_panel) + 60, x_title)


def _name_places(figure: Figure, names: Sequence[str]) -> None:
    longest = max((len(name) for name in names), default=0)
    figure.update_xaxes(
        tickangle=-90 if len(names) * longest > 40 else 0, range=[-0.7, len(names) - 0.3], **thinned_ticks(names)
    )
