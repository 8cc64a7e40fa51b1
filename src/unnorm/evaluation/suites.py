"""What to evaluate on: named suites, and what the user names with --data and --tasks."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from unnorm.data import STDLIB
from unnorm.errors import UnnormError
from unnorm.evaluation.benchmarks import ALIASES, READERS
from unnorm.evaluation.corpora import EVALUATION_TOKENS

PILE_FILTERED = "pile-filtered"
"""Blocks of the corpus `pile` all of whose tokens occur in `openwebtext`."""


@dataclass(frozen=True)
class Suite:
    """A named choice of corpora and benchmarks.

    Attributes:
        corpora: sources keyed by name; empty means what the user names, or the default.
        tasks: lm-eval's names of benchmarks.
        tokens: approximate number of predicted tokens of each corpus, on a CPU.
        gpu_tokens: the same on a GPU.
        items: items of each benchmark on a CPU, drawn at random; None means all.
        gpu_items: the same on a GPU.
    """

    corpora: dict[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    tokens: int = EVALUATION_TOKENS
    gpu_tokens: int = EVALUATION_TOKENS
    items: int | None = None
    gpu_items: int | None = None


SUITES = {
    "quick": Suite(tasks=("hellaswag", "lambada_openai"), tokens=8_192, gpu_tokens=65_536, items=50, gpu_items=500),
    "full": Suite(tasks=("hellaswag", "lambada_openai", "wikitext"), tokens=200_000, gpu_tokens=2_000_000, items=1000),
    "paper": Suite(
        corpora={
            "openwebtext": "Skylion007/openwebtext",
            "pile": "monology/pile-uncopyrighted",
            PILE_FILTERED: "monology/pile-uncopyrighted",
        },
        tasks=("hellaswag",),
        tokens=200_000,
        gpu_tokens=10_000_000,
        items=1000,
    ),
}


@dataclass(frozen=True)
class Choice:
    """Corpora and benchmarks of one evaluation.

    Attributes:
        corpora: sources keyed by name.
        tasks: lm-eval's names of benchmarks.
        files: local files keyed by benchmark name.
        tokens: approximate number of predicted tokens of each corpus.
        items: items of each benchmark, or None for all.
    """

    corpora: dict[str, str]
    tasks: tuple[str, ...]
    files: dict[str, str]
    tokens: int
    items: int | None


def choose(
    suite: str | None,
    data: str | Sequence[str] | None,
    tasks: Sequence[str] | None,
    tokens: int | None,
    items: int | str | None,
    device: str,
) -> Choice:
    """Combine a suite with what the user asked for.

    Args:
        suite: name of a suite, or None.
        data: sources, `NAME=SOURCE` or plain; with the name of a benchmark, its file.
        tasks: more benchmarks; `none` leaves the suite's out.
        tokens: predicted tokens of each corpus; by default the suite's.
        items: items of each benchmark, or `all`; by default the suite's.
        device: `cpu`, or another for the suite's GPU sizes.

    Raises:
        UnnormError: there is no such suite, `data` gives a name twice, or a number is out of range.
    """
    if suite is not None and suite not in SUITES:
        raise UnnormError(f"There is no suite '{suite}'. Choose from {', '.join(SUITES)}.")
    if tokens is not None and tokens < 1:
        raise UnnormError(f"--tokens {tokens}: give at least 1.")
    chosen = SUITES[suite] if suite is not None else Suite()
    on_cpu = device == "cpu"
    sources = _sources([data] if isinstance(data, str) else data or [])
    files = {name: source for name, source in sources.items() if name in READERS}
    corpora = {name: source for name, source in sources.items() if name not in READERS}
    asked = [name.strip() for part in tasks or () for name in part.split(",")]
    named = [ALIASES.get(name, name) for name in asked if name]
    run = [] if "none" in named else list(chosen.tasks)
    run += [name for name in (*named, *files) if name != "none"]
    only_benchmarks = suite is None and run and not corpora
    return Choice(
        corpora={} if only_benchmarks else _corpora(chosen, corpora),
        tasks=tuple(dict.fromkeys(run)),
        files=files,
        tokens=tokens if tokens is not None else chosen.tokens if on_cpu else chosen.gpu_tokens,
        items=_items(items, chosen.items if on_cpu else chosen.gpu_items),
    )


def _sources(data: Sequence[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for given in data:
        name, source = _named(given)
        if name in sources:
            raise UnnormError(f"--data names '{name}' twice. Give each its own name: NAME=SOURCE.")
        sources[name] = source
    return sources


def _named(given: str) -> tuple[str, str]:
    match = re.fullmatch(r"([\w.-]+)=(.+)", given)
    if match is None or os.path.exists(given):  # noqa: PTH110 (pathlib raises if a name is too long)
        return given, given
    return ALIASES.get(match[1], match[1]), match[2]


def _corpora(suite: Suite, named: dict[str, str]) -> dict[str, str]:
    """The suite's corpora, with sources overridden by the user's, then the user's own corpora."""
    if not suite.corpora:
        return named or {STDLIB: STDLIB}
    of_suite = {name: named.get(name, source) for name, source in suite.corpora.items()}
    if PILE_FILTERED in of_suite and PILE_FILTERED not in named:
        of_suite[PILE_FILTERED] = of_suite["pile"]
    return of_suite | named


def _items(asked: int | str | None, default: int | None) -> int | None:
    if asked is None:
        return default
    if asked == "all":
        return None
    try:
        count = int(asked)
    except (ValueError, TypeError):
        count = 0
    if count < 1:
        raise UnnormError(f"--items {asked}: give a number of benchmark items (at least 1) or 'all'.")
    return count
