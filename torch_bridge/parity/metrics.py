"""Measures of the error between two sets of outputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from torch_bridge.arrays import to_numpy
from torch_bridge.graph.outputs import arrays_of

EXACT = 1e-12
"""Largest float64 error of a network, relative to the largest output.

Another formula (GELU by tanh: 5e-4; eps 1e-6 for 1e-5: 5e-6) exceeds it by far; another order of summation does not.
"""

EXACT_DEEP = 1e-10
"""The same limit for networks of more than 100 layers, whose rounding errors grow."""

WORKING = 2.0
"""The factor by which the error in working precision may exceed PyTorch's own."""

WORKING_FEW = 3.0
"""The same factor for half precision and for fewer than 1,000 numbers, whose errors scatter more."""


FILL = 1e6
"""The factor by which the fill of a mask exceeds all values that rounding changes.

Fills do not measure errors: compared with -1e30, all other values would be equal.
"""


def arrays_by_place(outputs: Any) -> dict[str, np.ndarray]:
    """The arrays of either framework's outputs, `[M, ...]` for an ensemble. Numbers and strings are left out."""
    arrays = arrays_of(outputs).items()
    return {place: to_numpy(leaf) if isinstance(leaf, Tensor) else np.asarray(leaf) for place, leaf in arrays}


def stack_outputs(outputs: Sequence[Any]) -> dict[str, np.ndarray]:
    """The outputs of all members as arrays `[M, ...]` by place."""
    members = [arrays_by_place(output) for output in outputs]
    return {place: np.stack([member[place] for member in members]) for place in members[0]}


def normwise_error(actual: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The largest error of any member relative to that member's largest value, and the number of this member.

    The error is infinite where shapes, kinds or the positions of NaN and infinity differ. Integers and booleans must be
    equal.
    """
    if actual.shape != expected.shape or actual.dtype.kind != expected.dtype.kind:
        return np.inf, 0
    errors = [_error(a, e) for a, e in zip(actual, expected, strict=True)]
    worst = int(np.argmax(errors))
    return float(errors[worst]), worst


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The error of one member."""
    if expected.dtype.kind in "biu":
        return 0.0 if np.array_equal(actual, expected) else np.inf
    if not is_same_where_not_finite(actual, expected):
        return np.inf
    finite = np.isfinite(expected)
    actual, expected = actual[finite], expected[finite]
    counts = ~_is_fill(actual, expected, expected)
    difference = np.abs(actual - expected)[counts].max(initial=0.0)
    scale = np.abs(expected)[counts].max(initial=0.0)
    return float(difference / scale) if scale else float(difference)


def _is_fill(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """A mask of the values that are equal on both sides and exceed all other values, and 1, by the factor `FILL`."""
    same = ours == theirs
    return same & (np.abs(exact) > FILL * np.abs(exact[~same]).max(initial=1.0))


def working_errors(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> tuple[float, float, float]:
    """The root mean square errors of ours and of PyTorch's, and the root mean square of the exact values.

    Two kinds of values do not count: those that are the same bits on both sides but far from the exact ones, such as
    overflows, and the fills of masks. Our error is infinite where our NaN or infinities are at other positions.
    """
    with np.errstate(all="ignore"):
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        lost = ~(np.abs(theirs - exact) <= np.abs(exact) / 2) & (exact != 0)
        counts = ~(same & lost | _is_fill(ours, theirs, exact))
    ours, theirs, exact = ours[counts], theirs[counts], exact[counts]
    error = rms_error(ours, exact) if is_same_where_not_finite(ours, exact) else np.inf
    return error, rms_error(theirs, exact), rms(exact)


def is_same_where_not_finite(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Returns whether NaN and the infinities are at the same positions."""
    finite = np.isfinite(expected)
    same = np.array_equal(np.isfinite(actual), finite)
    return same and np.array_equal(actual[~finite], expected[~finite], equal_nan=True)


def rms_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square error where both are finite."""
    finite = np.isfinite(actual) & np.isfinite(expected)
    return rms(actual[finite] - expected[finite])


def rms(array: np.ndarray) -> float:
    """The root mean square of the finite values."""
    finite = np.abs(array[np.isfinite(array)]).astype(np.float64)
    return float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0
