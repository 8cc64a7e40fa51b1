"""`unnorm evaluate`: models side by side on corpora and benchmarks, one measurement at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unnorm.data import STDLIB
from unnorm.errors import RunInterruptedError, UnnormError, explained
from unnorm.evaluation.corpora import Corpus, NothingLeftError, open_corpus
from unnorm.evaluation.harness import Benchmark, open_benchmarks, run_benchmark, with_difference
from unnorm.evaluation.intervals import LEVEL, RESAMPLES
from unnorm.evaluation.metrics import measure_tokens
from unnorm.evaluation.record import Record
from unnorm.evaluation.results import Evaluation, Results, Score
from unnorm.evaluation.session import LoadedModel, Session, enter, settings_of
from unnorm.evaluation.suites import PILE_FILTERED, SUITES, Choice, choose
from unnorm.evaluation.summary import summarize
from unnorm.isolation import isolated
from unnorm.models.device import choose_device
from unnorm.models.load import model_name
from unnorm.paths import short_name
from unnorm.progress import Watch, say, silent
from unnorm.runs.config import check_seed, read_count
from unnorm.runs.text import TextSource, choose_text
from unnorm.versions import versions


@isolated
def evaluate(
    models: str | Path | Sequence[str | Path],
    against: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    *,
    suite: str | None = None,
    tasks: str | Sequence[str] | None = None,
    text_field: str | None = None,
    split: str | None = None,
    tokens: int | str | None = None,
    items: int | str | None = None,
    context: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> Results:
    """Evaluate models, LN-free or not, side by side; `unnorm evaluate`.

    Args:
        models: run directories, model directories, hub ids or `demo`.
        against: the original, relative to which fidelity and differences are measured; by default the one original
            that the finished runs among the models share. Without one, or if that default can't be loaded, these
            measurements are left out.
        data: corpora, each as for `remove` or `NAME=SOURCE`, or a mapping of names to sources. The held-out part is
            used; `hellaswag=FILE`, `lambada=FILE` and `wikitext=FILE` give a benchmark's items. By default the suite's
            corpora; if it has none, the text of the first finished run among the models, otherwise the standard
            library.
        suite: `quick`, `full` or `paper`: a choice of corpora, benchmarks and their sizes.
        tasks: further lm-eval tasks; `none` leaves the suite's out.
        text_field: column that holds the text; by default the run's, if the run's text is used.
        split: split that the text comes from, if the source has no validation split; same default.
        tokens: number of tokens of each corpus at most, rounded up to whole blocks.
        items: number of items of each benchmark at most, drawn at random, or `all`.
        context: tokens per block; by default the longest that all models take and that runs among them were trained
            with, at most 1024.
        batch_size: blocks per forward pass.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: seed of the draw of benchmark items.
        out: directory for the measurements (each written as it is made), the results and a page; measurements that
            it already holds are not repeated.
        trust_remote_code: run modeling code that comes with a model.
        watch: called with `{"kind": "phase", "text": …}` and `{"kind": "progress", "tokens": …}`.

    Returns:
        A sequence of `Evaluation`, one per model and corpus, which also holds the original's own, the benchmark
        `scores` and the `protocol`.

    Raises:
        UnnormError: a model, a corpus or a benchmark can't be used, the models' tokenizers differ, there is no such
            suite, a number is out of range, or `out` holds something else.
        RunInterruptedError: it was interrupted; the same call resumes from what is in `out`.
    """
    several = models if isinstance(models, Iterable) and not isinstance(models, str) else [models]
    names = [model_name(model) for model in several]
    against = None if against is None else model_name(against)
    place = choose_device(device)
    seed = check_seed(seed)
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise UnnormError(f"--batch-size {batch_size}: a pass takes at least 1 block.")
    if isinstance(data, Mapping):
        data = [f"{name}={source}" for name, source in data.items()]
    given = [data] if isinstance(data, str | Path) else [] if data is None else data
    sources = [str(each) for each in given]
    most = None if tokens is None else read_count(tokens)
    choice = choose(suite, sources, [tasks] if isinstance(tasks, str) else tasks, most, items, place)
    choice, settings, is_own = _with_own_text(choice, names, sources)
    watch = watch or silent
    record = Record.open(out)
    entered = enter(names, against, context, trust_remote_code, watch)
    texts = {
        name: choose_text(settings, source, text_field, split)._replace(is_own=is_own)
        for name, source in choice.corpora.items()
    }
    corpora, left_out = _open_corpora(
        texts, choice.tokens, entered.tokenizer, entered.vocab_size, entered.context, watch
    )
    session = Session(
        entrants=entered.entrants,
        original=entered.original,
        tokenizer=entered.tokenizer,
        corpora=corpora,
        left_out=left_out,
        benchmarks=tuple(open_benchmarks(choice.tasks, choice.files, choice.items, seed, entered.tokenizer)),
        context=entered.context,
        batch_size=batch_size,
        device=place,
        trust_remote_code=trust_remote_code,
        record=record,
        watch=watch,
    )
    try:
        results = _measure(session, suite)
    except KeyboardInterrupt as stop:
        if record.directory is None:
            raise
        raise RunInterruptedError(
            f"Stopped; all measurements so far are in '{record.directory}'. Resume with the same command."
        ) from stop
    record.conclude(results)
    return results


def _with_own_text(choice: Choice, names: Sequence[str], sources: Sequence[str]) -> tuple[Choice, dict[str, Any], bool]:
    """The choice, with the run's text if none was named; the run's settings; and whether the text is the run's."""
    named = {source.rpartition("=")[2] for source in sources}
    is_unnamed = choice.corpora == {STDLIB: STDLIB} and STDLIB not in named
    settings: dict[str, Any] = {}
    try:
        settings = next(filter(None, map(settings_of, names)), {})
    except UnnormError:  # Unreadable settings matter only where the text is theirs.
        if is_unnamed:
            raise
    if not (is_unnamed and settings):
        return choice, settings, False
    own = choose_text(settings).data
    return replace(choice, corpora={short_name(own): own}), settings, True


