"""The report page: what a removal achieved, its proof, and how it was run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from plotly.graph_objects import Figure

from unnorm.calibration.scales import ScaleStatistics
from unnorm.evaluation.comparison import Comparison
from unnorm.paths import short_name
from unnorm.report import removal_figures as figures
from unnorm.report.comparison import make_pair
from unnorm.report.numbers import (
    MISSING,
    count,
    duration,
    finite_or_none,
    fixed,
    interval,
    loss_increase,
    percent,
    short_count,
    shortest,
    significant,
)
from unnorm.report.sentences import (
    WORSE_THAN_NAIVE,
    healed,
    knows_naive_removal,
    limits,
    massive_neurons,
    overflowed,
    overflows_everywhere,
    own_share,
    sources,
    without_norms,
    worse_than_naive,
)
from unnorm.report.templates import render_page


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        result: the run's numbers and settings; whatever is missing or None becomes a dash.
        rows: `metrics.jsonl` of the removal run; empty where nothing was trained.
        control_rows: `metrics.jsonl` of the control; may be empty.
        scales_before: statistics of each norm site in the original.
        scales_after: the same sites in the LN-free model: the scales that a norm would have had there.
        constants: the constant scale by site name, as folded.
        position_loss: mean loss in nats at each predicted position, for "original", "lnfree" and, if there is one,
            "control".
        samples: each a `prompt` with its greedy continuations `original` and `lnfree`.
        checks: the proof: `name`, `passed`, `value`, `limit` (the largest value that passes) and `detail`.
        comparison: original and LN-free model token by token; None leaves it out.
        control_steps: those of `control_rows` that the run's own plan has steps for, not of runs before it.
    """

    result: dict[str, Any]
    rows: list[dict[str, Any]]
    control_rows: list[dict[str, Any]]
    scales_before: list[ScaleStatistics]
    scales_after: list[ScaleStatistics]
    constants: dict[str, float]
    position_loss: dict[str, list[float]]
    samples: list[dict[str, str]]
    checks: list[dict[str, Any]]
    comparison: Comparison | None = None
    control_steps: Sequence[dict[str, Any]] = ()


def render_report(data: ReportData) -> str:
    """The whole HTML page, self-contained: scripts and styles are in it, and it loads nothing from the network."""
    drawn = _figures(data)
    values = {
        "headline": headline(data.result),
        "title": without_norms(data.result, data.result.get("model") or "model"),
        "trained": bool(data.result.get("tokens")),
        "tiles": _tiles(data.result),
        "losses": _losses(data.result),
        "interval_over": data.result.get("interval_over", "blocks"),
        "has_control": _has_control(data),
        "has_line": any(finite_or_none(row.get("teacher_loss")) is not None for row in data.rows),
        "has_stretch": figures.removal_stretch(data.rows) is not None,
        "several_texts": len(sources(data.result)) > 1,
        "in_context": "control" in data.position_loss,
        "scales_complete": bool(data.scales_before and data.scales_after),
        "checks": [_check(check) for check in data.checks],
        "failed": sum(not check.get("passed") for check in data.checks),
        "samples": [_sample(sample) for sample in data.samples],
        "settings": [*_settings(data.result), *_control_steps(data.control_steps)],
        "versions": sorted(_mapping(data.result.get("versions")).items()),
    }
    pairs = [] if data.comparison is None else [make_pair(f"{data.result.get('model')}", data.comparison)]
    return render_page("removal.html", values, drawn, pairs)


def headline(result: dict[str, Any]) -> str:
    """One plain sentence on what was achieved, claiming no more than the numbers show."""
    model, sites = short_name(result.get("model") or "the model"), finite_or_none(result.get("sites"))
    norms = "All norms" if sites is None else "The only norm" if sites == 1 else f"All {count(sites)} norms"
    if result.get("norm_modules_left"):
        left = count(result["norm_modules_left"])
        return f"{left} norm {'module is' if left == '1' else 'modules are'} left in {model}"
    tokens = finite_or_none(result.get("tokens"))
    if tokens == 0:
        return f"{norms} of {model} replaced by constant scales, without training"
    sentence = f"{norms} of {model} removed"
    if tokens is not None:
        sentence += f" with {short_count(tokens)} tokens"
    if finite_or_none(result.get("training_seconds")) is not None:
        sentence += f" in {duration(result['training_seconds'])} of training"
    return sentence


def _has_control(data: ReportData) -> bool:
    return bool(data.control_rows) or finite_or_none(data.result.get("control_loss")) is not None


