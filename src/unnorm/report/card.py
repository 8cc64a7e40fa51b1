"""The model card: what users of the checkpoint need to know, in Markdown with the hub's front matter."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from unnorm.data import OWN_TEXT, STDLIB
from unnorm.errors import first_few
from unnorm.models.load import DEMO
from unnorm.report.numbers import count, finite_or_none, fixed, interval, loss_increase, percent, shortest
from unnorm.report.sentences import (
    healed,
    knows_naive_removal,
    limits,
    massive_neurons,
    overflowed,
    overflows_everywhere,
    own_share,
    sources,
    without_norms,
)
from unnorm.sites.site import NormSite

_BUILT_IN = {STDLIB: "Python's standard library", OWN_TEXT: "text written by the original"}
_HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")  # GPT-2 and a few others have no owner.


def render_card(
    result: Mapping[str, Any], sites: Sequence[NormSite] = (), constants: Mapping[str, float] | None = None
) -> str:
    """The card of an LN-free model.

    Args:
        result: the contents of `result.json`.
        sites: the former norm sites.
        constants: the constant scale of each site, as folded.
    """
    in_place = sum(site.folds_into == "in place" for site in sites)
    values = {
        **{key: result[key] for key in ("sites", "recipe", "held_out", "norm_modules_left")},
        "kept": result["norm_modules_left"],
        "in_place": in_place,
        "idle": first_few([f"`{name}`" for name in result.get("idle_norms") or ()]),
        "folded": _folded(in_place, len(sites), bool(result["norm_modules_left"])),
        "limited": result.get("limited_neurons"),
        "norms": result["sites"] + result["norm_modules_left"],
        **{key: _published(str(result[key])) for key in ("model", "data")},
        "trained_on": "`, then `".join(map(_published, sources(result))),
        **{key: count(result.get(key)) for key in ("tokens", "validation_tokens")},
        "front_matter": yaml.safe_dump(front_matter(result), sort_keys=False, allow_unicode=True).strip(),
        "title": without_norms(result, _name(result)),
        "trained": bool(result.get("tokens")),
        "verified": bool(result.get("verified")),
        "on_hub": _on_hub(str(result["model"])) or "",
        "context": result["plan"]["context"],
        "results": _results(result),
        "interval_over": result["interval_over"],
        "proof": _proof(result),
        "folds": _folds(sites, constants or {}),
        "settings": _settings(result),
    }
    template = files("unnorm.report").joinpath("card.md").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, autoescape=False
    )  # Markdown
    return environment.from_string(template).render(values)


def front_matter(result: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for the hub: how to load the model, what it is derived from, and its loss and KL as results."""
    model, data = str(result["model"]), str(result["data"])
    tags = ["unnorm", "interpretability"]
    tags += [] if result.get("norm_modules_left") else ["norm-free", "layernorm-free"]
    measured = (("loss", "loss, nats per token", "lnfree_loss"), ("kl", "KL to the original, nats per token", "kl"))
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=_published(data),
            dataset_name=f"{_published(data)}, held-out part",
            metric_type=kind,
            metric_name=words,
            metric_value=round(float(result[key]), 5),
        )
        for kind, words, key in measured
        if finite_or_none(result.get(key)) is not None
    ]
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=model if _on_hub(model) else None,
        base_model_relation="finetune" if _on_hub(model) else None,
        datasets=[data.partition(":")[0]] if _on_hub(data) else None,
        model_name=without_norms(result, _name(result)) if results else None,
        eval_results=results or None,
    )
    values: dict[str, Any] = card.to_dict()
    return values


def _folded(in_place: int, sites: int, several: bool) -> str:
    """Where the norms' constant maps are now."""
    if in_place and in_place == sites:
        return "left as separate modules" if several else "left as a separate module"
    folded = f"folded into the weights beside {'them' if several else 'it'}"
    return f"{folded}; {in_place} of the maps remain as modules" if in_place else folded


