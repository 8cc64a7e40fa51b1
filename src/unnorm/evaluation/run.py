"""`unnorm evaluate`: models side by side on corpora and benchmarks, one measurement after the other."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Int
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.config import read_count, run_settings
from unnorm.data import STDLIB
from unnorm.errors import RunInterruptedError, UnnormError
from unnorm.evaluation.comparison import compare_tokens
from unnorm.evaluation.corpora import Corpus, count_bytes, documents_of, open_corpus
from unnorm.evaluation.harness import Benchmark, open_benchmarks, run_benchmark, with_difference
from unnorm.evaluation.intervals import LEVEL, RESAMPLES, bootstrap_interval
from unnorm.evaluation.metrics import Distances, ModelTokens, calibration, measure_tokens
from unnorm.evaluation.record import Record
from unnorm.evaluation.results import Evaluation, Results, Score
from unnorm.evaluation.suites import PILE_FILTERED, Choice, choose
from unnorm.isolation import isolated
from unnorm.json_text import digest
from unnorm.models import DEMO, check_same_tokenizer, load_original, model_name
from unnorm.plan import choose_context, choose_device
from unnorm.progress import Watch, say, silent
from unnorm.run_directory import MODEL, named_path, short_name
from unnorm.run_text import blaming_the_run, choose_text
from unnorm.running import vocabulary_size


@dataclass(frozen=True)
class _Entrant:
    """One model that takes part, with digests of its weights and its config; it is loaded when its turn comes."""

    name: str
    weights: str
    config: str


@dataclass(frozen=True)
class _Session:
    """What all measurements of one evaluation share."""

    entrants: tuple[_Entrant, ...]
    original: _Entrant | None
    tokenizer: PreTrainedTokenizerBase
    corpora: tuple[Corpus, ...]
    benchmarks: tuple[Benchmark, ...]
    context: int
    batch_size: int
    device: str
    trust_remote_code: bool
    record: Record
    watch: Watch

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of what makes tokens of text: also how it is cut before a vocabulary is looked up."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return digest({"backend": backend.to_str() if backend is not None else self.tokenizer.get_vocab()})

    @property
    def computed_by(self) -> dict[str, str]:
        """What else numbers hang on, in their last digits."""
        return {"device": self.device, "torch": version("torch"), "unnorm": version("unnorm")}

    def say(self, text: str, tokens: int | None = None) -> None:
        say(self.watch, text, tokens)


@isolated
def evaluate(
    models: str | Path | Sequence[str | Path],
    against: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
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
        against: the original that fidelity and differences are measured to; None leaves them out.
        data: corpora, each as for `remove` or `NAME=SOURCE`, of which the held-out part is used; `hellaswag=FILE`,
            `lambada=FILE` and `wikitext=FILE` give a benchmark's items. By default the suite's corpora; where it has
            none the text of the first finished run among the models, else the standard library.
        suite: `quick`, `full` or `paper`: a choice of corpora, benchmarks and their sizes.
        tasks: further lm-eval tasks; `none` leaves the suite's out.
        text_field: column that holds the text; by default the run's, where its text is taken.
        split: split that the text comes from, where the source names no validation split; likewise.
        tokens: how many of each corpus at most.
        items: items of each benchmark at most, drawn at random, or `all`.
        context: tokens in a block; by default the longest that all models take, at most 1024.
        batch_size: blocks in one forward pass.
        device: `auto`, `cpu`, `cuda` or `mps`.
        seed: of the draw of benchmark items.
        out: directory for every measurement as it is made, the results and a page; what it holds already is not
            measured again.
        trust_remote_code: run modeling code that comes with a model.
        watch: called with `{"kind": "phase", "text": …}` and `{"kind": "progress", "tokens": …}`.

    Returns:
        A sequence of `Evaluation`, each model on each corpus; with it the original's own, the benchmarks' `scores`
        and the `protocol`.

    Raises:
        UnnormError: a model, a corpus or a benchmark can't be used, the models' tokenizers differ, there is no such
            suite, a number is out of range, or `out` holds something else.
        RunInterruptedError: it was stopped, and the same call goes on with what is in `out`.
    """
    several = models if isinstance(models, Iterable) and not isinstance(models, str) else [models]
    names = [model_name(model) for model in several]
    against = None if against is None else model_name(against)
    place = choose_device(device)
    if batch_size < 1:
        raise UnnormError(f"--batch-size {batch_size}: a pass takes 1 block at least.")
    sources = [str(data)] if isinstance(data, str | Path) else [str(each) for each in data or ()]
    most = None if tokens is None else read_count(tokens)
    choice = choose(suite, sources, [tasks] if isinstance(tasks, str) else tasks, most, items, place)
    named = {source.rpartition("=")[2] for source in sources}
    settings: dict[str, Any] = {}
    if choice.corpora == {STDLIB: STDLIB} and STDLIB not in named:  # No text was.
        settings = next(filter(None, map(_settings_of, names)), {})
        own = choose_text(settings, None, text_field, split)
        choice = replace(choice, corpora={short_name(own.data): own.data})
        text_field, split = own.text_field, own.split
    watch = watch or silent
    record = Record.open(out)
    entrants, original, tokenizer, vocab_size, longest = _enter(names, against, context, trust_remote_code, watch)
    with blaming_the_run(bool(settings)):
        opened = _open_corpora(choice, tokenizer, vocab_size, longest, text_field, split or "train", watch)
    session = _Session(
        entrants=entrants,
        original=original,
        tokenizer=tokenizer,
        corpora=opened,
        benchmarks=tuple(open_benchmarks(choice.tasks, choice.files, choice.items, seed)),
        context=longest,
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
            f"Stopped; what was measured is kept in '{record.directory}'. Go on with the same command."
        ) from stop
    record.conclude(results)
    return results


