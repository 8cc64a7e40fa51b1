"""The recipes, in one table: the schedule of each, how it removes a norm, and how it optimizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from unnorm.sites.site import NormSite
from unnorm.taper.norms import Interpolation
from unnorm.taper.schedule import PAPER_STEPS, Schedule, sequential, taper, tapernorm

Penalty = Literal["spread", "target"]
RecipeName = Literal["taper", "sequential", "sequential-aux", "tapernorm"]


@dataclass(frozen=True)
class Optimization:
    """What a recipe minimizes, and the settings of its optimizer.

    Attributes:
        least_lr: share of the peak learning rate at the end of the cosine; 0 means linear decay to zero.
        warmup: share of the steps during which the learning rate rises.
        weight_decay: AdamW's.
        betas: AdamW's.
        distil: minimize KL to the teacher's logits; otherwise next-token loss.
        label_weight: weight of the next-token loss that is added to KL.
        penalty: additional loss at the final norm; see `scale_penalty`.
        penalty_weight: its weight.
        read_weight: weight of `read_mismatch`, averaged over all sites; falls to 0 over the first `READS_SHARE` of the
            run.
        massive_even_weight: weight of `massive_unevenness`, averaged over all bounded sites. It brings massive
            activations, already scaled down, to the constant scale.
        even_weight: weight of `unevenness`, averaged over all bounded sites, times alpha^4: while much is still held
            down it would only get in the way. Once all norms are removed, KL does the same for ordinary tokens, and
            only tokens beyond `RUNAWAY` count, including first tokens (`FirstTokens`).
    """

    least_lr: float
    warmup: float
    weight_decay: float
    betas: tuple[float, float]
    distil: bool
    label_weight: float = 0.0
    penalty: Penalty | None = None
    penalty_weight: float = 0.0
    read_weight: float = 0.0
    massive_even_weight: float = 0.0
    even_weight: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """One way from norms to constants. The defaults are those of the published recipes.

    Attributes:
        lay_out: makes the schedule from a model's sites and the names of those whose paths are removed separately.
        optimization: what is minimized, and how.
        controlled: whether the schedule's clock waits for KL and goes back after spikes (`FidelityController`).
        equalizes: whether scales are made more even before training, while the norms are on.
        tries_lr: whether the learning rate is tried first, and lowered for models that one step would move too far.
        splits_paths: whether attention's query/key and value paths lose their norm separately.
        interpolation: between norm and constant, see `TaperedNorm`.
        steps_wanted: optimizer steps that a run's tokens are divided into, within the limits on tokens per step.
        lr_at_768: peak learning rate for a model of width 768.
    """

    lay_out: Callable[[Sequence[NormSite], Sequence[str]], Schedule]
    optimization: Optimization
    controlled: bool = False
    equalizes: bool = False
    tries_lr: bool = False
    splits_paths: bool = False
    interpolation: Interpolation = "log"
    steps_wanted: int = PAPER_STEPS
    lr_at_768: float = 6e-4  # From arXiv 2409.13710, for GPT-2 small.


SEQUENTIAL = Recipe(
    lay_out=sequential,
    splits_paths=True,
    # Weight decay 0.01, 20 of 300 steps of warm-up, a cosine to half the peak.
    optimization=Optimization(
        least_lr=0.5,
        warmup=20 / 300,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        distil=False,
    ),
)
"""The recipe of arXiv 2409.13710."""

SEQUENTIAL_AUX = replace(
    SEQUENTIAL, optimization=replace(SEQUENTIAL.optimization, penalty="spread", penalty_weight=0.1)
)
"""The same plus the auxiliary loss of arXiv 2507.02559, weighted as in its published configuration."""

TAPERNORM = Recipe(
    lay_out=lambda sites, _: tapernorm(sites),
    interpolation="linear",
    optimization=Optimization(
        least_lr=0.1,
        warmup=0.05,
        weight_decay=0.01,
        betas=(0.9, 0.95),
        distil=False,
        penalty="target",
        penalty_weight=0.1,
    ),
)
"""The recipe of arXiv 2602.10408, with the steps and the learning rate of arXiv 2409.13710."""

TAPER = Recipe(
    lay_out=lambda sites, _: taper(sites),
    controlled=True,
    equalizes=True,
    tries_lr=True,
    # `first-gpt2` ends at KL 0.027 after 12,500 steps of 512 tokens, at 0.037 after 3,125 of 4,096
    # (`benchmarks/steps.json`).
    steps_wanted=12_800,
    # Lower than the papers', since its steps are smaller and more numerous and must not make the model drift where
    # there is nothing to learn (`docs/method.md`).
    lr_at_768=1.25e-4,
    optimization=Optimization(
        least_lr=0.0,
        warmup=0.05,
        weight_decay=0.0,
        betas=(0.9, 0.98),
        distil=True,
        label_weight=0.05,
        read_weight=10.0,
        massive_even_weight=10.0,
        even_weight=1000.0,
    ),
)
"""Ours, and the default."""

RECIPES: dict[RecipeName, Recipe] = {
    "taper": TAPER,
    "sequential": SEQUENTIAL,
    "sequential-aux": SEQUENTIAL_AUX,
    "tapernorm": TAPERNORM,
}
