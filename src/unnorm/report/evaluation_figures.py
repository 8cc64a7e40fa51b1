"""Figures of an evaluation: models side by side, and token-by-token comparisons with the original."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from plotly.graph_objects import Figure

from unnorm.evaluation.comparison import Comparison, Histogram
from unnorm.evaluation.results import Evaluation
from unnorm.report.drawing import (
    ACCENT,
    INK,
    OLIVE,
    PLUM,
    RULE,
    RUST,
    SOFT,
    bin_positions,
    draw_line,
    finish,
    log_ticks,
    name_panel,
    panels,
    position_axis,
)

PANEL_HEIGHT = 220
LEAST_BIN_TOKENS = 10
"""Bins of the calibration figure with fewer tokens are left out: their errors would stretch the axis."""

_STYLES = tuple((colour, dash) for dash in ("solid", "dash", "dot") for colour in (ACCENT, RUST, PLUM, OLIVE, SOFT))
_TRANSPARENT = "rgba(10,108,116,0)"


def styles(models: Sequence[str], original: str | None) -> dict[str, tuple[str, str]]:
    """Colour and dash of each model's lines; the original gets the text colour and a solid line."""
    others = [name for name in dict.fromkeys(models) if name != original]
    found = {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(others)}
    return found if original is None else {original: (INK, "solid"), **found}


def position_figure(rows: Sequence[Evaluation], style: dict[str, tuple[str, str]]) -> Figure | None:
    """Loss by position in the context, one panel for each corpus; None without positions."""
    rows = [row for row in rows if row.position_loss]
    if not rows:
        return None

    def draw(figure: Figure, panel: int, row: Evaluation) -> None:
        draw_line(figure, panel, *bin_positions(row.position_loss), row.model, *style[row.model])

    figure = _by_corpus(rows, draw, "loss, nats per token", "position of the predicted token (log)")
    longest = max(len(row.position_loss) for row in rows)
    position_axis(figure, longest)
    return figure


def calibration_figure(rows: Sequence[Evaluation], style: dict[str, tuple[str, str]]) -> Figure | None:
    """Accuracy of the most likely token minus its probability, one panel for each corpus; None without calibration."""
    rows = [row for row in rows if row.calibration]
    if not rows:
        return None

    def draw(figure: Figure, panel: int, row: Evaluation) -> None:
        _draw_calibration(figure, panel, row, *style[row.model])

    figure = _by_corpus(rows, draw, "accuracy minus confidence", "confidence: probability of the most likely token")
    figure.add_hline(y=0, row="all", col=1, line={"color": INK, "width": 1}, layer="below")
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    figure.update_yaxes(tickformat="+.0%")
    return figure


def _by_corpus(
    rows: Sequence[Evaluation], draw: Callable[[Figure, int, Evaluation], None], what: str, x_title: str
) -> Figure:
    corpora = list(dict.fromkeys(row.data for row in rows))
    figure = panels([1 / len(corpora)] * len(corpora))
    for panel, corpus in enumerate(corpora, start=1):
        for row in rows:
            if row.data == corpus:
                draw(figure, panel, row)
        name_panel(figure, panel, f"{corpus}: {what}")
    return finish(figure, PANEL_HEIGHT * len(corpora) + 80, x_title)


def _draw_calibration(figure: Figure, panel: int, row: Evaluation, colour: str, dash: str) -> None:
    bins = [b for b in row.calibration if b.tokens >= LEAST_BIN_TOKENS]
    # Two standard errors of the accuracy, treating tokens as independent.
    errors = [2 * math.sqrt(max(b.accuracy * (1 - b.accuracy), 1 / (4 * b.tokens)) / b.tokens) for b in bins]
    figure.add_scatter(
        x=[b.confidence for b in bins],
        y=[b.accuracy - b.confidence for b in bins],
        error_y={"array": errors, "color": colour, "thickness": 0.8, "width": 0},
        name=row.model,
        mode="lines+markers",
        line={"color": colour, "width": 1.4, "dash": dash},
        marker={"color": colour, "size": 5},
        text=[f"{row.model}<br>{b.tokens:,} tokens, accuracy {b.accuracy:.1%}" for b in bins],
        hovertemplate="%{text}, confidence %{x:.1%}<extra></extra>",
        row=panel,
        col=1,
    )


def density_figure(comparison: Comparison) -> Figure:
    """The model's loss against the original's, as token counts on a log colour scale."""
    middles = _middles(comparison.loss_edges)
    counts = [list(column) for column in zip(*comparison.loss_density, strict=True)]
    figure = Figure()
    figure.add_heatmap(
        x=middles,
        y=middles,
        z=[[math.log10(n) + 0.3 if n else None for n in row] for row in counts],
        customdata=counts,
        colorscale=[[0, _TRANSPARENT], [1, ACCENT]],
        showscale=False,
        hovertemplate="original %{x:.2f}, model %{y:.2f}<br>%{customdata} tokens<extra></extra>",
        zmin=0,
    )
    end = comparison.loss_edges[-1]
    figure.add_scatter(x=[0, end], y=[0, end], mode="lines", line={"color": INK, "width": 1}, hoverinfo="skip")
    name_panel(figure, 1, "loss of the model")
    figure.update_xaxes(range=[0, end])
    figure.update_yaxes(range=[0, end])
    return finish(figure, 290, "loss of the original, nats")


def kl_figure(histogram: Histogram) -> Figure:
    """Histogram of tokens by KL, on a log axis."""
    edges = [math.log10(edge) for edge in histogram.edges]
    figure = Figure()
    _bars(figure, edges, histogram.counts, [f"{edge:.2g}" for edge in histogram.edges], ACCENT)
    ticks = log_ticks(histogram.edges[0], histogram.edges[-1])[:-1:2]
    figure.update_xaxes(
        tickmode="array", tickvals=[math.log10(tick) for tick in ticks], ticktext=[f"{tick:g}" for tick in ticks]
    )
    name_panel(figure, 1, "tokens")
    return finish(figure, 290, "KL, nats (log)")


def entropy_figure(histogram: Histogram) -> Figure:
    """Histogram of tokens by the model's entropy minus the original's."""
    figure = Figure()
    _bars(figure, histogram.edges, histogram.counts, [f"{edge:+.3g}" for edge in histogram.edges], ACCENT)
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    name_panel(figure, 1, "tokens")
    return finish(figure, 290, "entropy minus original's, nats")


def _bars(figure: Figure, edges: Sequence[float], counts: Sequence[int], words: Sequence[str], colour: str) -> None:
    figure.add_bar(
        x=_middles(edges),
        y=list(counts),
        width=[(edges[i + 1] - edges[i]) * 0.92 for i in range(len(counts))],
        marker={"color": colour, "line": {"color": RULE, "width": 0}},
        text=[f"{low} to {high}" for low, high in pairwise(words)],
        textposition="none",
        hovertemplate="%{text}<br>%{y:,} tokens<extra></extra>",
    )


def _middles(edges: Sequence[float]) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise(edges)]
