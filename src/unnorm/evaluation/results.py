"""Results of an evaluation: each model on each corpus and benchmark, also as plain values."""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any, overload

from unnorm.evaluation.comparison import Comparison
from unnorm.evaluation.intervals import Interval
from unnorm.evaluation.metrics import CalibrationBin
from unnorm.json_text import finite


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats; infinite beyond a float's range."""
    return math.inf if loss >= math.log(sys.float_info.max) else math.exp(loss)


def perplexity_interval(losses: Interval) -> Interval:
    """Interval of a perplexity from that of a mean loss."""
    return perplexity(losses[0]), perplexity(losses[1])


@dataclass(frozen=True)
class Evaluation:
    """One model on one corpus. Losses, divergences and entropies are in nats per token.

    Attributes:
        model: its name.
        data: name of the corpus.
        loss: mean next-token loss.
        loss_ci: 95% confidence interval of the loss, by bootstrap over documents or blocks (`interval_over`);
            None for a single one, or a loss that is not finite.
        perplexity: exp(loss).
        tokens: number of predicted tokens.
        context: tokens per block; each block is evaluated on its own.
        kl: KL(original || model), or None without an original.
        jsd: Jensen-Shannon divergence to the original, at most log 2.
        top1_agreement: share of tokens where both have the same most likely next token.
        position_loss: mean loss at each predicted position, context - 1 of them.
        top5_agreement: share of the original's five likeliest tokens that are among the model's five.
        bits_per_byte: loss in bits per byte of text, or None if the number of bytes is unknown.
        entropy: mean entropy of the predicted distribution.
        entropy_difference: the model's entropy minus the original's.
        ece: expected calibration error of the most likely token, 0 to 1.
        calibration: its bins.
        difference: the model's loss minus the original's on the same tokens.
        difference_ci: paired 95% confidence interval of the difference, by bootstrap over the units' differences.
        interval_over: the bootstrap unit, `documents` or `blocks`.
        units: number of units.
        unit_losses: sum of the losses in each unit.
        unit_tokens: predicted tokens in each unit.
        blocks: number of blocks.
        overflowed_blocks: number of blocks with a prediction that is not finite; one makes means over all non-finite.
        loss_elsewhere: mean loss in the other blocks; None if no block or every block overflows.
        kl_elsewhere: mean KL in the blocks where it is finite; None if that is every block or none.
        comparison: model and original token by token, for the page.
    """

    model: str
    data: str
    loss: float
    loss_ci: Interval | None
    perplexity: float
    tokens: int
    context: int
    kl: float | None
    jsd: float | None
    top1_agreement: float | None
    position_loss: tuple[float, ...] = field(repr=False)
    top5_agreement: float | None = None
    bits_per_byte: float | None = None
    entropy: float | None = None
    entropy_difference: float | None = None
    ece: float | None = None
    calibration: tuple[CalibrationBin, ...] = field(default=(), repr=False)
    difference: float | None = None
    difference_ci: Interval | None = None
    interval_over: str = "blocks"
    units: int = 0
    unit_losses: tuple[float, ...] = field(default=(), repr=False)
    unit_tokens: tuple[int, ...] = field(default=(), repr=False)
    blocks: int = 0
    overflowed_blocks: int = 0
    loss_elsewhere: float | None = None
    kl_elsewhere: float | None = None
    comparison: Comparison | None = field(default=None, repr=False)

    @property
    def perplexity_ci(self) -> Interval | None:
        """95% confidence interval of the perplexity, from that of the loss."""
        return self.loss_ci and perplexity_interval(self.loss_ci)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the per-unit and per-token data."""
        values = asdict(self) | {"perplexity_ci": self.perplexity_ci}
        for key in ("unit_losses", "unit_tokens", "comparison"):
            del values[key]
        return values


@dataclass(frozen=True)
class Score:
    """One metric of one model on one benchmark.

    Attributes:
        model: its name.
        task: lm-eval's name of the benchmark.
        metric: lm-eval's name of the metric.
        value: as lm-eval reports it.
        ci: 95% confidence interval over items; None where lm-eval's per-item values do not yield one.
        items: number of items evaluated.
        of: number of items in the benchmark.
        higher_is_better: None where lm-eval does not say.
        truncated: number of requests longer than the context, which lost their beginning.
        difference: the value minus the original's on the same items.
        difference_ci: paired 95% confidence interval of the difference; None where `item_values` is empty.
        item_values: the metric on each item, keyed by item index; empty where it is not their mean (perplexity).
    """

    model: str
    task: str
    metric: str
    value: float
    ci: Interval | None
    items: int
    of: int
    higher_is_better: bool | None = None
    truncated: int = 0
    difference: float | None = None
    difference_ci: Interval | None = None
    item_values: dict[int, float] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the per-item ones."""
        values = asdict(self)
        del values["item_values"]
        return values


