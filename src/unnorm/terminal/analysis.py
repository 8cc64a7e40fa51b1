"""The table of `analyze`."""

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unnorm.terminal.text import whole

_ANALYZED = (
    ("{}.error", "attribution", "error relative to direct effect", ".2%"),
    ("{}.error_of_heads", "attribution", "the same, heads only", ".2%"),
    ("{}.sum_error", "attribution", "max |sum of contributions - logit|", ".1e"),
    ("{}.correlation", "patching", "correlation of attribution and activation patching", ".4f"),
    ("{}.error", "patching", "error relative to mean absolute effect", ".1%"),
    ("{}.right_answers", "patching", "right answers", ".0%"),
    ("{}.mean_sink_rate", "sinks", "sink rate, mean over heads", ".1%"),
    ("{}.mean_share", "sinks", "attention on position 0, mean over heads", ".1%"),
    ("{}.longest_over_median", "sinks", "longest residual vector / median", ".2f"),
    ("{}.entropy_neurons.mean_abs_entropy", "neurons", "entropy neurons ablated: entropy, nats", ".2e"),
    ("{}.entropy_neurons.mean_abs_entropy_through_norm", "neurons", "of which through the final norm", ".2e"),
    ("{}.entropy_neurons.mean_loss", "neurons", "entropy neurons ablated: loss, nats", "+.2e"),
    ("{}.random_neurons.mean_abs_entropy", "neurons", "random neurons ablated: entropy, nats", ".2e"),
    ("{}.random_neurons.mean_abs_entropy_through_norm", "neurons", "of which through the final norm", ".2e"),
    ("{}.mean_forms_at", "lens", "mean depth at which predictions form", ".2f"),
    ("mean_spread.{}", "scales", "std of log scale, mean over sites", ".3f"),
    ("mean_change.{}", "geometry", "mean relative weight change", ".1%"),
)


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
    return Group(table, *skipped, whole(f"page     {result['page']}\nnumbers  {result['numbers']}"))


def _at(numbers: dict[str, Any], path: str) -> float | None:
    value: Any = numbers
    for key in path.split("."):
        value = value.get(key)
    return None if value is None else float(value)