def _open_corpora(
    texts: Mapping[str, TextSource],
    tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int,
    watch: Watch,
) -> tuple[tuple[Corpus, ...], tuple[str, ...]]:
    """The corpora, and why one that a suite filters was left out."""
    opened, left_out = [], []
    for name, text in texts.items():
        say(watch, f"reading {text.data}")
        of = texts.get("openwebtext") if name == PILE_FILTERED else None
        its_own = any(suite.corpora.get(name) == text.data for suite in SUITES.values())
        with explained(its_own, "", f"Or give other text for this corpus of the suite: --data {name}=SOURCE."):
            try:
                opened.append(open_corpus(name, text, tokenizer, vocab_size, context, tokens, of))
            except NothingLeftError as error:
                left_out.append(str(error))
                say(watch, left_out[-1])
    return tuple(opened), tuple(left_out)


def _measure(session: Session, suite: str | None) -> Results:
    evaluations: list[Evaluation] = []
    of_original: dict[str, Evaluation] = {}
    scores: list[Score] = []
    original = None if session.original is None else LoadedModel(session, session.original)
    original_scores = {} if original is None else _scores(session, original)
    for entrant in session.entrants:
        same = original is not None and entrant == original.entrant
        model = original if original is not None and same else LoadedModel(session, entrant)
        for corpus in session.corpora:
            mine, theirs = _evaluate(session, model, original, corpus)
            evaluations.append(mine)
            if theirs is not None:
                of_original.setdefault(corpus.name, theirs)
        for benchmark, found in (original_scores if same else _scores(session, model)).items():
            base = {} if same else {score.metric: score for score in original_scores.get(benchmark, [])}
            scores += [with_difference(score, base[score.metric]) if score.metric in base else score for score in found]
    if original is not None and original.entrant not in session.entrants:
        scores = [score for found in original_scores.values() for score in found] + scores
    return Results(tuple(evaluations), tuple(of_original.values()), tuple(scores), _protocol(session, suite))


def _evaluate(
    session: Session, model: LoadedModel, original: LoadedModel | None, corpus: Corpus
) -> tuple[Evaluation, Evaluation | None]:
    """Evaluate a model, and the original if there is one, on a corpus."""

    def measure() -> list[Evaluation]:
        session.say(f"{model.entrant.name} on {corpus.name}", len(corpus.blocks) * corpus.context)
        reference = None if original is None else original.model
        found = measure_tokens(model.model, corpus.blocks, reference, session.batch_size, session.watch)
        ours, theirs, distances = found
        rows = [summarize(model.entrant.name, corpus, ours, theirs, distances, session.tokenizer)]
        if original is not None and theirs is not None:
            rows.append(summarize(original.entrant.name, corpus, theirs, None, None, session.tokenizer))
        return rows

    key = {
        **model.on(corpus.name),
        "original": None if original is None else asdict(original.entrant),
        **{name: value for name, value in corpus.protocol().items() if name != "corpus"},
    }
    rows = session.record.recall(list[Evaluation], key, measure)
    return rows[0], rows[1] if len(rows) > 1 else None


def _scores(session: Session, model: LoadedModel) -> dict[str, list[Score]]:
    """A model's scores, keyed by benchmark."""

    def measure(benchmark: Benchmark) -> list[Score]:
        session.say(f"{model.entrant.name} on {benchmark.name}", benchmark.requests)
        return run_benchmark(
            benchmark,
            model.model,
            session.tokenizer,
            model.entrant.name,
            session.context,
            session.batch_size,
            session.watch,
        )

    return {
        benchmark.name: session.record.recall(
            list[Score],
            {
                **model.on(benchmark.name),
                "context": session.context,
                "chosen": list(benchmark.items),
                "tokenizer": session.tokenizer_digest,
                **benchmark.protocol(),
            },
            partial(measure, benchmark),
        )
        for benchmark in session.benchmarks
    }


def _protocol(session: Session, suite: str | None) -> dict[str, Any]:
    return {
        "suite": suite,
        "models": {entrant.name: entrant.weights for entrant in session.entrants},
        "original": None if session.original is None else {session.original.name: session.original.weights},
        "corpora": [corpus.protocol() for corpus in session.corpora],
        "left_out": list(session.left_out),
        "tasks": [benchmark.protocol() for benchmark in session.benchmarks],
        "context": session.context,
        "interval": f"{LEVEL:.0%}, studentized bootstrap over units, {RESAMPLES} resamples, seed 0; "
        "of shares of benchmark items Wilson's, of their differences Agresti and Min's; differences are paired",
        "dtype": "float32",
        "device": session.device,
        "versions": versions(),
    }