@dataclass(frozen=True)
class Results(Sequence[Evaluation]):
    """Every model on every corpus, in that order; a sequence of `Evaluation`.

    Attributes:
        evaluations: one for each model and corpus.
        original: the original on each corpus; empty without an original.
        scores: one for each model, benchmark and metric.
        protocol: what was evaluated, on what and how, as plain values.
    """

    evaluations: tuple[Evaluation, ...]
    original: tuple[Evaluation, ...]
    scores: tuple[Score, ...]
    protocol: dict[str, Any]

    @overload
    def __getitem__(self, index: int) -> Evaluation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Evaluation]: ...
    def __getitem__(self, index: int | slice) -> Evaluation | Sequence[Evaluation]:
        return self.evaluations[index]

    def __len__(self) -> int:
        return len(self.evaluations)

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self.evaluations)

    @property
    def rows(self) -> list[Evaluation]:
        """The original's evaluations, then every model's; an original that is also a model comes only once."""
        once: dict[tuple[str, str], Evaluation] = {}
        for row in (*self.original, *self.evaluations):
            once.setdefault((row.model, row.data), row)
        return list(once.values())

    @property
    def short_names(self) -> dict[str, str]:
        """Table label of each model, keyed by name: a path is cut to its shortest unambiguous tail."""
        rows = [*self.original, *self.evaluations, *self.scores]
        names = list(dict.fromkeys(row.model for row in rows))
        parts = {name: PurePath(name).parts for name in names}
        shorts = {}
        for name in names:
            others = [parts[other] for other in names if other != name]
            lengths = (n for n in range(1, len(parts[name])) if all(parts[name][-n:] != other[-n:] for other in others))
            is_path = len(parts[name]) != 2 or name.startswith((".", "/", "~"))
            shorts[name] = str(PurePath(*parts[name][-next(lengths, len(parts[name])) :])) if is_path else name
        alike = Counter(shorts.values())  # `demo` is the bundled model, `./demo` a directory.
        return {name: short if alike[short] == 1 else name for name, short in shorts.items()}

    def with_short_names(self) -> "Results":
        """The same results with models called by their short names."""
        short = self.short_names
        protocol = dict(self.protocol)
        for key in ("models", "original"):
            protocol[key] = {short.get(name, name): digest for name, digest in (protocol.get(key) or {}).items()}
        return Results(
            tuple(replace(row, model=short[row.model]) for row in self.evaluations),
            tuple(replace(row, model=short[row.model]) for row in self.original),
            tuple(replace(score, model=short[score.model]) for score in self.scores),
            protocol,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `unnorm evaluate --json` prints them; None in place of NaN and infinity."""
        values = {
            "results": [row.to_json() for row in self.evaluations],
            "original": [row.to_json() for row in self.original],
            "tasks": [score.to_json() for score in self.scores],
            "protocol": self.protocol,
        }
        return dict(finite(values))
