"""`unnorm analyze`: how norms affect interpretability analyses, shown on the original and its twin side by side."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.analysis import attribution, geometry, lens, neurons, patching, scales, sinks
from unnorm.analysis.material import Finding, Material
from unnorm.analysis.page import Skipped, render_analysis
from unnorm.analysis.prompts import PromptPair, indirect_object_prompts, read_prompts
from unnorm.data import OVERSAMPLING, evenly_spaced
from unnorm.errors import UnnormError, first_few
from unnorm.isolation import isolated
from unnorm.json_text import finite, json_text
from unnorm.modeling.modeling_unnorm import PREFIX
from unnorm.models.device import choose_device
from unnorm.models.sizes import choose_context, context_length, vocabulary_size
from unnorm.paths import check_can_be_made, named_path, write_text
from unnorm.progress import Watch, say, silent
from unnorm.report.numbers import count, duration
from unnorm.runs.config import check_seed, read_count, trained_context
from unnorm.runs.pair import Pair, open_pair
from unnorm.runs.text import TextSource, choose_text
from unnorm.sites.site import NormSite

ANALYSES: dict[str, Callable[[Material], Finding]] = {
    "attribution": attribution.find,
    "patching": patching.find,
    "sinks": sinks.find,
    "neurons": neurons.find,
    "lens": lens.find,
    "scales": scales.find,
    "geometry": geometry.find,
}
PAGE, NUMBERS = "analysis.html", "analysis.json"
TOKENS, PROMPTS = 4096, 64
"""Default number of held-out tokens to analyze, and number of generated prompt pairs."""
MOST_CONTEXT = 256
"""Default limit on the block length: attention weights of all pairs of positions are kept in memory."""


@isolated
def analyze(
    directory: str | Path,
    against: str | Path | None = None,
    *,
    what: str | Sequence[str] | None = None,
    data: str | Path | None = None,
    prompts: str | Path | None = None,
    out: str | Path | None = None,
    tokens: int | str = TOKENS,
    context: int | None = None,
    text_field: str | None = None,
    split: str | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Analyze a twin and its original side by side and write `analysis.html` and `analysis.json` (`unnorm analyze`).

    Args:
        directory: a finished run.
        against: the model with norms; by default the run's original.
        what: which of attribution, patching, sinks, neurons, lens, scales and geometry; by default all that these
            models allow.
        data: text, of which the held-out part is used; by default the run's.
        prompts: JSONL file of prompt pairs to patch between; by default generated indirect-object prompts.
        out: directory to write; by default `analysis` in the run directory. Earlier results in it are replaced.
        tokens: number of text tokens, rounded up to whole blocks; fewer if the text is shorter.
        context: tokens in a block; by default the longest that both models take and that the run was trained with, at
            most 256.
        text_field: column that holds the text; by default the run's.
        split: split that the text comes from; by default the run's.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: seed for the generated prompts.
        trust_remote_code: run modeling code that comes with the original.
        watch: called with `{"kind": "phase", "text": …}` at each phase.

    Returns:
        The contents of `analysis.json`: settings, `findings` by name, `skipped` with reasons, and the paths `page`
        and `numbers`.

    Raises:
        UnnormError: there is no finished run, the twin can't have come from the original, the text or the prompts
            can't be used, an analysis is unknown, or one that was named can't be run on these models.
    """
    watch = watch or silent
    started = time.perf_counter()
    directory = named_path(directory)
    seed = check_seed(seed)
    what = [what] if isinstance(what, str) else list(what or ())
    names = _chosen(what)
    tokens = read_count(tokens)
    place = choose_device(device)
    out = directory / "analysis" if out is None else named_path(out)
    check_can_be_made(out)
    pair = open_pair(directory, against, False, place, trust_remote_code, watch)
    _check_pair(pair.reference, pair.twin, pair.sites, pair.name)
    prompt_pairs = _prompts(prompts, pair, seed)
    text = choose_text(pair.settings, data, text_field, split)
    longest = min(MOST_CONTEXT, trained_context(directory) or MOST_CONTEXT)
    blocks = _blocks(text, (pair.reference, pair.twin), pair.tokenizer, tokens, context, longest)
    material = Material(pair.reference, pair.twin, pair.tokenizer, blocks, prompt_pairs, pair.sites, pair.constants)
    findings, skipped = _find(names, material, bool(what), watch)
    result = {
        "directory": str(directory),
        "original": pair.name,
        "data": text.data,
        "tokens": len(blocks) * len(blocks[0]["input_ids"]),
        "context": len(blocks[0]["input_ids"]),
        "prompts": _said_of(prompts, prompt_pairs),
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "findings": {finding.key: finite(finding.numbers) for finding in findings},
        "skipped": {row.key: row.reason for row in skipped},
        "page": str(out / PAGE),
        "numbers": str(out / NUMBERS),
    }
    kept = pair.twin.config.kept_norms or ()
    _write(out, result, render_analysis(pair.name, findings, skipped, _settings(result), kept))
    return result


