"""Medians, what lies around them, and the interval that a ratio of two medians lies in."""

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 2000
_FEWEST = 8  # samples of which kinds are told
_RARE = 0.15  # the share of all that the smaller kind has at least
_APART = 1.3  # how many times as long one kind takes as the other, at least
_EXPLAINED = 0.85  # of the variance: two thirds of a bell's is, three quarters of a flat one's
_EXPLAINED_OF_FEW = 0.82  # and more for few samples, 1 / n: of 8, one draw of four has 0.85 by chance where it is flat


def middle_half(sample: Sequence[float]) -> tuple[float, float]:
    """The range that half of a sample lies in. Its median lies within.

    >>> middle_half([1.0, 2.0, 3.0, 4.0, 9.0]), middle_half([2.5])
    ((2.0, 4.0), (2.5, 2.5))
    """
    low, _, high = statistics.quantiles(sample, n=4, method="inclusive") if len(sample) > 1 else [*sample] * 3
    return low, high


def two_kinds(sample: Sequence[float]) -> tuple[float, float, float] | None:
    """The medians of the two kinds that a sample falls into, and the share of the slower one; None for one kind.

    The sample is split, by logarithms, where that explains most of the variance (Otsu 1979). Few samples have to be
    further apart, so that of one kind, flat or bell-shaped, less than 5 % of samples are taken for two.

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
