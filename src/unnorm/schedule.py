"""Recipes: which site has which alpha when, as pure functions of the share of the run that is done."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unnorm.sites import NormSite

Recipe = Literal["taper", "sequential"]

TAPER_SHARE = 0.4
"""Share of the run in which `taper` brings alpha from 0 to 1; the rest heals."""

# arXiv 2409.13710 for GPT-2 small, 300 steps in all, as in the table of its successor 2507.02559: the first switch
# comes at step 20; MLP norms then go every 2 steps, query/key paths every 2, value paths every 3; the final norm
# follows; end-of-text tokens lose their own constant 2 steps later, position 0 after 10 more.
PAPER_STEPS = 300
PAPER_LAYERS = 12
PAPER_START, PAPER_GAP_MLP, PAPER_GAP_QK, PAPER_GAP_V, PAPER_WAIT_EOT, PAPER_WAIT_BOS = 20, 2, 2, 3, 2, 10


@dataclass(frozen=True)
class PathRemoval:
    """One path of one site going from norm (alpha 0 at `start`) to constant (alpha 1 at `end`).

    Times are shares of the run, 0 to 1; `start == end` switches at once.
    """

    site: str
    path: int
    start: float
    end: float

    def alpha(self, progress: float) -> float:
        """Alpha when `progress` of the run is done: a half cosine between start and end."""
        if progress >= self.end:
            return 1.0
        if progress <= self.start:
            return 0.0
        return 0.5 - 0.5 * math.cos(math.pi * (progress - self.start) / (self.end - self.start))


@dataclass(frozen=True)
class Schedule:
    """A recipe laid out over one run.

    Attributes:
        removals: one for each path of each site.
        special_end_of_text: until when end-of-text tokens divide by the special constant.
        special_position_0: until when position 0 does.
    """

    removals: tuple[PathRemoval, ...]
    special_end_of_text: float = 0.0
    special_position_0: float = 0.0

    def alphas(self, progress: float) -> dict[str, list[float]]:
        """Alpha of each path, by site."""
        alphas: dict[str, list[float]] = {}
        for removal in sorted(self.removals, key=lambda r: r.path):
            alphas.setdefault(removal.site, []).append(removal.alpha(progress))
        return alphas

    @property
    def end(self) -> float:
        """When the last norm is gone and no token is special any more."""
        return max(self.special_end_of_text, self.special_position_0, *(r.end for r in self.removals))


def taper(sites: Sequence[NormSite], share: float = TAPER_SHARE) -> Schedule:
    """Every site from norm to constant together, smoothly, over the first `share` of the run."""
    return Schedule(tuple(PathRemoval(site.name, 0, 0.0, share) for site in sites))


def sequential(sites: Sequence[NormSite], split: Sequence[str]) -> Schedule:
    """The order of arXiv 2409.13710, its steps scaled to the run and its gaps to the number of layers.

    MLP norms one by one from the first layer, then attention's query/key paths, then its value paths, then the
    final norm; last, end-of-text tokens and then position 0 lose their own constant.

    Differences from the published code: its constant for position 0 lands on hidden unit 0 (a buffer as
    long as the model is wide, broadcast over the last dimension), ours on position 0; and its schedule is
    in steps of 2^19 tokens, ours in shares of the run, so that any `--tokens` keeps its proportions.

    Args:
        sites: all norm sites.
        split: names of the attention sites that have a query/key and a value path; other attention sites
            switch with the value paths.
    """
    at = PAPER_START / PAPER_STEPS
    removals: list[PathRemoval] = []

    def switch(names: Sequence[str], path: int, paper_gap: int) -> None:
        nonlocal at
        gap = paper_gap * PAPER_LAYERS / PAPER_STEPS / max(1, len(names))
        for name in names:
            removals.append(PathRemoval(name, path, at, at))
            at += gap

    attention = [site.name for site in sites if site.role in ("attention", "attention+mlp")]
    switch([site.name for site in sites if site.role == "mlp"], 0, PAPER_GAP_MLP)
    switch([name for name in attention if name in split], 0, PAPER_GAP_QK)
    switch([name for name in attention if name in split], 1, PAPER_GAP_V)
    switch([name for name in attention if name not in split], 0, PAPER_GAP_V)
    switch([site.name for site in sites if site.role == "final"], 0, 0)
    end_of_text = at + PAPER_WAIT_EOT / PAPER_STEPS
    return Schedule(tuple(removals), end_of_text, end_of_text + PAPER_WAIT_BOS / PAPER_STEPS)
