"""Worst-case audit: compare a twin with a model with norms on classes of inputs that may blow it up."""

import inspect
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.data.packing import begin_of_blocks
from unnorm.errors import UnnormError
from unnorm.isolation import isolated
from unnorm.json_text import finite
from unnorm.models.device import choose_device, computes_bfloat16
from unnorm.models.running import cast_as_loaded
from unnorm.models.sizes import choose_context, context_length, vocabulary_size
from unnorm.paths import named_path
from unnorm.progress import Watch, say, silent
from unnorm.runs.config import check_seed, read_count, trained_context
from unnorm.runs.pair import open_pair
from unnorm.runs.text import choose_text
from unnorm.sites.find import unembedding_name
from unnorm.sites.site import NormSite
from unnorm.sites.tracing import stream_sources
from unnorm.worst_case.inputs import InputClass, Inputs, Material, input_classes
from unnorm.worst_case.measure import Measured, is_finite, largest_residuals, measure

AUDIT_TOKENS = 32_768
"""Approximate tokens per class. `token after text` covers the vocabulary if it fits, `token alone` always does."""
MOST_AUDIT_CONTEXT = 4096
"""Longest sequence by default: the logits of longer ones would fill the memory."""
HALF_CPU_TOKENS = 1024
"""Tokens per class in float16, or a bfloat16 that is no faster, on a CPU (which takes ten times as long as float32):
those with the largest residuals."""
LIMITS = {"p99.99": 1.1, "largest": 2.0}
"""How many times the reference's the twin's may be at most; the largest, as percentiles miss a single bad token."""
PERCENTILES = (99.9, 99.99)

_WORST, _SHOWN_TOKENS = 3, 12


