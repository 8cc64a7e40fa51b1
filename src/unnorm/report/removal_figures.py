"""The report's figures, in the page's light colours; the page's script replaces these in dark mode."""

from collections.abc import Sequence
from typing import Any

from plotly.graph_objects import Figure

from unnorm.calibration.scales import ScaleStatistics
from unnorm.evaluation.comparison import LEAST_KL
from unnorm.report.drawing import (
    ACCENT,
    INK,
    SOFT,
    bin_positions,
    draw_line,
    draw_ranges,
    finish,
    log_axis,
    name_panel,
    panels,
    position_axis,
    short_names,
    thinned_ticks,
)
from unnorm.report.numbers import finite_or_none

LABELS = {"original": "original", "lnfree": "twin", "control": "control"}

Rows = Sequence[dict[str, Any]]


def run_figure(rows: Rows, control_rows: Rows) -> Figure | None:
    """Loss, KL (log) and alpha over the tokens of a run, one panel each; None if there was no run.

    Args:
        rows: metrics of the removal run.
        control_rows: metrics of the control; may be empty.
    """
    # A single row at 0 tokens, before the first step, does not make a run.
    keys = [key for key in ("loss", "kl", "alpha") if any(_points(rows, key)[0])]
    if "loss" not in keys:
        return None
    heights = {"loss": 0.4, "kl": 0.4, "alpha": 0.2}
    figure = panels([heights[key] for key in keys])
    for panel, key in enumerate(keys, start=1):
        if key == "alpha":
            _draw_alpha(figure, panel, rows)
        else:
            _draw_metric(figure, panel, key, rows, control_rows)
    _draw_original(figure, rows)
    stretch = removal_stretch(rows)
    if stretch is not None:
        figure.add_vrect(x0=stretch[0], x1=stretch[1], fillcolor=SOFT, opacity=0.12, line_width=0, layer="below")
    titles = {"loss": "loss, nats per token", "kl": "KL to the original, nats per token (log)", "alpha": "alpha"}
    for panel, key in enumerate(keys, start=1):
        name_panel(figure, panel, titles[key])
    return finish(figure, 560 if len(keys) == 3 else 200 * len(keys) + 60, "training tokens")


def removal_stretch(rows: Rows) -> tuple[float, float] | None:
    """Token counts between which alpha rose from 0 to 1, according to the rows; None if it did not."""
    tokens, alpha = _points(rows, "alpha")
    moved = [i for i, a in enumerate(alpha) if a > 0]
    if not moved:
        return None
    start = tokens[max(0, moved[0] - 1)]
    end = next((t for t, a in zip(tokens, alpha, strict=True) if a >= 1), tokens[-1])
    return (start, end) if end > start else None


def scale_figure(
    before: Sequence[ScaleStatistics], after: Sequence[ScaleStatistics], constants: dict[str, float]
) -> Figure | None:
    """Scale of each norm site before and after the removal, with its constant, on a log axis; None without sites."""
    if not before and not after:
        return None
    names = list(dict.fromkeys(row.site for row in (*before, *after)))
    index = {name: i for i, name in enumerate(names)}
    placed = [(index[site], value) for site, value in constants.items() if site in index and finite_or_none(value)]
    figure = Figure()
    _draw_constants(figure, placed, names)
    for rows, name in ((before, "original"), (after, "twin")):
        ranges = {row.site: (row.smallest, row.mean, row.largest, row.position_0) for row in rows}
        draw_ranges(figure, name, ranges, index, "mean")
    angle = -90 if len(names) > 10 else -45
    figure.update_xaxes(tickangle=angle, range=[-0.7, len(names) - 0.3], **thinned_ticks(short_names(names)))
    values = [v for r in (*before, *after) for v in (r.position_0, r.smallest, r.largest)]
    log_axis(figure, 1, [*values, *(value for _, value in placed)])
    name_panel(figure, 1, "scale (log)")
    return finish(figure, 440, "")


def position_figure(position_loss: dict[str, list[float]]) -> Figure | None:
    """Loss by position in the context, and the twin's loss minus the original's; None without positions."""
    binned = {name: bin_positions(losses) for name, losses in position_loss.items() if losses}
    if not binned:
        return None
    both = len(position_loss.get("original", [])) == len(position_loss.get("lnfree", [])) > 0
    figure = panels([0.64, 0.36] if both else [1.0])
    for name, colour, dash in (("control", SOFT, "dash"), ("original", INK, "solid"), ("lnfree", ACCENT, "solid")):
        if name in binned:
            draw_line(figure, 1, *binned[name], LABELS[name], colour, dash)
    name_panel(figure, 1, "loss, nats per token")
    if both:
        (x, original), (_, lnfree) = binned["original"], binned["lnfree"]
        draw_line(figure, 2, x, [b - a for a, b in zip(original, lnfree, strict=True)], "difference", ACCENT, "solid")
        figure.add_hline(y=0, row=2, col=1, line={"color": INK, "width": 1.2}, layer="below")
        name_panel(figure, 2, "twin minus original")
    longest = max(len(losses) for losses in position_loss.values())
    position_axis(figure, longest)
    return finish(figure, 440, "position of the predicted token (log)")


