"""Benchmarks through lm-eval: HellaSwag, LAMBADA and WikiText from local files, and any task that lm-eval has."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from importlib import resources
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.errors import UnnormError, is_out_of_memory, short
from unnorm.evaluation.benchmarks import READERS
from unnorm.evaluation.intervals import Interval, bootstrap_interval, paired_share_interval, share_interval
from unnorm.evaluation.results import Score, perplexity, perplexity_interval
from unnorm.json_text import digest
from unnorm.progress import Watch

LOCAL = "local_"
"""Prefix of the names of the tasks in `tasks/`."""


@dataclass(frozen=True)
class Benchmark:
    """One lm-eval task, ready to run, and its items that are evaluated.

    Attributes:
        name: its name in lm-eval.
        task: lm-eval's task object.
        source: the local file, or `hub`.
        items: indices of the chosen items, in order.
        of: number of items in the whole task.
        seed: seed of the draw.
    """

    name: str
    task: Any
    source: str
    items: tuple[int, ...]
    of: int
    seed: int

    @property
    def requests(self) -> int:
        """Approximate number of sequences that a model scores."""
        doc = self.task.eval_docs[self.items[0]]
        choices = len(self.task.doc_to_choice(doc)) if self.task.OUTPUT_TYPE == "multiple_choice" else 1
        return choices * len(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the chosen items' contents."""
        docs = self.task.eval_docs  # Once: lm-eval processes the whole set anew at each access.
        return digest([docs[item] for item in self.items])

    def protocol(self) -> dict[str, Any]:
        """What was run, as plain values."""
        return {
            "task": self.name,
            "source": self.source,
            "items": len(self.items),
            "of": self.of,
            "seed": self.seed if len(self.items) < self.of else None,
            "items_sha256": self.fingerprint,
            "fewshot": int(self.task.config.num_fewshot or 0),
            "harness": f"lm-eval {version('lm_eval')}",
        }


