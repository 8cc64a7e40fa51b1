"""Confidence intervals of a mean over tokens or items, by bootstrap over independent units."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 2000

Interval = tuple[float, float]

_FEW = 10
# 97.5% quantile of Student's t for 1 to 9 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_DRAWN_AT_ONCE = 2**22
_ROUNDING = 1e-6
"""A resample whose standard error is below this fraction of the sample's drew equal units; the rest is rounding."""


def bootstrap_interval(
    sums: Sequence[float] | NDArray[Any], counts: Sequence[float] | NDArray[Any] | None = None
) -> Interval | None:
    """95% interval of sum(sums) / sum(counts), by the studentized bootstrap, seeded.

    Resampling is over units (documents or blocks), each with the sum of a measure over its tokens and their number.
    Tokens within a unit are correlated, so an interval over tokens would be too narrow. The statistic of a resample
    is (r* - r) / se(r*), with the standard error of a ratio of means; unlike the quantiles of r* itself, its quantiles
    keep the nominal coverage with few or skewed units (Davison and Hinkley, Bootstrap Methods and their Application,
    1997, section 5.2.1). Below 10 units too few distinct resamples make up the tails, and Student's t is used instead.

    Args:
        sums: sum of the measure in each unit.
        counts: tokens in each unit; by default 1 each, so that `sums` are values.

    Returns:
        The interval, or None for a single unit or a mean that is not finite.
    """
    values = np.asarray(sums, dtype=np.float64)
    sizes = np.ones_like(values) if counts is None else np.asarray(counts, dtype=np.float64)
    n = len(values)
    mean = float(values.sum() / sizes.sum())
    if n < 2 or not math.isfinite(mean):
        return None
    residuals = values - mean * sizes
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(sizes.sum())
    if n < _FEW or error == 0:
        half = _STUDENT[min(n, _FEW) - 2] * error
        return mean - half, mean + half
    products = np.stack([residuals, sizes, residuals**2, residuals * sizes, sizes**2], axis=1)
    r, c, rr, rc, cc = _resampled(products).T
    shift = r / c
    spread = np.sqrt(np.maximum(n / (n - 1) * (rr - 2 * shift * rc + shift**2 * cc), 0)) / c
    varied = spread > _ROUNDING * error
    t = shift[varied] / spread[varied]
    low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean - float(high) * error, mean - float(low) * error


def share_interval(successes: float, trials: int) -> Interval:
    """95% interval of a proportion of independent binary items: Wilson's score interval (1927).

    A bootstrap would have zero width if all items were right or all were wrong.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_share_interval(changes: Sequence[float]) -> Interval:
    """95% interval of the difference of two proportions over the same items, where each item changes by -1, 0 or 1.

    Wald's interval with half an item added to each cell of the 2 by 2 table (Agresti and Min, 2005), which keeps its
    nominal coverage where few items change; a bootstrap would have zero width if none did.
    """
    n, better, worse = (len(changes) + 2, *(sum(change == by for change in changes) + 0.5 for by in (1, -1)))
    middle = (better - worse) / n
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(better + worse - (better - worse) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def _resampled(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the rows drawn in each resample, (resamples, columns)."""
    if len(rows) * RESAMPLES <= _DRAWN_AT_ONCE:
        return _draws(len(rows)) @ rows
    generator = np.random.default_rng(0)
    even = np.full(len(rows), 1 / len(rows))
    at_once = max(1, _DRAWN_AT_ONCE // len(rows))
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    return np.concatenate([generator.multinomial(len(rows), even, size).astype(np.float64) @ rows for size in sizes])


@lru_cache(maxsize=4)
def _draws(n: int) -> NDArray[np.float64]:
    """How often each of n units is drawn in each resample, (resamples, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
