"""Medians, and the interval that a ratio of two medians lies in."""

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 2000


def ratio_interval(ours: ArrayLike, theirs: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """The interval of `median(theirs) / median(ours)`, by the percentile bootstrap (Efron 1979) over rounds.

    Both were measured in the same rounds, one value each, and are drawn together: what slows a round slows both.

    >>> low, high = ratio_interval([1.0, 1.1, 0.9, 1.0], [2.0, 2.2, 1.8, 2.0])
    >>> low <= 2.0 <= high
    True
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    picked = np.random.default_rng(0).integers(len(a), size=(_RESAMPLES, len(a)))
    ratios = np.median(b[picked], axis=1) / np.median(a[picked], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
