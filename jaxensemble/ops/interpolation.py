"""Resizing feature maps `[..., *spatial, C]` as `torch.nn.functional.interpolate` does.

Every output entry is a weighted sum of a few input entries, one spatial axis after the other. The entries and
their weights depend on the sizes alone, and numpy computes them. The conventions are those of PyTorch's
`ATen/native/UpSample.h`; `jax.image.resize` has a different cubic kernel and no `align_corners`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.windows import take

Method: TypeAlias = Literal["nearest", "nearest-exact", "linear", "cubic"]


class Taps(NamedTuple):
    """The input entries that each output entry along one axis is made of, and their weights: `[outputs, taps]`."""

    indices: Int[np.ndarray, "outputs taps"]
    weights: Float[np.ndarray, "outputs taps"]


def resize(
    x: Num[AnyArray, "... C"],
    size: Sequence[int],
    method: Method = "nearest",
    *,
    align_corners: bool = False,
    scale: Sequence[float | None] | None = None,
    antialias: bool = False,
) -> Num[AnyArray, "... C"]:
    """`torch.nn.functional.interpolate`: linear, bilinear and trilinear are all `"linear"`, bicubic is `"cubic"`.

    **Arguments:**

    - `x`: `[..., *spatial, C]`.
    - `size`: the spatial sizes of the result.
    - `align_corners`: the outermost entries stay where they are; if False, the outer edges of entries do.
    - `scale`: the factor given to PyTorch for each spatial axis, which need not be `size / input size` exactly.
    - `antialias`: widens the kernel where the result is smaller than `x` (linear and cubic only).

    **Returns:** `[..., *size, C]`, of the dtype of `x`.

    >>> resize(jnp.array([[0.0], [4.0]]), (4,), "linear")[:, 0].tolist()
    [0.0, 1.0, 3.0, 4.0]
    """
    lead = x.ndim - len(size) - 1
    small_plane = len(size) == 2 and sum(size) <= 128  # where PyTorch changes from one way of rounding to another
    for k, outputs in enumerate(size):
        axis, factor = lead + k, None if scale is None else scale[k]
        if method in ("nearest", "nearest-exact"):
            exact = method == "nearest-exact"
            rounding = {"exact": exact, "dtype": x.dtype, "small_plane": small_plane}
            x = _pick(x, axis, nearest_indices(x.shape[axis], outputs, factor, **rounding))
        else:
            x = _mix(x, axis, outputs, method, align_corners, factor, antialias)
    return x


def _mix(
    x: Array, axis: int, outputs: int, method: Method, align_corners: bool, scale: float | None, antialias: bool
) -> Array:
    inputs = x.shape[axis]
    if antialias:
        return _weigh(x, axis, antialiased_taps(inputs, outputs, method, align_corners, scale))
    if inputs == outputs and method == "linear":  # whatever the scale, as in PyTorch
        return x
    return _weigh(x, axis, taps(inputs, outputs, method, align_corners, scale))


def _pick(x: Array, axis: int, indices: np.ndarray) -> Array:
    size = x.shape[axis]
    if np.array_equal(indices, np.arange(size)):
        return x
    repeats = len(indices) // size
    if repeats and np.array_equal(indices, np.repeat(np.arange(size), repeats)):
        return jnp.repeat(x, repeats, axis)
    return take(x, indices, axis)


def _weigh(x: Array, axis: int, taps: Taps) -> Array:
    shape = (-1,) + (1,) * (x.ndim - axis - 1)
    terms = [
        take(x, indices, axis) * weights.reshape(shape).astype(x.dtype)
        for indices, weights in zip(taps.indices.T, taps.weights.T, strict=True)
    ]
    return functools.reduce(jnp.add, terms)


def nearest_indices(
    inputs: int,
    outputs: int,
    scale: float | None = None,
    *,
    exact: bool = False,
    dtype: Any = np.float32,
    small_plane: bool = True,
) -> Int[np.ndarray, " {outputs}"]:
    """The input entry that each output entry takes.

    Where an output entry falls between two input entries, rounding decides. For small planes PyTorch rounds
    in single precision, whatever the dtype; for all others in another way, in double precision if `dtype` is float64.
    (Measured with contiguous tensors on the CPU; memory in `channels_last` order is always treated like small planes.)

    >>> nearest_indices(3, 5).tolist(), nearest_indices(3, 5, exact=True).tolist()
    ([0, 0, 1, 1, 2], [0, 0, 1, 2, 2])
    """
    places = np.arange(outputs)
    if small_plane and not exact and outputs in (inputs, 2 * inputs):
        return places * inputs // outputs
    real = np.float64 if dtype == np.float64 and not small_plane else np.float32
    step = real(1.0 / scale) if scale else real(inputs) / real(outputs)
    if not exact:
        places = places.astype(real) * step
    elif small_plane:
        places = (places + 0.5) * np.float64(step)
    else:
        places = (np.float64(step) * (places + 0.5) - 0.5).astype(real) + real(0.5)
    return np.minimum(np.floor(places.astype(np.float32)).astype(np.int64), inputs - 1)


def taps(inputs: int, outputs: int, method: Method, align_corners: bool = False, scale: float | None = None) -> Taps:
    """Two taps for linear, four for cubic interpolation.

    >>> indices, weights = taps(2, 4, "linear")
    >>> indices.tolist(), weights[1].tolist()
    ([[0, 1], [0, 1], [0, 1], [1, 1]], [0.75, 0.25])
    """
    if align_corners:
        places = np.arange(outputs) * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        places = (np.arange(outputs) + 0.5) * _step(inputs, outputs, scale) - 0.5
    if method == "linear":
        places = np.clip(places, 0, None)
        first = np.minimum(np.floor(places).astype(np.int64), inputs - 1)
        fraction = np.clip(places - first, 0, 1)
        return Taps(np.minimum(np.stack([first, first + 1], 1), inputs - 1), np.stack([1 - fraction, fraction], 1))
    first = np.floor(places).astype(np.int64)
    indices = np.clip(first[:, None] + np.arange(-1, 3), 0, inputs - 1)
    return Taps(indices, np.stack(cubic_weights(places - first), 1))


def cubic_weights(fraction: Any, a: float = -0.75) -> list[Any]:
    """The weights of the four entries around a place that lies `fraction` beyond the second of them.

    The convolution kernel of Keys (1981), https://doi.org/10.1109/TASSP.1981.1163711, with PyTorch's `a`.

    >>> [float(weight) for weight in cubic_weights(0.5)]
    [-0.09375, 0.59375, 0.59375, -0.09375]
    """

    def near(t: Any) -> Any:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: Any) -> Any:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    return [far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)]


def antialiased_taps(
    inputs: int, outputs: int, method: Method, align_corners: bool = False, scale: float | None = None
) -> Taps:
    """The taps that the kernel covers when it is stretched to the distance between output entries.

    As in Pillow's resizing, which PyTorch follows: weights sum to one, cubic has `a = -0.5`.

    >>> antialiased_taps(4, 2, "linear").weights[0] * 7
    array([3., 3., 1.])
    """
    if align_corners:
        step = (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
    else:
        step = _step(inputs, outputs, scale)
    stretch = max(step, 1.0)
    reach = stretch * (1 if method == "linear" else 2)
    centers = step * (np.arange(outputs) + 0.5)
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.int64), inputs)
    offsets = np.arange(math.ceil(reach) * 2 + 1)
    indices = first[:, None] + offsets
    distance = np.abs((indices - centers[:, None] + 0.5) / stretch)
    weights = np.where(indices < last[:, None], _kernel(distance, method), 0.0)
    weights = weights / weights.sum(1, keepdims=True)
    used = max(int((last - first).max()), 1)
    return Taps(np.minimum(indices, inputs - 1)[:, :used], weights[:, :used])


def _kernel(distance: np.ndarray, method: Method) -> np.ndarray:
    if method == "linear":
        return np.maximum(1 - distance, 0)
    far, near = cubic_weights(distance - 1, a=-0.5)[0], cubic_weights(distance, a=-0.5)[1]
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def _step(inputs: int, outputs: int, scale: float | None) -> float:
    """The distance between output entries, in input entries."""
    return 1.0 / scale if scale else inputs / outputs
