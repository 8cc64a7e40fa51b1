"""Token-by-token comparison of two models, as shown in the report and on the evaluation page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from plotly.graph_objects import Figure

from unnorm.evaluation.comparison import Comparison, Context
from unnorm.report.evaluation_figures import density_figure, entropy_figure, kl_figure
from unnorm.report.numbers import fixed, percent, significant

SPACE = "␣"
"""Makes a space visible."""

MOST_NATS = 2.0
"""Differences of at least this many nats get the strongest colour."""
RAMP = (0.05, 0.2, 0.5, 1.0, 2.0)

_WHY = {"kl": "", "loss": "", "typical": "typical: median KL"}


@dataclass(frozen=True)
class Pair:
    """One model compared with the original, as template values.

    Attributes:
        name: which model on which corpus.
        contexts: headings and coloured tokens, by context.
        values: details of each token, by context.
        figures: by the place on the page where each is drawn.
    """

    name: str
    contexts: list[dict[str, Any]]
    values: list[list[dict[str, Any]]]
    figures: dict[str, Figure]


def make_pair(name: str, comparison: Comparison) -> Pair:
    """A comparison in the form that the page shows."""
    return Pair(
        name=name,
        contexts=[_context(context) for context in comparison.contexts],
        values=[_values(context) for context in comparison.contexts],
        figures={
            "density": density_figure(comparison),
            "kl": kl_figure(comparison.kl),
            "entropy": entropy_figure(comparison.entropy_difference),
        },
    )


def pair_variables(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Template variables for the pairs."""
    specs = [{place: json.loads(str(figure.to_json())) for place, figure in pair.figures.items()} for pair in pairs]
    return {
        "groups": pairs,
        "has_typical": any(_WHY["typical"] in context["heading"] for pair in pairs for context in pair.contexts),
        "group_specs": Markup(script_json(specs)),
        "values": Markup(script_json([pair.values for pair in pairs])),
        "ramp": [(f"{nats:g}", strength(nats)) for nats in RAMP],
    }


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no text in it can close the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def strength(nats: float) -> float:
    """Colour strength of a difference, 0 to 0.5; the square root keeps small ones visible next to large ones."""
    return round(0.5 * min(abs(nats) / MOST_NATS, 1.0) ** 0.5, 3)


def _context(context: Context) -> dict[str, Any]:
    changes = [b - a for a, b in zip(context.original_loss, context.loss, strict=True)]
    n = len(changes)
    mean_kl, mean_change = sum(context.kl) / n, sum(map(abs, changes)) / n
    parts = [
        f"block {context.block + 1}, positions {context.start} to {context.start + n - 1}",
        f"mean KL {significant(mean_kl)}",
        f"loss {fixed(sum(context.original_loss) / n, 3)} → {fixed(sum(context.loss) / n, 3)}, "
        f"mean absolute change per token {fixed(mean_change, 3)}",
        _WHY[context.why],
    ]
    return {
        "heading": " · ".join(part for part in parts if part),
        "mean_kl": round(mean_kl, 6),
        "mean_change": round(mean_change, 6),
        "tokens": [
            {"html": _visible(text), "better": change < 0, "d": strength(change), "k": strength(kl)}
            for text, change, kl in zip(context.tokens, changes, context.kl, strict=True)
        ],
    }


def _values(context: Context) -> list[dict[str, Any]]:
    rows = zip(
        context.tokens,
        zip(context.original_loss, context.loss, strict=True),
        context.kl,
        zip(context.original_entropy, context.entropy, strict=True),
        zip(context.original_guess, context.guess, strict=True),
        zip(context.original_confidence, context.confidence, strict=True),
        strict=True,
    )
    return [
        {
            "token": _spelled(text),
            "position": context.start + i,
            "loss": [fixed(value, 3) for value in losses],
            "change": fixed(losses[1] - losses[0], 3, sign=True),
            "kl": significant(kl),
            "entropy": [fixed(value, 2) for value in entropies],
            "guess": [_spelled(guess) for guess in guesses],
            "confidence": [percent(value) for value in confidences],
        }
        for i, (text, losses, kl, entropies, guesses, confidences) in enumerate(rows)
    ]


def _visible(text: str) -> Markup:
    """A token's text in context; invisible characters get a visible symbol, so that their colour shows."""
    shapes = {"\n": Markup("<u>↵</u>\n"), "\t": Markup("<u>→</u>\t"), "\r": Markup("<u>←</u>")}
    return Markup("").join(
        shapes.get(char) or (escape(char) if char.isprintable() else Markup("<u>□</u>")) for char in text
    )


def _spelled(text: str) -> str:
    """A token's text on its own, with white space and control characters made visible."""
    spelled = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return "".join(spelled).replace(" ", SPACE)
