"""Participants of one evaluation: models that are checked up front and loaded again only when needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.errors import UnnormError
from unnorm.evaluation.corpora import Corpus
from unnorm.evaluation.harness import Benchmark
from unnorm.evaluation.record import Record
from unnorm.json_text import digest
from unnorm.models.comparable import check_same_tokenizer, check_same_vocabulary
from unnorm.models.load import DEMO, load_original, weights_digest
from unnorm.models.sizes import choose_context, vocabulary_size
from unnorm.paths import named_path
from unnorm.progress import Watch, say
from unnorm.run_directory import model_within
from unnorm.runs.config import absolute_source, run_settings, trained_context
from unnorm.versions import versions


@dataclass(frozen=True)
class Entrant:
    """One model that takes part, not loaded: its name and digests of its weights and its config."""

    name: str
    weights: str
    config: str


@dataclass(frozen=True)
class Session:
    """State shared by all measurements of one evaluation; `left_out` says why corpora of a suite are missing."""

    entrants: tuple[Entrant, ...]
    original: Entrant | None
    tokenizer: PreTrainedTokenizerBase
    corpora: tuple[Corpus, ...]
    left_out: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]
    context: int
    batch_size: int
    device: str
    trust_remote_code: bool
    record: Record
    watch: Watch

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer backend, pre-tokenization included, or of the vocabulary alone without one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return digest({"backend": backend.to_str() if backend is not None else self.tokenizer.get_vocab()})

    @property
    def computed_by(self) -> dict[str, str]:
        """What else the last digits of the numbers depend on."""
        known = versions()
        return {"device": self.device, "torch": known["torch"], "unnorm": known["unnorm"]}

    def say(self, text: str, tokens: int | None = None) -> None:
        """Announce a measurement to the watch, and how many tokens it takes."""
        say(self.watch, text, tokens)


@dataclass(frozen=True)
class Entered:
    """Models found to be comparable; each was loaded once and released.

    Attributes:
        entrants: the models to evaluate.
        original: the model they are compared with, or None.
        tokenizer: the tokenizer they share.
        vocab_size: rows of their token embeddings.
        context: tokens per block: as asked for, otherwise the longest that all of them take and that runs among them
            were trained with, at most 1024.
    """

    entrants: tuple[Entrant, ...]
    original: Entrant | None
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context: int


class _Candidate(NamedTuple):
    entrant: Entrant
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context: int


def enter(
    names: Sequence[str], against: str | None, context: int | None, trust_remote_code: bool, watch: Watch
) -> Entered:
    """Load every model once, so that models that can't be compared are refused before anything is measured.

    Args:
        names: the models.
        against: the original; by default the one that the finished runs among the models share, if it can be loaded.
        context: tokens per block, or None for the longest that all take and were trained with, at most 1024.
        trust_remote_code: run modeling code that comes with a model.
        watch: told what is loaded.

    Raises:
        UnnormError: no model is named, one can't be loaded or takes fewer tokens than `context`, or their
            vocabulary sizes or tokenizers differ.
    """
    if not names:
        raise UnnormError("No models to evaluate: name at least one.")
    named = dict.fromkeys([against, *names] if against else names)
    found = {name: _candidate(name, context, trust_remote_code, watch) for name in named}
    first, *others = found.values()
    for other in others:
        _check_comparable(first, other)
    own = _own_original(names) if against is None else None
    if own is not None:
        try:
            own = next((name for name in found if _is_same(name, own)), own)
            if own not in found:
                candidate = _candidate(own, context, trust_remote_code, watch)
                _check_comparable(first, candidate)
                found[own] = candidate
            against = own
        except UnnormError as error:  # Nobody asked for it.
            say(watch, f"no comparison, since the run's original can't be used: {error}")
    return Entered(
        entrants=tuple(found[name].entrant for name in dict.fromkeys(names)),
        original=found[against].entrant if against else None,
        tokenizer=first.tokenizer,
        vocab_size=first.vocab_size,
        context=min(candidate.context for candidate in found.values()),
    )


def _candidate(name: str, context: int | None, trust_remote_code: bool, watch: Watch) -> _Candidate:
    say(watch, f"loading {name}")
    model, tokenizer = load_original(name, trust_remote_code)
    entrant = Entrant(name, weights_digest(model), _config_digest(model))
    longest = choose_context(context, model)
    trained = trained_context(named_path(name)) if context is None and name != DEMO else None
    return _Candidate(entrant, tokenizer, vocabulary_size(model), min(longest, trained or longest))


def _own_original(names: Sequence[str]) -> str | None:
    """The one original that the finished runs among the models share; None if there is none or several."""
    try:
        originals = {str(settings["model"]) for settings in map(settings_of, names) if settings.get("model")}
    except UnnormError:  # Unreadable settings are no error: they only supply defaults.
        return None
    return originals.pop() if len(originals) == 1 else None


def _is_same(name: str, original: str) -> bool:
    """Whether a model that was named is a run's original, which the run knows by its absolute path."""
    return name == original or (name != DEMO and absolute_source(name) == original)


def settings_of(name: str) -> dict[str, Any]:
    """Settings of a finished run; empty for any other model."""
    directory = named_path(name)
    return run_settings(directory) if name != DEMO and model_within(directory) != directory else {}


def _check_comparable(first: _Candidate, other: _Candidate) -> None:
    check_same_vocabulary(first.entrant.name, first.vocab_size, other.entrant.name, other.vocab_size)
    check_same_tokenizer(first.entrant.name, first.tokenizer, other.entrant.name, other.tokenizer)


def _config_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the config, which sets what weights do not: activations, rotary angles, epsilons."""
    return digest({key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"})


class LoadedModel:
    """A model loaded on first use, so never if all of its measurements are on record."""

    def __init__(self, session: Session, entrant: Entrant) -> None:
        self.session, self.entrant = session, entrant

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, on the session's device."""
        return load_original(self.entrant.name, self.session.trust_remote_code)[0].to(self.session.device)

    def on(self, name: str) -> dict[str, Any]:
        """What a measurement of the model on a corpus or benchmark depends on: part of its key on record."""
        weights, config = self.entrant.weights, self.entrant.config
        measured = {"model": self.entrant.name, "on": name, "weights": weights, "config": config}
        return measured | self.session.computed_by
