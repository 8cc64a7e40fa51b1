"""Rendering of this folder's templates as self-contained pages that load nothing from the network."""

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from unnorm.report.comparison import Pair, pair_variables, script_json
from unnorm.report.drawing import DARK_COLOURS


def render_page(template: str, values: dict[str, Any], figures: dict[str, Figure], pairs: Sequence[Pair] = ()) -> str:
    """A whole HTML page, including its scripts and styles.

    Args:
        template: name of a template file in this folder, which extends `base.html`.
        values: variables of the template; inserted values are escaped, and a missing variable is an error.
        figures: by the id of the element that each is drawn in.
        pairs: token-by-token comparisons of models.
    """
    environment = Environment(
        loader=PackageLoader("unnorm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        **values,
        figures=figures.keys(),
        plotly=Markup(get_plotlyjs()) if figures or pairs else "",
        specs=Markup(script_json({name: json.loads(str(figure.to_json())) for name, figure in figures.items()})),
        dark=Markup(script_json(DARK_COLOURS)),
        **pair_variables(pairs),
    )