def _name(result: Mapping[str, Any]) -> str:
    return str(result["model"]).rstrip("/").rpartition("/")[2]


def _published(source: str) -> str:
    """Hub name of a model or data set; for a local path only its last component, since cards are read elsewhere."""
    return source if _on_hub(source) else _BUILT_IN.get(source, Path(source).name)


def _on_hub(source: str) -> bool:
    """Whether a name has the hub's form, [OWNER/]NAME or [OWNER/]NAME:SUBSET, and is not a local path."""
    here = source.startswith((".", "~")) or Path(source).exists() or source in (DEMO, STDLIB, OWN_TEXT)
    here |= PureWindowsPath(source).is_absolute()
    return bool(_HUB_NAME.fullmatch(source.partition(":")[0])) and not here


def _results(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    def loss(key: str) -> str:
        ends = result.get(f"{key}_loss_ci")
        return fixed(result.get(f"{key}_loss")) + (f" ({interval(ends)})" if ends else "")

    increase = loss_increase(result)
    ends = result.get("loss_increase_ci")
    paired = f" ({fixed(ends[0], sign=True)} to {fixed(ends[1], sign=True)})" if ends else ""
    rows = [
        ("loss of the original", loss("teacher")),
        ("loss of this model", loss("lnfree")),
        ("loss increase", "" if increase is None else fixed(increase, sign=True) + paired),
        ("loss of the control (norms kept, same tokens)", loss("control")),
        (
            "loss after naive removal (constants, no training)",
            loss("naive") if result.get("tokens") and knows_naive_removal(result) else "",
        ),
        ("KL(original ‖ this model)", fixed(result.get("kl"))),
        ("overflow on that text", overflowed(result)),
        ("Jensen-Shannon divergence", fixed(result.get("jsd"))),
        (
            "top-1 agreement with the original",
            "" if overflows_everywhere(result) else percent(result.get("top1_agreement")),
        ),
    ]
    missing = fixed(None)
    return [(words, value) for words, value in rows if value not in ("", missing)]


def _proof(result: Mapping[str, Any]) -> str:
    if not result.get("verified"):
        return "The proof of this model did not pass: run `unnorm verify` for details."
    error = shortest(result["fold_max_abs_error"])
    return f"Folding was exact: logits of the folded and the unfolded model differ by at most {error} in float64."


def _folds(sites: Sequence[NormSite], constants: Mapping[str, float]) -> list[dict[str, str]]:
    """One row for each norm, all layers together."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for site in sites:
        into = dict.fromkeys(f"`{_any_layer(name)}`" for name in site.folded_into)
        words = ", ".join(into) or "nothing: its map remains a module"
        groups.setdefault((_any_layer(site.name), site.kind, words), []).append(constants.get(site.name, float("nan")))
    return [
        {
            "name": name,
            "times": f" ({len(scales)} of them)" if len(scales) > 1 else "",
            "kind": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}.get(kind, kind),
            "into": into,
            "scale": " to ".join(dict.fromkeys(shortest(end) for end in (min(scales), max(scales)))),
        }
        for (name, kind, into), scales in groups.items()
    ]


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan, versions = result["plan"], result["versions"]
    own, further = own_share(result), healed(result)
    neurons, limited = massive_neurons(result.get("massive_neurons")), limits(result)
    steps = [
        ("batch size", f"{plan.get('batch_size')} blocks of {plan['context']} tokens"),
        ("peak learning rate", shortest(plan.get("lr"))),
    ]
    return [
        ("recipe", f"`{result['recipe']}`"),
        ("training tokens", count(result.get("tokens"))),
        ("data", ", then ".join(f"`{_published(source)}`" for source in sources(result))),
        *([("written by the original", own)] if own else []),
        *(steps if result.get("tokens") else []),
        ("seed", str(result.get("seed"))),
        *([("healed further", further)] if further else []),
        *([("neurons scaled down", neurons)] if neurons else []),
        *([("neurons with limits", limited)] if limited else []),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]
