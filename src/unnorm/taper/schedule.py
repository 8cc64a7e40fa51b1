"""Schedules, which give each site's alpha as a pure function of a clock, and the controller that runs the clock."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unnorm.sites.site import NormSite

TAPER_SHARE = 0.1
"""Share of the run over which `taper` raises alpha from 0 to 1 for one group of sites; the rest of the run heals."""

KL_BUDGET = 0.9
"""KL to the original, in nats per token, above which the taper waits."""

TAPERNORM_START, TAPERNORM_END = 0.1, 0.6
"""Shares of the run until which `tapernorm` holds its gate at 1, and at which the gate reaches 0."""

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
    """When each path of each site is removed, and how long tokens are special, over one run.

    Attributes:
        removals: one per path of each site.
        special_end_of_text: share of the run until which end-of-text tokens are divided by the special constant.
        special_position_0: the same for position 0.
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
        """When the last norm is gone."""
        return max(removal.end for removal in self.removals)

    @property
    def starts(self) -> tuple[float, ...]:
        """When each group of norms begins to go, in order."""
        return tuple(sorted({removal.start for removal in self.removals}))


@dataclass
class FidelityController:
    """The clock of a schedule, which advances only while the model stays faithful to the original.

    At full speed `position` is the share of the run that is done. The clock slows down once the running KL exceeds half
    the budget, and waits while it exceeds the budget. When KL spikes or a step is refused, the clock goes back and
    continues more slowly. If stand-ins are bounded, it starts only once training has made good what scaling down
    massive activations cost (KL under `STARTS` of the budget), and it no longer waits for KL once the bounds hold down
    almost no token. Checkpoints hold all of this state.

    Attributes:
        kl_budget: KL above which the clock waits, in nats per token.
        end: position at which the schedule has removed everything.
        starts: positions at which the groups of norms begin to go, in order; each *stage* lasts until the next one's,
            the last until `end`. From `LANDING` of a stage on the clock no longer waits.
        position: the clock's time, at which the schedule is evaluated.
        speed: as a share of full speed.
        running_kl: running average of KL over steps; None before the first.
        waited: steps during which the clock stood still.
        set_back: how many times it went back.
        best_kl: lowest running KL since everything was removed.
        stale: steps since `best_kl` last fell by `LEAST_GAIN`.
        bad_in_a_row: most recent consecutive steps that were refused or spiked.
        healed: share of the run spent past `end` before the clock went back, summed over all such times.
        running_held: running average of the share of tokens held down by bounds; None if nothing is bounded.
        started: whether the clock has ever moved.
    """

    MEMORY: ClassVar[float] = 0.9  # Share of the old running averages that is kept at each step.
    SPIKE: ClassVar[float] = 4.0  # A step whose KL is this many times the running one is a spike,
    NO_SPIKE: ClassVar[float] = 0.5  # unless it is under this share of the budget.
    STARTS: ClassVar[float] = 0.3  # Share of the budget under which it first moves, if stand-ins are bounded.
    SLOWS: ClassVar[float] = 0.5  # Share of the budget that must be left for full speed.
    BACK: ClassVar[float] = 0.03  # How far the clock goes back, as a share of the stage.
    SLOWER: ClassVar[float] = 0.5  # Speed is multiplied by this when the clock goes back,
    FASTER: ClassVar[float] = 1.05  # and by this with each step that advances it.
    SLOWEST: ClassVar[float] = 1 / 64
    BAD_AFTER_END: ClassVar[int] = 3
    LANDING: ClassVar[float] = 0.93  # Share of a stage at which alpha is 0.988: from there on waiting gains nothing.
    FEW: ClassVar[float] = 3e-4  # Share of tokens held down below which the bounds do nothing.
    LEAST_GAIN: ClassVar[float] = 0.01  # Relative fall of the running KL that still counts as healing.

    kl_budget: float = KL_BUDGET
    end: float = 1.0
    starts: tuple[float, ...] = (0.0,)
    position: float = 0.0
    speed: float = 1.0
    running_kl: float | None = None
    waited: int = 0
    set_back: int = 0
    best_kl: float = math.inf
    stale: int = 0
    bad_in_a_row: int = 0
    healed: float = 0.0
    running_held: float | None = None
    started: bool = False

    def advance(self, kl: float, refused: bool, steps: int, held: float | None = None) -> None:
        """Update the clock after one step.

        Args:
            kl: the step's KL, nats per token; may be NaN or infinite.
            refused: whether the guard refused the step.
            steps: number of steps in the whole run.
            held: share of the step's tokens held down by bounds; None if nothing is bounded.
        """
        if refused or not math.isfinite(kl) or self._spikes(kl):
            self.bad_in_a_row += 1
            # Once everything is removed, a single bad batch is no reason to go back.
            if self.position < self.end or self.bad_in_a_row >= self.BAD_AFTER_END:
                self._go_back()
            return
        self.bad_in_a_row = 0
        self.running_kl = self._remember(self.running_kl, kl)
        if held is not None:
            self.running_held = self._remember(self.running_held, held)
        if self.position >= self.end:
            self.position = min(1.0, self.position + 1 / steps)
            self._heal()
        elif self.running_kl > self.limit and not self.lands:
            self.waited += 1
        else:
            headroom = 1.0 if self.lands else min(1.0, (1 - self.running_kl / self.kl_budget) / self.SLOWS)
            stage = self.stage
            self.position = min(1.0, self.position + headroom * self.speed / steps)
            self.started = True
            # How fast one group of norms can go says nothing about the next.
            self.speed = min(1.0, self.speed * self.FASTER) if self.stage == stage else 1.0

    def late(self, step: int, steps: int) -> int:
        """How many steps the clock is behind the run, which has done `step` of its `steps`."""
        return max(0, round(step - (self.position + self.healed) * steps))

    @property
    def stage(self) -> tuple[float, float]:
        """Where the stage that the clock is in starts and ends; past `end` that is the last one."""
        start = max((start for start in self.starts if start <= self.position), default=0.0)
        return start, min((later for later in self.starts if later > start), default=self.end)

    @property
    def lands(self) -> bool:
        """Whether the norms of this stage are so nearly gone that waiting gains nothing."""
        few_held = self.running_held is not None and self.running_held < self.FEW
        start, end = self.stage
        return few_held or self.position >= start + self.LANDING * (end - start)

    @property
    def arrived(self) -> bool:
        """Whether everything is removed, or so nearly that waiting gains nothing."""
        return self.lands and self.stage[1] == self.end

    @property
    def only_heals(self) -> bool:
        """Whether there was no norm to begin with, as when a twin is healed further."""
        return self.end == 0

    @property
    def limit(self) -> float:
        """KL above which the clock stands still."""
        starting = self.running_held is not None and not self.started
        return self.STARTS * self.kl_budget if starting else self.kl_budget

    def _remember(self, running: float | None, new: float) -> float:
        return new if running is None else self.MEMORY * running + (1 - self.MEMORY) * new

    def _spikes(self, kl: float) -> bool:
        usual = math.inf if self.running_kl is None else self.running_kl
        return kl > self.SPIKE * usual and kl > self.NO_SPIKE * self.kl_budget

    def _go_back(self) -> None:
        self.healed += max(0.0, self.position - self.end)
        start, end = self.stage
        self.position = max(0.0, min(self.position, self.end) - self.BACK * (end - start))
        self.speed = max(self.SLOWEST, self.speed * self.SLOWER)
        self.set_back += 1
        self.best_kl, self.stale = math.inf, 0

    def _heal(self) -> None:
        assert self.running_kl is not None
        if self.running_kl < (1 - self.LEAST_GAIN) * self.best_kl:
            self.best_kl, self.stale = self.running_kl, 0
        else:
            self.stale += 1