def _find(names: Sequence[str], material: Material, must: bool, watch: Watch) -> tuple[list[Finding], list[Skipped]]:
    """Findings, and the analyses that these models do not allow; if `must`, such an analysis raises instead."""
    findings, skipped = [], []
    for key in names:
        say(watch, f"analyzing {key}")
        try:
            findings.append(ANALYSES[key](material))
        except UnnormError as error:
            if must:
                raise
            skipped.append(Skipped(key, str(error)))
    return findings, skipped


def _said_of(prompts: str | Path | None, pairs: Sequence[PromptPair] | str) -> str:
    if prompts:
        return str(prompts)
    return "none" if isinstance(pairs, str) else f"{len(pairs)} generated"


def _chosen(what: Sequence[str] | None) -> list[str]:
    unknown = [key for key in what or () if key not in ANALYSES]
    if unknown:
        raise UnnormError(f"There is no analysis '{unknown[0]}'. Choose from {', '.join(ANALYSES)}.")
    return [key for key in ANALYSES if not what or key in what]


def _check_pair(original: PreTrainedModel, twin: PreTrainedModel, sites: Sequence[NormSite], name: str) -> None:
    """Raise an UnnormError if the twin can't have come from the original."""
    kind = type(twin).__name__.removeprefix(PREFIX)
    if type(original).__name__ != kind:
        raise UnnormError(
            f"'{name}' is a {type(original).__name__}, but the twin was a {kind}. With --against, name the model that "
            "the twin was made from."
        )
    norms = tuple(f"{site.name}." for site in sites)
    shapes = [{k: v.shape for k, v in m.state_dict().items() if not k.startswith(norms)} for m in (original, twin)]
    for added in twin.config.added_biases or ():
        shapes[1].pop(f"{added}.bias", None)
    for limited in twin.config.limited_neurons or ():
        shapes[1].pop(f"{limited}.limit", None)
    modules = {key for key, _ in original.named_modules()}
    differ = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    differ += [key for site in sites for key in (site.name, *site.readers, *site.writers) if key not in modules]
    if differ:
        raise UnnormError(
            f"'{name}' and the twin are built differently: they differ in {first_few(differ)}. With --against, name "
            "the model that the twin was made from."
        )


def _prompts(path: str | Path | None, pair: Pair, seed: int) -> Sequence[PromptPair] | str:
    if path is not None:
        longest = min(context_length(model) for model in (pair.reference, pair.twin))
        return read_prompts(named_path(path), pair.tokenizer, longest)
    try:
        return indirect_object_prompts(pair.tokenizer, PROMPTS, seed)
    except UnnormError as error:
        return str(error)


def _blocks(
    text: TextSource,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    context: int | None,
    longest: int,
) -> Dataset:
    if tokens < 2:
        raise UnnormError(f"--tokens {tokens}: at least 2 tokens are needed to predict one.")
    length = choose_context(context, *models)
    length = min(length, longest) if context is None else length
    blocks = max(1, math.ceil(tokens / length))
    found, _ = text.held_out(tokenizer, vocabulary_size(models[0]), length, OVERSAMPLING * blocks)
    return evenly_spaced(found, blocks)


def _settings(result: dict[str, Any]) -> dict[str, str]:
    return {
        "original": result["original"],
        "twin": result["directory"],
        "held-out text": result["data"],
        "tokens": f"{count(result['tokens'])} in blocks of {count(result['context'])}",
        "prompts": result["prompts"],
        "seed": str(result["seed"]),
        "time": duration(result["seconds"]),
    }


def _write(out: Path, result: dict[str, Any], page: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnnormError(f"Could not write '{out}': {error}. Give another --out.") from error
    write_text(out / PAGE, page)
    write_text(out / NUMBERS, json_text(result))