def _points(rows: Rows, key: str, kind: str | None = None) -> tuple[list[float], list[float]]:
    """Tokens and values of the rows that have both, sorted by tokens."""
    kept = [row for row in rows if kind is None or row.get("kind") == kind]
    pairs = [(finite_or_none(row.get("tokens")), finite_or_none(row.get(key))) for row in kept]
    points = sorted((t, v) for t, v in pairs if t is not None and v is not None)
    return [t for t, _ in points], [v for _, v in points]


def _draw_metric(figure: Figure, panel: int, key: str, rows: Rows, control_rows: Rows) -> None:
    drawn: list[float] = []
    parts = (
        (rows, "train", "twin, training", ACCENT, {"width": 1}, 0.45),
        (control_rows, "validation", "control", SOFT, {"width": 1.5, "dash": "dash"}, 1.0),
        (rows, "validation", "twin, validation", ACCENT, {"width": 2}, 1.0),
    )
    for source, kind, name, colour, line, opacity in parts:
        if key == "kl":  # Before the first step it is rounding, which would stretch the log axis.
            source = [row for row in source if row.get("tokens")]
        tokens, values = _points(source, key, kind)
        # The KL is zero while the model is still the original, which a log axis can't show.
        points = [(t, v) for t, v in zip(tokens, values, strict=True) if key != "kl" or v > LEAST_KL]
        drawn += [v for _, v in points]
        figure.add_scatter(
            x=[t for t, _ in points],
            y=[v for _, v in points],
            name=name,
            mode="lines+markers" if kind == "validation" else "lines",
            line={"color": colour, **line},
            marker={"color": colour, "size": 5},
            opacity=opacity,
            hovertemplate="%{y:.4g}",
            row=panel,
            col=1,
        )
    if key == "kl" and drawn:
        log_axis(figure, panel, drawn)


def _draw_original(figure: Figure, rows: Rows) -> None:
    """The original's loss on the blocks of the quick evaluations, which change where a twin is healed on other text."""
    tokens, losses = _points(rows, "teacher_loss")
    line = {"color": INK, "width": 1.2}
    if len(set(losses)) == 1:
        figure.add_hline(y=losses[0], row=1, col=1, line=line, layer="below")
    elif losses:
        line |= {"shape": "hv"}
        figure.add_scatter(
            x=tokens, y=losses, name="original", mode="lines", line=line, hovertemplate="%{y:.4g}", row=1, col=1
        )


def _draw_alpha(figure: Figure, panel: int, rows: Rows) -> None:
    shares = [{**row, "share": _share(row)} for row in rows]
    parts = (
        (rows, "alpha", "mean alpha", ACCENT, {"width": 1.5}, "%{y:.2f}"),
        (shares, "share", "sites removed", INK, {"width": 1.2, "dash": "dot", "shape": "hv"}, "%{y:.0%}"),
    )
    for source, key, name, colour, line, hover in parts:
        tokens, values = _points(source, key)
        line = {"color": colour, **line}
        figure.add_scatter(
            x=tokens, y=values, name=name, mode="lines", line=line, hovertemplate=hover, row=panel, col=1
        )
    figure.update_yaxes(range=[-0.06, 1.06], tickvals=[0, 0.5, 1], row=panel, col=1)


def _share(row: dict[str, Any]) -> float | None:
    removed, sites = finite_or_none(row.get("sites_removed")), finite_or_none(row.get("sites"))
    return removed / sites if removed is not None and sites else None


def _draw_constants(figure: Figure, placed: Sequence[tuple[int, float]], names: Sequence[str]) -> None:
    figure.add_scatter(
        x=[x for place, _ in placed for x in (place - 0.38, place, place + 0.38, None)],
        y=[y for _, value in placed for y in (value, value, value, None)],
        mode="lines",
        line={"color": INK, "width": 1.6},
        text=[text for place, _ in placed for text in [names[place]] * 4],
        hovertemplate="%{text}<br>constant scale %{y:.4g}<extra></extra>",
    )
