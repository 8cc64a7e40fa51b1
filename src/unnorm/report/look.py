"""The look that every page and figure of ours shares: colours, axes, and pages that load nothing."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from unnorm.report.numbers import finite

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Light colour -> dark colour. The page replaces these exact strings, so figures use no others.
ACCENT, INK, SOFT, RULE, PAPER = "#0a6c74", "#24292e", "#6f777e", "#dfe2e4", "#fdfdfc"
DARK_COLOURS = {ACCENT: "#54bfc4", INK: "#e4e6e8", SOFT: "#979fa6", RULE: "#33383d", PAPER: "#16191c"}

MOST_TICKS = 24


def render_page(template: str, values: dict[str, Any], figures: "dict[str, Figure]") -> str:
    """A whole HTML page, self-contained: scripts and styles are in it, and it loads nothing from the network.

    Args:
        template: file name beside this one; it extends `base.html`.
        values: what the template shows.
        figures: by the id of the element that each is drawn in.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("unnorm.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        **values,
        figures=figures.keys(),
        plotly=Markup(get_plotlyjs()) if figures else "",
        specs=Markup(_script_json({name: json.loads(figure.to_json()) for name, figure in figures.items()})),
        dark=Markup(_script_json(DARK_COLOURS)),
    )


def short_names(names: Sequence[str]) -> list[str]:
    """Site names less the dotted prefix that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: 1, 2 and 5 of each decade, or powers of ten over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [digit * 10.0**decade for decade in decades for digit in digits]


def panels(heights: list[float]) -> "Figure":
    """Panels above one another with one x axis, of these shares of the height."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=len(heights), cols=1, shared_xaxes=True, row_heights=heights, vertical_spacing=0.2 / (1 + len(heights))
    )
    figure.update_layout(hovermode="x")
    return figure


def name_panel(figure: "Figure", panel: int, title: str) -> None:
    """The title of a panel, numbered from 1."""
    # Above the panel and not along the axis: that is read without turning one's head and leaves phones their width.
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


def log_axis(figure: "Figure", panel: int, values: Iterable[float]) -> None:
    """Make a panel's y axis logarithmic around the positive ones of these values, with round numbers at its ticks."""
    positive = [v for v in values if finite(v) is not None and v > 0]
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


def finish(figure: "Figure", height: int, x_title: str) -> "Figure":
    """The look that all figures share; the page draws the legend, so that it wraps like text."""
    # Of plotly's own template nothing is wanted: empty, it also leaves the page smaller.
    figure.update_layout(
        template="none",
        height=height,
        showlegend=False,
        margin={"l": 48, "r": 8, "t": 28, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": SOFT},
        hoverlabel={"font": {"size": 12}},
        dragmode=False,
    )
    figure.update_xaxes(
        showgrid=False, zeroline=False, linecolor=RULE, showline=True, tickcolor=RULE, ticks="outside", automargin=True
    )
    figure.update_yaxes(gridcolor=RULE, zeroline=False, automargin=True)
    last = max(axis for axis in figure.layout if axis.startswith("xaxis"))
    figure.layout[last].title = {"text": x_title, "standoff": 8}
    return figure


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element: no text in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