@isolated
def audit(
    directory: str | Path,
    against: str | Path | None = None,
    *,
    tokens: int | str = AUDIT_TOKENS,
    context: int | None = None,
    data: str | Path | None = None,
    text_field: str | None = None,
    split: str | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Compare an LN-free model with a model with norms on inputs that may blow it up; `unnorm audit`.

    A class passes if the twin's 99.99th percentile of per-token loss is at most 1.1 times, and its largest loss at
    most twice, the reference's on the same tokens, and if none of its logits and residuals is NaN or infinite in
    float32, bfloat16 and float16. float16 counts only where the reference is finite in it; on a CPU it is tried on the
    inputs with the largest residuals only, as is bfloat16 if the CPU has no instructions for it.

    Args:
        directory: directory of a finished run.
        against: the reference; by default the run's control if it saved one, otherwise its original.
        tokens: approximate tokens per class. Each token alone is always tried, each after text only if the vocabulary
            is no larger than this.
        context: tokens in the longest sequences; by default the most that both models take, at most 4096.
        data: ordinary text, of which the held-out part is used; by default the run's.
        text_field: column that holds the text; by default the run's.
        split: split that the text comes from; by default the run's.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: seed of all random inputs.
        trust_remote_code: run modeling code that comes with the reference.
        watch: called with `{"kind": "phase", "text": …}` as the audit progresses.

    Returns:
        `passed`, what was compared, and `classes` with one entry per class: `passed` and the `reason` if it failed;
        `loss` in nats and `residual_norm`, each with its percentiles and `largest` (None where infinite); the same for
        the reference; `finite` by dtype; and the `worst` inputs, decoded: those with the largest excess over the
        reference's loss.

    Raises:
        UnnormError: there is no finished run, or the reference or the text can't be used.
    """
    directory = named_path(directory)
    watch = watch or silent
    seed = check_seed(seed)
    tokens = read_count(tokens)
    if tokens < 1:
        raise UnnormError(f"--tokens {tokens}: a class takes at least 1 token.")
    pair = open_pair(directory, against, True, choose_device(device), trust_remote_code, watch)
    twin, reference, tokenizer = pair.twin, pair.reference, pair.tokenizer
    length = min(context_length(twin), context_length(reference), MOST_AUDIT_CONTEXT) if context is None else context
    length = choose_context(length, twin, reference)
    text = choose_text(pair.settings, data, text_field, split)
    begin = begin_of_blocks(text.data, tokenizer)
    blocks, _ = text.held_out(tokenizer, vocabulary_size(twin), length, 1 + max(1, tokens // length))
    material = Material(
        tokenizer=tokenizer,
        text=torch.tensor(blocks["input_ids"])[:, 0 if begin is None else 1 :].flatten(),
        vocabulary=min(max(tokenizer.get_vocab().values()) + 1, vocabulary_size(twin)),
        context=length,
        trained=trained_context(directory),
        tokens=tokens,
        random=torch.Generator().manual_seed(seed),
        begin=begin,
    )
    classes = list(input_classes(material, _takes_positions(twin) and _takes_positions(reference)))
    rows = audit_models(twin, reference, classes, _residual_reader(twin, pair.sites), tokenizer, watch)
    return {
        "directory": str(directory),
        "reference": pair.name,
        "passed": all(row["passed"] for row in rows),
        "context": length,
        "trained_context": material.trained,
        "vocabulary": material.vocabulary,
        "tokens": tokens,
        "seed": seed,
        "limits": LIMITS,
        "classes": finite(rows),
    }


def audit_models(
    twin: PreTrainedModel,
    reference: PreTrainedModel,
    classes: Sequence[InputClass],
    reader: str,
    tokenizer: PreTrainedTokenizerBase,
    watch: Watch,
) -> list[dict[str, Any]]:
    """The entries of `audit`'s `classes` for models in memory, in float32 on one device; `reader` as for `measure`."""
    measured = []
    for kind in classes:
        say(watch, f"{kind.name}: {kind.what}")
        measured.append((measure(twin, kind.inputs, reader), measure(reference, kind.inputs, reader)))
    inputs = {dtype: _in_half(dtype, twin.device, classes, measured) for dtype in (torch.bfloat16, torch.float16)}
    finite: list[tuple[dict[str, bool], ...]] = [tuple({"float32": m.finite} for m in both) for both in measured]
    for dtype, of_class in inputs.items():
        name = str(dtype).removeprefix("torch.")
        say(watch, f"{name}: {sum(map(_tokens, of_class)):,} tokens of these")
        for side, model in enumerate((twin, reference)):
            copy = cast_as_loaded(deepcopy(model), dtype)
            for flags, some in zip(finite, of_class, strict=True):
                flags[side][name] = is_finite(copy, some, reader)
            del copy
    names = [f"{str(dtype).removeprefix('torch.')}_tokens" for dtype in inputs]
    halves = [dict(zip(names, map(_tokens, of_class), strict=True)) for of_class in zip(*inputs.values(), strict=True)]
    return [_row(*these, tokenizer) for these in zip(classes, measured, finite, halves, strict=True)]


def _tokens(inputs: Sequence[Inputs]) -> int:
    return sum(int(part.read.sum()) for part in inputs)


def _residual_reader(twin: PreTrainedModel, sites: Sequence[NormSite]) -> str:
    """Path of the last reader of the residual stream: the final norm, removed or kept, otherwise the unembedding."""
    final = next((site.name for site in sites if site.role == "final"), None)
    if final is not None:
        return final
    last = unembedding_name(twin)
    kept = set(twin.config.kept_norms or ()) & set(stream_sources(twin, [last]).get(last, ()))
    return min(kept, default=last)


def _in_half(
    dtype: torch.dtype,
    device: torch.device,
    classes: Sequence[InputClass],
    measured: Sequence[tuple[Measured, Measured]],
) -> list[tuple[Inputs, ...]]:
    """What of each class is tried in a half precision."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and computes_bfloat16(device)):
        return [kind.inputs for kind in classes]
    return [
        largest_residuals(kind.inputs, [one.norm for one in both], HALF_CPU_TOKENS)
        for kind, both in zip(classes, measured, strict=True)
    ]


def _row(
    kind: InputClass,
    measured: tuple[Measured, Measured],
    finite: tuple[dict[str, bool], ...],
    halves: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    ours, theirs = measured
    reason = verdict(ours, theirs, finite[0], finite[1])
    return {
        "name": kind.name,
        "what": kind.what,
        "passed": not reason,
        "reason": reason,
        "tokens": len(ours.loss),
        **halves,
        "loss": summarize(ours.loss),
        "reference_loss": summarize(theirs.loss),
        "residual_norm": summarize(ours.norm),
        "reference_residual_norm": summarize(theirs.norm),
        "finite": finite[0],
        "reference_finite": finite[1],
        "worst": _worst(kind.inputs, ours, theirs, tokenizer),
    }


def summarize(values: Float[Tensor, " read"]) -> dict[str, float]:
    """Percentiles (without interpolation) and the largest value; NaN counts as infinite."""
    array = values.nan_to_num(nan=math.inf, posinf=math.inf).numpy()
    found = {f"p{q}": float(np.percentile(array, q, method="inverted_cdf")) for q in PERCENTILES}
    return found | {"largest": float(array.max())}


def verdict(twin: Measured, reference: Measured, finite: dict[str, bool], reference_finite: dict[str, bool]) -> str:
    """Why the twin fails a class; empty if it passes."""
    judged = [name for name in finite if name != "float16" or reference_finite[name]]
    overflowed = [name for name in judged if not finite[name]]
    if overflowed:
        return f"NaN or infinite in {', '.join(overflowed)}"
    ours, theirs = summarize(twin.loss), summarize(reference.loss)
    for key, margin in LIMITS.items():
        value, limit = ours[key], margin * theirs[key]
        if value > limit:
            return f"{key.replace('p99.99', '99.99%')} loss {value:.2f} > {limit:.2f}"
    return ""


def _worst(
    inputs: Sequence[Inputs], ours: Measured, theirs: Measured, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Where the twin's loss exceeds the reference's most: the last tokens of the input and the token that follows."""
    excess = torch.nan_to_num(ours.loss - theirs.loss, nan=0.0, posinf=math.inf)
    places = [(part, *at) for part, some in enumerate(inputs) for at in some.read.nonzero().tolist()]
    rows = []
    for index in excess.topk(min(_WORST, len(excess))).indices.tolist():
        part, row, position = places[index]
        ids = inputs[part].ids[row, max(0, position + 1 - _SHOWN_TOKENS) : position + 1]
        rows.append(
            {
                "text": _decode(ids, tokenizer),
                "next": _decode(inputs[part].targets[row, position : position + 1], tokenizer),
                "tokens": ids.tolist(),
                "position": position,
                "loss": float(ours.loss[index]),
                "reference_loss": float(theirs.loss[index]),
                "residual_norm": float(ours.norm[index]),
                "reference_residual_norm": float(theirs.norm[index]),
            }
        )
    return rows


def _decode(ids: Int[Tensor, " token"], tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokens as text, or as vocabulary entries if they decode to parts of characters only."""
    text = str(tokenizer.decode(ids))
    return text if text.strip("\ufffd") else " ".join(map(str, tokenizer.convert_ids_to_tokens(ids.tolist())))


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
