"""The model card: what a reader of the checkpoint must know, in Markdown."""

from importlib.resources import files
from typing import Any

from unnorm.report.numbers import count, fixed, percent


def render_card(result: dict[str, Any]) -> str:
    """The card of an LN-free model from what stands in `result.json`."""
    from jinja2 import Environment, StrictUndefined

    values = {
        **{key: result[key] for key in ("model", "sites", "recipe", "data", "norm_modules_left", "seed")},
        **{key: fixed(result.get(key), 4) for key in ("kl", "teacher_loss", "lnfree_loss", "control_loss")},
        **{key: count(result.get(key)) for key in ("tokens", "validation_tokens")},
        "name": str(result["model"]).rstrip("/").rpartition("/")[2],
        "top1_agreement": percent(result["top1_agreement"]),
        "context": result["plan"]["context"],
        "version": result["versions"]["unnorm"],
    }
    template = files("unnorm.report").joinpath("card.md").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # Markdown
    return environment.from_string(template).render(values)
