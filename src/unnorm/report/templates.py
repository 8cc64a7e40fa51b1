"""The pages of this folder's templates: self-contained, they load nothing from the network."""

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
    """A whole HTML page, with scripts and styles in it.

    Args:
        template: file name beside this one; it extends `base.html`.
        values: what the template shows; everything that is put in is escaped, and nothing may be missing.
        figures: by the id of the element that each is drawn in.
        pairs: models that are compared token by token.
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