def _figures(data: ReportData) -> dict[str, Figure]:
    drawn = {
        "run": figures.run_figure(data.rows, data.control_rows),
        "scales": figures.scale_figure(data.scales_before, data.scales_after, data.constants),
        "positions": figures.position_figure(data.position_loss),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _tiles(result: dict[str, Any]) -> list[dict[str, str]]:
    """The headline numbers, each with its name and one explanatory line."""
    jsd = f"; Jensen\u2013Shannon {significant(result.get('jsd'))}"
    sites, left = finite_or_none(result.get("sites")), finite_or_none(result.get("norm_modules_left"))
    return [
        {
            "name": "KL to the original",
            "value": significant(result.get("kl")),
            "note": overflowed(result)
            or (worse_than_naive(result) and f"naive removal: {significant(result['naive_kl'])}; {WORSE_THAN_NAIVE}")
            or "nats per token" + (jsd if finite_or_none(result.get("jsd")) is not None else ""),
        },
        {
            "name": "Loss increase",
            "value": fixed(loss_increase(result), sign=True),
            "note": f"from {fixed(result.get('teacher_loss'))} to {fixed(result.get('lnfree_loss'))}"
            + _paired(result.get("loss_increase_ci")),
        },
        {
            "name": "Gap to the control",
            "value": fixed(result.get("gap"), sign=True),
            "note": f"control: {fixed(result['control_loss'])}"
            if finite_or_none(result.get("control_loss")) is not None
            else "no control was trained",
        },
        {
            "name": "Top-1 agreement",
            "value": MISSING if overflows_everywhere(result) else percent(result.get("top1_agreement")),
            "note": "same most likely next token",
        },
        {
            "name": "Norm modules left",
            "value": count(left),
            "note": "" if sites is None else f"of {count(sites + (left or 0))} norm sites",
        },
        {
            "name": "Fold error",
            "value": significant(result.get("fold_max_abs_error"), 2),
            "note": "largest difference in a logit",
        },
    ]


def _paired(ends: Any) -> str:
    return f"; 95% interval {fixed(ends[0], sign=True)} to {fixed(ends[1], sign=True)}, paired" if ends else ""


def _losses(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of models; a control or a naive removal that was not measured is left out."""
    models = (
        ("original", "teacher", None),
        ("naive removal", "naive", "naive_kl"),
        ("twin", "lnfree", "kl"),
        ("control", "control", "control_kl"),
    )
    rows = []
    for name, key, kl in models:
        loss = finite_or_none(result.get(f"{key}_loss"))
        overflows = loss is None and (key == "naive" or (key == "lnfree" and bool(result.get("overflowed_blocks"))))
        if (key == "control" and loss is None) or (key == "naive" and not knows_naive_removal(result)):
            continue
        rows.append(
            {
                "name": name,
                "loss": "overflows" if overflows else fixed(loss),
                "interval": interval(result.get(f"{key}_loss_ci")),
                "kl": significant(result.get(kl)) if kl else "0",
            }
        )
    return rows


def _check(check: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": check.get("name") or MISSING,
        "passed": bool(check.get("passed")),
        "value": shortest(check.get("value")),
        "limit": shortest(check.get("limit")),
        "detail": check.get("detail") or "",
    }


def _sample(sample: dict[str, str]) -> dict[str, str]:
    """The prompt, and the two continuations without it, split where they diverge."""
    prompt = sample.get("prompt", "")
    original, lnfree = (sample.get(key, "").removeprefix(prompt) for key in ("original", "lnfree"))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(original, lnfree, strict=False)))
    if original != lnfree:
        # Split at word boundaries.
        shared = max(original.rfind(space, 0, shared) for space in " \n") + 1
    return {
        "prompt": prompt,
        "same": original[:shared],
        "original": original[shared:],
        "lnfree": lnfree[shared:],
    }


SETTINGS = (
    ("model", "model"),
    ("data", "training data"),
    ("held_out", "held-out data"),
    ("validation_tokens", "held-out tokens"),
    ("recipe", "recipe"),
    ("sites", "norm sites"),
    ("tokens", "training tokens"),
    ("training_seconds", "training time"),
    ("tokens_per_second", "tokens per second"),
    ("seconds", "total time, with control, evaluation and proof"),
    ("peak_memory_mb", "peak memory"),
    ("seed", "seed"),
)
HELD_UP = (
    ("skipped_steps", "steps refused: gradient not finite or exploding"),
    ("waited_steps", "steps in which the taper waited"),
    ("set_backs", "times the taper went back"),
)
"""Counts that are 0 in a run without trouble, and then left out."""
OF_STEPS = ("batch_size", "micro_batch", "steps", "lr", "bfloat16", "compile", "cuda_graph")
"""Plan entries that are left out where nothing was trained."""
PLAN_WORDS = {
    "context": "context, tokens per block",
    "batch_size": "batch size, blocks per step",
    "micro_batch": "micro-batch, blocks per pass",
    "lr": "peak learning rate",
    "bfloat16": "bfloat16 autocast",
    "compile": "compiled",
    "cuda_graph": "replayed as a CUDA graph",
}


def _settings(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of how the run was done."""
    shapes = {
        "tokens": count,
        "validation_tokens": count,
        "training_seconds": duration,
        "seconds": duration,
        "tokens_per_second": count,
        "peak_memory_mb": lambda mb: MISSING if finite_or_none(mb) is None else f"{count(mb)} MB",
    }
    rows = [(words, shapes.get(key, _plain)(result.get(key))) for key, words in SETTINGS]
    rows += [(words, count(result[key])) for key, words in HELD_UP if finite_or_none(result.get(key))]
    if own := own_share(result):
        rows.append(("written by the original", own))
    if further := healed(result):
        rows.append(("healed further", further))
    if neurons := massive_neurons(result.get("massive_neurons")):
        rows.append(("neurons scaled down", neurons))
    if limited := limits(result):
        rows.append(("neurons with limits", limited))
    unused = {"tokens", *(() if result.get("tokens") else OF_STEPS)}
    plan = {key: value for key, value in _mapping(result.get("plan")).items() if key not in unused}
    return rows + [(PLAN_WORDS.get(key, str(key).replace("_", " ")), _plain(value)) for key, value in plan.items()]


def _control_steps(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """How the control's steps differ from the twin's, in number and size; of a healed run, those of its own."""
    if not rows or not rows[-1].get("step"):
        return []
    step, tokens = rows[-1]["step"], rows[-1]["tokens"]
    return [("the control's steps", f"{count(step)} of {count(tokens / step)} tokens each")]


def _plain(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return shortest(value, 4)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