def taper(sites: Sequence[NormSite], share: float = TAPER_SHARE) -> Schedule:
    """Take sites from norm to constant smoothly, each group of them together over `share` of the run.

    First go the norms that read the residual stream; in most models that is all. Norms that follow a projection come
    next, and last those whose projection reads another norm, such as query and key norms. Taken together with the
    others, they hold Gemma 3 270M back (`docs/method.md`).
    """
    readers = {reader for site in sites for reader in site.readers}
    following = [site for site in sites if site.folds_into == "writer"]
    inner = [site for site in following if set(site.writers) & readers]
    outer = [site for site in following if site not in inner]
    groups = [[site for site in sites if site not in following], outer, inner]
    return Schedule(
        tuple(
            PathRemoval(site.name, 0, share * turn, share * (turn + 1))
            for turn, group in enumerate(group for group in groups if group)
            for site in group
        )
    )


def healing(sites: Sequence[NormSite]) -> Schedule:
    """Every site removed from the first step on, for healing a twin further."""
    return taper(sites, share=0.0)


def tapernorm(sites: Sequence[NormSite]) -> Schedule:
    """One gate for all sites, held at 1 and then lowered along a cosine, as in arXiv 2602.10408 (alpha is 1 - gate).

    The paper tapers during pretraining; the shares for a short fine-tuning run are our choice. Constants are estimated
    until the gate falls, as geometric means unless `--estimator` says otherwise.
    """
    return Schedule(tuple(PathRemoval(site.name, 0, TAPERNORM_START, TAPERNORM_END) for site in sites))


def sequential(sites: Sequence[NormSite], split: Sequence[str]) -> Schedule:
    """The order of arXiv 2409.13710, its steps scaled to the run and its gaps to the number of layers.

    MLP norms one by one from the first layer, then attention's query/key paths, then its value paths, then the
    final norm; last, end-of-text tokens and then position 0 lose their own constant.

    Differences from the published code: its constant for position 0 is applied to hidden unit 0 (a buffer as long as
    the model is wide, broadcast over the last dimension), ours to position 0; its schedule is in steps of 2^19 tokens,
    ours in shares of the run, so that any `--tokens` keeps its proportions; and its constants are arithmetic means of
    the scale, ours geometric means unless `--estimator mean` is given.

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
    switch([site.name for site in sites if site.role in ("mlp", "embedding")], 0, PAPER_GAP_MLP)
    switch([name for name in attention if name in split], 0, PAPER_GAP_QK)
    switch([name for name in attention if name in split], 1, PAPER_GAP_V)
    switch([name for name in attention if name not in split], 0, PAPER_GAP_V)
    switch([site.name for site in sites if site.role == "final"], 0, 0)
    end_of_text = at + PAPER_WAIT_EOT / PAPER_STEPS
    return Schedule(tuple(removals), end_of_text, end_of_text + PAPER_WAIT_BOS / PAPER_STEPS)