def _settings_of(name: str) -> dict[str, Any]:
    """Those of a finished run; none of another model."""
    directory = named_path(name)
    return run_settings(directory) if name != DEMO and (directory / MODEL).is_dir() else {}


def evaluate_model(
    model: PreTrainedModel,
    blocks: Dataset,
    original: PreTrainedModel | None = None,
    name: str = "model",
    data: str = "data",
    batch_size: int = 4,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluation:
    """Evaluate a model on packed blocks, in its own dtype, sums in float64.

    Args:
        model: any causal language model.
        blocks: rows of `input_ids`, all of one length; where `document` says which document each token belongs to and
            there are 30 of them, intervals are over documents, else over blocks.
        original: the model to compare with, on the same device.
        name: stands in the result.
        data: stands in the result.
        batch_size: blocks in one forward pass.
        tokenizer: makes text of the tokens: for bits per byte, and for the comparison token by token.
    """
    ids = np.asarray(blocks["input_ids"][:])
    text_bytes = 0 if tokenizer is None else count_bytes(ids, tokenizer)
    corpus = Corpus(name=data, source=data, blocks=blocks, documents=documents_of(blocks), text_bytes=text_bytes)
    ours, theirs, distances = measure_tokens(model, blocks, original, batch_size)
    return _summarize(name, corpus, ours, theirs, distances, tokenizer)


def _enter(
    names: Sequence[str], against: str | None, context: int | None, trust_remote_code: bool, watch: Watch
) -> tuple[tuple[_Entrant, ...], _Entrant | None, PreTrainedTokenizerBase, int, int]:
    """Load every model once, so that what can't be compared is refused before anything is measured."""
    if not names:
        raise UnnormError("Evaluate which models? Name one at least.")
    found: dict[str, tuple[_Entrant, PreTrainedTokenizerBase, int, int]] = {}
    for name in dict.fromkeys(([against] if against else []) + list(names)):
        say(watch, f"loading {name}")
        model, tokenizer = load_original(name, trust_remote_code)
        length = choose_context(context, model)
        entrant = _Entrant(name, _weights_digest(model), _config_digest(model))
        found[name] = (entrant, tokenizer, vocabulary_size(model), length)
    sizes = [size for _, _, size, _ in found.values()]
    if len(set(sizes)) > 1:
        raise UnnormError(
            f"The models' vocabularies differ ({', '.join(map(str, sizes))}); compare models with the same tokenizer."
        )
    (first, tokenizer, size, _), *others = found.values()
    for other, its_tokenizer, _, _ in others:
        check_same_tokenizer(first.name, tokenizer, other.name, its_tokenizer)
    entrants = tuple(found[name][0] for name in dict.fromkeys(names))
    longest = min(length for _, _, _, length in found.values())
    return entrants, found[against][0] if against else None, tokenizer, size, longest


def _weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of all weights with their names, in float32."""
    sha256 = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        sha256.update(key.encode())
        sha256.update(value.detach().float().contiguous().cpu().numpy().tobytes())
    return sha256.hexdigest()


def _config_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the config, which says what else the model computes: activations, rotary angles, epsilons."""
    return digest({key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"})


def _open_corpora(
    choice: Choice,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int,
    text_field: str | None,
    split: str,
    watch: Watch,
) -> tuple[Corpus, ...]:
    opened = []
    for name, source in choice.corpora.items():
        say(watch, f"reading {source}")
        of = choice.corpora.get("openwebtext") if name == PILE_FILTERED else None
        opened.append(open_corpus(name, source, tokenizer, vocab_size, context, choice.tokens, text_field, split, of))
    return tuple(opened)


def _measure(session: _Session, suite: str | None) -> Results:
    evaluations: list[Evaluation] = []
    of_original: dict[str, Evaluation] = {}
    scores: list[Score] = []
    original = None if session.original is None else _Loaded(session, session.original)
    original_scores = {} if original is None else _scores(session, original)
    for entrant in session.entrants:
        model = _Loaded(session, entrant)
        for corpus in session.corpora:
            mine, theirs = _evaluate(session, model, original, corpus)
            evaluations.append(mine)
            if theirs is not None:
                of_original.setdefault(corpus.name, theirs)
        same = original is not None and entrant == original.entrant
        for benchmark, found in (original_scores if same else _scores(session, model)).items():
            base = {} if same else {score.metric: score for score in original_scores.get(benchmark, [])}
            scores += [with_difference(score, base[score.metric]) if score.metric in base else score for score in found]
    if original is not None and original.entrant not in session.entrants:
        scores = [score for found in original_scores.values() for score in found] + scores
    return Results(tuple(evaluations), tuple(of_original.values()), tuple(scores), _protocol(session, suite))


class _Loaded:
    """A model that is loaded when it is first needed: what is on record needs none."""

    def __init__(self, session: _Session, entrant: _Entrant) -> None:
        self.session, self.entrant = session, entrant

    @cached_property
    def model(self) -> PreTrainedModel:
        """On the session's device."""
        return load_original(self.entrant.name, self.session.trust_remote_code)[0].to(self.session.device)

    def on(self, name: str) -> dict[str, Any]:
        """What a measurement of it on a corpus or benchmark depends on, by which it is found on record."""
        weights, config = self.entrant.weights, self.entrant.config
        measured = {"model": self.entrant.name, "on": name, "weights": weights, "config": config}
        return measured | self.session.computed_by


def _evaluate(
    session: _Session, model: _Loaded, original: _Loaded | None, corpus: Corpus
) -> tuple[Evaluation, Evaluation | None]:
    """A model on a corpus, and the original on it if there is one."""

    def measure() -> list[Evaluation]:
        session.say(f"{model.entrant.name} on {corpus.name}", len(corpus.blocks) * corpus.context)
        reference = None if original is None else original.model
        found = measure_tokens(model.model, corpus.blocks, reference, session.batch_size, session.watch)
        ours, theirs, distances = found
        rows = [_summarize(model.entrant.name, corpus, ours, theirs, distances, session.tokenizer)]
        if original is not None and theirs is not None:
            rows.append(_summarize(original.entrant.name, corpus, theirs, None, None, session.tokenizer))
        return rows

    key = {
        **model.on(corpus.name),
        "original": None if original is None else asdict(original.entrant),
        **{name: value for name, value in corpus.protocol().items() if name != "corpus"},
    }
    rows = session.record.recall(list[Evaluation], key, measure)
    return rows[0], rows[1] if len(rows) > 1 else None


def _scores(session: _Session, model: _Loaded) -> dict[str, list[Score]]:
    """A model's scores, by benchmark."""

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


def _summarize(
    name: str,
    corpus: Corpus,
    ours: ModelTokens,
    theirs: ModelTokens | None,
    distances: Distances | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Evaluation:
    ids = np.asarray(corpus.blocks["input_ids"][:])
    kind, units = corpus.units()
    sizes = np.bincount(units.ravel())
    sums = np.bincount(units.ravel(), ours.loss.ravel().astype(np.float64))
    loss = _mean(ours.loss)
    overflowed = np.asarray(~(np.isfinite(ours.confidence).all(1) & np.isfinite(ours.loss).all(1)))
    elsewhere = ~overflowed if overflowed.any() and not overflowed.all() else None
    ece, bins = calibration(ours.confidence[:, :-1], ours.guess[:, :-1] == ids[:, 1:])
    evaluation = Evaluation(
        model=name,
        data=corpus.name,
        loss=loss,
        loss_ci=bootstrap_interval(sums, sizes),
        perplexity=float(np.exp(min(loss, 700.0))),
        tokens=ours.loss.size,
        context=corpus.context,
        kl=None,
        jsd=None,
        top1_agreement=None,
        position_loss=tuple(ours.loss.mean(0, dtype=np.float64).tolist()),
        bits_per_byte=loss * ours.loss.size / (math.log(2) * corpus.text_bytes) if corpus.text_bytes else None,
        entropy=_mean(ours.entropy),
        ece=ece,
        calibration=bins,
        interval_over=kind,
        units=len(sizes),
        unit_losses=tuple(sums.tolist()),
        unit_tokens=tuple(sizes.tolist()),
        blocks=len(overflowed),
        overflowed_blocks=int(overflowed.sum()),
        loss_elsewhere=None if elsewhere is None else _mean(ours.loss[elsewhere]),
    )
    if theirs is None or distances is None:
        return evaluation
    changes = np.bincount(units.ravel(), (ours.loss - theirs.loss).ravel().astype(np.float64))
    return replace(
        _beside_original(evaluation, ours, theirs, distances, ids, tokenizer),
        difference=loss - _mean(theirs.loss),
        difference_ci=bootstrap_interval(changes, sizes),
    )


def _beside_original(
    evaluation: Evaluation,
    ours: ModelTokens,
    theirs: ModelTokens,
    distances: Distances,
    ids: Int[NDArray[np.int32], "block position"],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Evaluation:
    """With what is measured of each token's two predictions."""
    comparable = np.isfinite(distances.kl).all(1)
    return replace(
        evaluation,
        kl=_mean(distances.kl),
        kl_elsewhere=_mean(distances.kl[comparable]) if comparable.any() and not comparable.all() else None,
        jsd=_mean(distances.jsd),
        top1_agreement=_mean(distances.top1),
        top5_agreement=_mean(distances.top5),
        entropy_difference=_mean(ours.entropy) - _mean(theirs.entropy),
        comparison=compare_tokens(ours, theirs, distances, ids, tokenizer) if tokenizer and comparable.all() else None,
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))


def _protocol(session: _Session, suite: str | None) -> dict[str, Any]:
    return {
        "suite": suite,
        "models": {entrant.name: entrant.weights for entrant in session.entrants},
        "original": None if session.original is None else {session.original.name: session.original.weights},
        "corpora": [corpus.protocol() for corpus in session.corpora],
        "tasks": [benchmark.protocol() for benchmark in session.benchmarks],
        "context": session.context,
        "interval": f"{LEVEL:.0%}, studentized bootstrap over units, {RESAMPLES} resamples, seed 0; "
        "of shares of benchmark items Wilson's, of their differences Agresti and Min's; differences are paired",
        "dtype": "float32",
        "device": session.device,
        "versions": {name: version(name) for name in ("unnorm", "torch", "transformers", "datasets")},
    }
