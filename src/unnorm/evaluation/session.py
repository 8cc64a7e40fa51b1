"""What takes part in one evaluation: models that are checked once and loaded when their turn comes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.errors import UnnormError
from unnorm.evaluation.corpora import Corpus
from unnorm.evaluation.harness import Benchmark
from unnorm.evaluation.record import Record
from unnorm.json_text import digest
from unnorm.models.load import DEMO, check_same_tokenizer, load_original
from unnorm.models.sizes import choose_context, vocabulary_size
from unnorm.progress import Watch, say
from unnorm.runs.config import run_settings
from unnorm.runs.directory import MODEL, named_path


@dataclass(frozen=True)
class Entrant:
    """One model that takes part, with digests of its weights and its config; it is loaded when its turn comes."""

    name: str
    weights: str
    config: str


@dataclass(frozen=True)
class Session:
    """What all measurements of one evaluation share."""

    entrants: tuple[Entrant, ...]
    original: Entrant | None
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
        """Tell whoever watches what is measured, and how many tokens that takes."""
        say(self.watch, text, tokens)


@dataclass(frozen=True)
class Entered:
    """Models that can be compared, each loaded once and let go.

    Attributes:
        entrants: the models that are evaluated.
        original: what they are compared with, or None.
        tokenizer: that of all of them.
        vocab_size: rows of their embeddings.
        context: the longest sequence that all of them take, at most the one that was asked for.
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
    """Load every model once, so that what can't be compared is refused before anything is measured.

    Args:
        names: the models.
        against: the original; by default that of the finished runs among the models, where they have one and the
            same and it can be loaded.
        context: tokens in a sequence, or None for the longest.
        trust_remote_code: run modeling code that comes with a model.
        watch: told what is loaded.

    Raises:
        UnnormError: no model is named, one can't be loaded, or their tokens or vocabularies differ.
    """
    if not names:
        raise UnnormError("Evaluate which models? Name one at least.")
    found: dict[str, _Candidate] = {}

    def load(name: str) -> None:
        say(watch, f"loading {name}")
        model, tokenizer = load_original(name, trust_remote_code)
        entrant = Entrant(name, _weights_digest(model), _config_digest(model))
        found[name] = _Candidate(entrant, tokenizer, vocabulary_size(model), choose_context(context, model))

    own = _own_original(names) if against is None else None
    if own is not None:
        try:
            load(own)
            against = own
        except UnnormError as error:
            say(watch, f"compared with nothing, since the run's original can't be loaded: {error}")
    for name in dict.fromkeys([against, *names] if against else names):
        if name not in found:
            load(name)
    first, *others = found.values()
    for other in others:
        _check_comparable(first, other)
    return Entered(
        entrants=tuple(found[name].entrant for name in dict.fromkeys(names)),
        original=found[against].entrant if against else None,
        tokenizer=first.tokenizer,
        vocab_size=first.vocab_size,
        context=min(candidate.context for candidate in found.values()),
    )


def _own_original(names: Sequence[str]) -> str | None:
    """The original of the finished runs among models, where there is one alone."""
    try:
        originals = {str(settings["model"]) for settings in map(settings_of, names) if settings.get("model")}
    except UnnormError:  # Settings that can't be read: of use only for what was not named.
        return None
    return originals.pop() if len(originals) == 1 else None


def settings_of(name: str) -> dict[str, Any]:
    """Those of a finished run; none of another model."""
    directory = named_path(name)
    return run_settings(directory) if name != DEMO and (directory / MODEL).is_dir() else {}


def _check_comparable(first: _Candidate, other: _Candidate) -> None:
    if first.vocab_size != other.vocab_size:
        raise UnnormError(
            f"'{first.entrant.name}' has {first.vocab_size:,} token embeddings and '{other.entrant.name}' has "
            f"{other.vocab_size:,}; compare models with the same tokenizer."
        )
    check_same_tokenizer(first.entrant.name, first.tokenizer, other.entrant.name, other.tokenizer)


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


class LoadedModel:
    """A model that is loaded when it is first needed: what is on record needs none."""

    def __init__(self, session: Session, entrant: Entrant) -> None:
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
