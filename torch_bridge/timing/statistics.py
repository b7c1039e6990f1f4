"""Medians, quartiles, and the interval of a ratio of two medians."""

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 2000
_FEWEST = 8  # samples for two kinds
_RARE = 0.15  # least share of the smaller kind
_APART = 1.3  # least quotient of the times of the two kinds
_EXPLAINED = 0.85  # share of the variance: two thirds for a bell-shaped sample, three quarters for a flat one
_EXPLAINED_OF_FEW = 0.82  # plus 1 / n: a quarter of flat samples of 8 have 0.85 by chance


def middle_half(sample: Sequence[float]) -> tuple[float, float]:
    """Returns the range of the middle half of a sample.

    >>> middle_half([1.0, 2.0, 3.0, 4.0, 9.0]), middle_half([2.5])
    ((2.0, 4.0), (2.5, 2.5))
    """
    low, _, high = statistics.quantiles(sample, n=4, method="inclusive") if len(sample) > 1 else [*sample] * 3
    return low, high


def two_kinds(sample: Sequence[float]) -> tuple[float, float, float] | None:
    """Returns the medians of two kinds in a sample, and the share of the slower kind; None for one kind.

    The sample is split, by logarithms, where the split explains most of the variance (Otsu 1979). Small samples need a
    clearer split: less than 5 % of samples of one kind, flat or bell-shaped, are taken for two kinds.

    >>> two_kinds([10.0, 31.0, 10.2, 10.1, 30.0, 9.9, 10.0, 30.5])
    (10.0, 30.5, 0.375)
    >>> two_kinds([10.0, 10.1, 10.4, 9.8, 10.2, 9.9, 10.0, 10.3])
    """
    values = np.sort(np.asarray(sample, float))
    count = len(values)
    least = max(2, round(_RARE * count))
    if count < _FEWEST or values[0] <= 0:
        return None
    logs = np.log(values)
    total = float(np.sum((logs - logs.mean()) ** 2))
    if total == 0:
        return None
    splits = range(least, count - least + 1)
    between = [k * (count - k) / count * float(logs[:k].mean() - logs[k:].mean()) ** 2 for k in splits]
    at = splits[int(np.argmax(between))]
    fast, slow = float(np.median(values[:at])), float(np.median(values[at:]))
    explained = max(_EXPLAINED, _EXPLAINED_OF_FEW + 1 / count)
    if max(between) < explained * total or slow < _APART * fast:
        return None
    return fast, slow, (count - at) / count


def ratio_interval(ours: ArrayLike, theirs: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """Returns the interval of `median(theirs) / median(ours)`, by the percentile bootstrap (Efron 1979) over rounds.

    Each round has one value of both, and these are drawn together: whatever slows a round slows both.

    >>> low, high = ratio_interval([1.0, 1.1, 0.9, 1.0], [2.0, 2.2, 1.8, 2.0])
    >>> low <= 2.0 <= high
    True
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    picked = np.random.default_rng(0).integers(len(a), size=(_RESAMPLES, len(a)))
    ratios = np.median(b[picked], axis=1) / np.median(a[picked], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