def open_benchmarks(
    names: Sequence[str], files: dict[str, str], most: int | None, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[Benchmark]:
    """Load tasks, from local files where given, otherwise from the hub.

    Args:
        names: lm-eval's task names; a group stands for all of its tasks.
        files: local files keyed by benchmark name.
        most: maximum number of items of each, drawn at random; None for all.
        seed: seed of that draw.
        tokenizer: that of the models.

    Raises:
        UnnormError: lm-eval is not installed, has no such task or can't use this tokenizer, or a task's data can't be
            read.
    """
    if not names:
        return []
    if find_spec("lm_eval") is None:
        raise UnnormError(
            f"The benchmarks ({', '.join(names)}) need lm-eval. Install it with: pip install 'unnorm[eval]', "
            "or leave them out with --tasks none."
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UnnormError(
            f"The benchmarks ({', '.join(names)}) need a tokenizer with a beginning-of-text or end-of-text token, "
            "which lm-eval puts before text that has no context. Leave them out with --tasks none."
        )
    for name in files:
        READERS[name](**{name: files[name]})  # Refuses a bad file with its own message, not deep inside lm-eval.
    with _quiet():
        tasks = {name: task for asked in names for name, task in _load(asked, files).items()}
        for task in tasks.values():
            _let_perplexities_be_infinite(task)
        sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    return [
        Benchmark(name, task, files.get(name, "hub"), _draw(sizes[name], most, seed), sizes[name], seed)
        for name, task in tasks.items()
    ]


def run_benchmark(
    benchmark: Benchmark,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    context: int,
    batch_size: int = 4,
    watch: Watch | None = None,
) -> list[Score]:
    """Every metric of one benchmark, as lm-eval computes it.

    Args:
        benchmark: what to run.
        model: in evaluation mode.
        tokenizer: its tokenizer.
        name: the model's name in the scores.
        context: maximum sequence length; longer requests are truncated from the left.
        batch_size: sequences per forward pass.
        watch: called with `{"kind": "progress", "tokens": requests so far}`.

    Raises:
        UnnormError: the benchmark can't be run with this model.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    try:
        with _quiet():
            lm = _language_model(model, tokenizer, context, batch_size, watch)
            results = simple_evaluate(
                model=lm,
                tasks=[benchmark.task],
                samples={benchmark.task.task_name: list(benchmark.items)},
                bootstrap_iters=0,
                log_samples=True,
                task_manager=TaskManager(include_defaults=False),  # It is loaded; indexing all others takes seconds.
            )
    except Exception as error:
        if isinstance(error, UnnormError) or is_out_of_memory(error):
            raise
        raise UnnormError(f"lm-eval could not run '{benchmark.name}' on '{name}': {short(error)}") from error
    return _scores(benchmark, results, name, lm.truncated)


def _scores(benchmark: Benchmark, results: dict[str, Any], name: str, truncated: int) -> list[Score]:
    """Each metric that lm-eval reports, with its interval."""
    task = benchmark.task.task_name
    found = results["results"][task]
    better = results.get("higher_is_better", {}).get(task, {})
    filters = {row["filter"] for row in results["samples"][task]}
    scores = []
    for key, value in found.items():
        metric, _, of_filter = key.partition(",")
        if not of_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        samples = [row for row in results["samples"][task] if row["filter"] == of_filter]
        values = {int(row["doc_id"]): row[metric] for row in samples if metric in row}
        ci, single = _interval(values, float(value))
        scores.append(
            Score(
                model=name,
                task=benchmark.name,
                metric=metric if len(filters) == 1 else f"{metric}, {of_filter}",
                value=float(value),
                ci=ci,
                items=len(benchmark.items),
                of=benchmark.of,
                higher_is_better=better.get(metric),
                truncated=truncated,
                item_values=single,
            )
        )
    return scores


def with_difference(score: Score, original: Score) -> Score:
    """The score with its paired difference from the original's score.

    The interval is None where either has no per-item values.

    Raises:
        UnnormError: they share no item.
    """
    if not score.item_values or not original.item_values:
        return replace(score, difference=score.value - original.value)
    shared = sorted(score.item_values.keys() & original.item_values.keys())
    if not shared:
        raise UnnormError(
            f"'{score.model}' and '{original.model}' have no item of '{score.task}' in common, so there is no "
            "difference to compute. Evaluate both again, with the same --items and --seed."
        )
    changes = [score.item_values[i] - original.item_values[i] for i in shared]
    shares = {*score.item_values.values(), *original.item_values.values()} <= {0.0, 1.0}
    found = paired_share_interval if shares else bootstrap_interval
    return replace(score, difference=float(np.mean(changes)), difference_ci=found(changes))


def _draw(of: int, most: int | None, seed: int) -> tuple[int, ...]:
    if most is None or most >= of:
        return tuple(range(of))
    return tuple(sorted(np.random.default_rng(seed).choice(of, most, replace=False).tolist()))


def _load(name: str, files: dict[str, str]) -> dict[str, Any]:
    """lm-eval's tasks for one name, keyed by the displayed name."""
    from lm_eval.tasks import TaskManager

    if name in files:
        where = resources.files("unnorm.evaluation") / "tasks"
        manager = TaskManager(include_path=str(where), include_defaults=False, metadata={name: files[name]})
        return {name: manager.load(LOCAL + name)["tasks"][LOCAL + name]}
    manager = _all_tasks()
    if name not in manager.all_tasks:
        raise UnnormError(
            f"lm-eval has no task '{name}'. `lm_eval ls tasks` lists its tasks; --tasks takes several, separated by "
            "commas."
        )
    try:
        return dict(manager.load(name)["tasks"])
    except Exception as error:
        local = f"give its file with --data {name}=PATH, or " if name in READERS else ""
        raise UnnormError(
            f"The data of the benchmark '{name}' can't be fetched from the hub ({short(error).rstrip('.')}). Go "
            f"online, {local}leave benchmarks out with --tasks none."
        ) from error


def _let_perplexities_be_infinite(task: Any) -> None:
    """Replace lm-eval's perplexities, which raise OverflowError for a model that went astray, in the task's table."""
    aggregations = task.aggregation()
    for metric, aggregate in aggregations.items():
        if metric.endswith("perplexity"):
            aggregations[metric] = partial(_or_infinite, aggregate)


def _or_infinite(aggregate: Callable[[Any], float], values: Any) -> float:
    try:
        return aggregate(values)
    except OverflowError:
        return math.inf


@lru_cache(maxsize=1)
def _all_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's warnings about choices made on purpose here; truncated requests, which matter, are counted."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, get_git_commit_hash = logger.level, evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # It calls git, which complains outside a repository.
    try:
        yield
    finally:
        logger.setLevel(level)
        evaluator.get_git_commit_hash = get_git_commit_hash


def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int, batch_size: int, watch: Watch | None
) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        """lm-eval's own model wrapper, which also counts truncated requests and reports progress."""

        truncated = 0
        seen = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            longest = max(len(continuation) for _, _, continuation in requests)
            if longest > context:
                raise UnnormError(
                    f"A continuation of {longest} tokens is longer than the context of {context}. "
                    "Leave this benchmark out for this model (--tasks)."
                )
            self.truncated += sum(len(start or []) + len(rest) > context + 1 for _, start, rest in requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: Any = None, **kwargs: Any) -> Any:
            """Count the truncated prompts of generation tasks."""
            if left_truncate_len:
                self.truncated += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
            return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self.seen += len(inps)
            if watch is not None:
                watch({"kind": "progress", "tokens": self.seen})
            return logits

    return Watched(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=context, dtype=None
    )


def _interval(values: dict[int, Any], reported: float) -> tuple[Interval | None, dict[int, float]]:
    """95% interval of a metric from its per-item values, and those values if the metric is their mean.

    lm-eval's aggregation is inferred: it is the one that reproduces the number that lm-eval reports.
    """
    rows = list(values.values())
    if not rows:
        return None, {}
    if all(isinstance(row, int | float) for row in rows):
        mean = float(np.mean(rows))
        if math.isclose(mean, reported, rel_tol=1e-9, abs_tol=1e-12):
            single = {item: float(value) for item, value in values.items()}
            shares = set(single.values()) <= {0.0, 1.0}
            return share_interval(sum(rows), len(rows)) if shares else bootstrap_interval(rows), single
        if _same(perplexity(-mean), reported):
            found = bootstrap_interval([-row for row in rows])
            return found and perplexity_interval(found), {}
    elif all(isinstance(row, tuple | list) and [*map(_is_number, row)] == [True, True] for row in rows):
        sums, weights = np.array([(-total, weight) for total, weight in rows], dtype=np.float64).T
        if not (weights > 0).all():  # Other pairs, e.g. a class and its prediction.
            return None, {}
        mean = float(sums.sum() / weights.sum())
        found = bootstrap_interval(sums, weights)
        if _same(perplexity(mean), reported):
            return found and perplexity_interval(found), {}
        if _same(mean / math.log(2), reported):
            return found and (found[0] / math.log(2), found[1] / math.log(2)), {}
    return None, {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)
