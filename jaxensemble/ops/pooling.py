"""Pooling as PyTorch defines it, on feature maps `[..., *spatial, C]` with any number of leading axes.

Porting uses `nnx.max_pool` and `nnx.avg_pool` where they compute the same. The functions here add `ceil_mode`,
dilation, indices, another divisor, and bins of unequal size.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact, Int, Num

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.windows import Ints, each, take, window_pads


def max_pool(
    x: Num[AnyArray, "... C"],
    window_shape: Sequence[int],
    strides: Ints,
    padding: Ints = 0,
    *,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Num[Array, "... C"]:
    """`torch.nn.MaxPool1d`, `2d` and `3d`, of numbers of any dtype.

    The gradient goes to the first of several largest entries.

    **Arguments:**

    - `padding`: entries that never win, before and after each spatial axis.
    - `ceil_mode`: keeps a last window that reaches beyond the padded input: see `window_count`.

    >>> max_pool(jnp.arange(6.0).reshape(6, 1), (3,), 2, ceil_mode=True)[:, 0].tolist()
    [2.0, 4.0, 5.0]
    """
    if set(each(dilation, len(window_shape))) != {1}:  # JAX has no gradient for a dilated maximum
        return max_pool_with_indices(x, window_shape, strides, padding, dilation=dilation, ceil_mode=ceil_mode)[0]
    windows = _windows(x, window_shape, strides, padding, dilation, ceil_mode)
    return lax.reduce_window(x, lowest(x.dtype), lax.max, **windows)


def max_pool_with_indices(
    x: Num[AnyArray, "... C"],
    window_shape: Sequence[int],
    strides: Ints,
    padding: Ints = 0,
    *,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> tuple[Num[Array, "*pooled C"], Int[Array, "*pooled C"]]:
    """`max_pool` with `return_indices=True`.

    **Returns:** the maxima, and the position of each in the input's flattened spatial axes, int32.

    >>> values, indices = max_pool_with_indices(jnp.array([[1.0], [3.0], [3.0], [2.0]]), (2,), 2)
    >>> values[:, 0].tolist(), indices[:, 0].tolist()
    ([3.0, 3.0], [1, 2])
    """
    spatial = x.shape[x.ndim - 1 - len(window_shape) : -1]
    places = jnp.arange(np.prod(spatial), dtype=jnp.int32).reshape(*spatial, 1)
    operands = (lax.stop_gradient(x), jnp.broadcast_to(places, x.shape))
    nowhere = np.array(np.iinfo(np.int32).max, np.int32)
    windows = _windows(x, window_shape, strides, padding, dilation, ceil_mode)
    _, indices = lax.reduce_window(operands, (lowest(x.dtype), nowhere), _winner, **windows)
    return _gather(x, indices, len(spatial)), indices


def _winner(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Array, Array]:
    """The larger of two entries and its place; the first of equal entries, the last of several NaNs, as in PyTorch."""
    (a, i), (b, j) = one, other
    wins = (a > b) | ((a == b) & (i < j))
    nan_wins = (a != a) & ((b == b) | (i > j))
    wins = jnp.where((a != a) | (b != b), nan_wins, wins)
    return jnp.where(wins, a, b), jnp.where(wins, i, j)


def _gather(x: Num[AnyArray, "... C"], indices: Int[AnyArray, "*shape"], spatial: int) -> Num[Array, "*shape"]:
    """The entries of `x` at positions in its flattened spatial axes."""
    lead = x.shape[: x.ndim - 1 - spatial]
    flat, places = (array.reshape(*lead, -1, x.shape[-1]) for array in (x, indices))
    return jnp.take_along_axis(flat, places, axis=-2, mode="clip").reshape(indices.shape)


def max_unpool(
    x: Num[AnyArray, "*pooled C"], indices: Int[AnyArray, "*pooled C"], output_size: Sequence[int]
) -> Num[Array, "... C"]:
    """`torch.nn.MaxUnpool1d`, `2d` and `3d`: entries put where `max_pool_with_indices` found them, zeros elsewhere.

    **Arguments:**

    - `indices`: of the shape of `x`, positions in the flattened spatial axes of the result.
    - `output_size`: the spatial sizes of the result.

    >>> max_unpool(jnp.array([[5.0], [6.0]]), jnp.array([[1], [3]]), (4,))[:, 0].tolist()
    [0.0, 5.0, 0.0, 6.0]
    """
    lead = x.shape[: x.ndim - 1 - len(output_size)]
    flat, places = (array.reshape(*lead, -1, x.shape[-1]) for array in (x, indices))
    shape = (*lead, int(np.prod(output_size)), x.shape[-1])
    return _put(flat, places, shape).reshape(*lead, *output_size, x.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _put(x: Num[AnyArray, "*shape"], places: Int[AnyArray, "*shape"], shape: tuple[int, ...]) -> Num[Array, "..."]:
    """Zeros with `x` at `places` of axis -2."""
    return jnp.zeros(shape, x.dtype).at[_entries(places)].set(x)


@_put.defjvp
def _put_jvp(
    shape: tuple[int, ...], primals: tuple[AnyArray, Array], tangents: tuple[AnyArray, Array]
) -> tuple[Array, Array]:
    """Gives each of several overlapping windows that chose the same entry the full gradient, as PyTorch does."""
    x, places = primals
    return _put(x, places, shape), jnp.zeros(shape, x.dtype).at[_entries(places)].add(tangents[0])


def _entries(places: Array) -> tuple[Array, ...]:
    index = list(jnp.indices(places.shape, sparse=True))
    index[-2] = places
    return tuple(index)


def avg_pool(
    x: Num[AnyArray, "... C"],
    window_shape: Sequence[int],
    strides: Ints,
    padding: Ints = 0,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Num[Array, "... C"]:
    """`torch.nn.AvgPool1d`, `2d` and `3d`.

    **Arguments:**

    - `padding`: zeros before and after each spatial axis. They count if `count_include_pad`; what a last window
      covers beyond them with `ceil_mode` never counts.
    - `divisor_override`: the divisor of sums, instead of the number of entries.

    >>> avg_pool(jnp.ones((3, 1)), (2,), 2, ceil_mode=True)[:, 0].tolist()
    [1.0, 1.0]
    """
    windows = _windows(x, window_shape, strides, padding, 1, ceil_mode)
    total = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, **windows)
    if divisor_override is not None:
        return total / divisor_override
    spatial = len(window_shape)
    sizes = x.shape[-spatial - 1 : -1]
    counts = np.ones((1,))
    for k, (size, pad, stride) in enumerate(zip(sizes, each(padding, spatial), each(strides, spatial), strict=True)):
        starts = stride * np.arange(total.shape[k - spatial - 1]) - pad
        ends = np.minimum(starts + window_shape[k], size + pad)
        if not count_include_pad:
            starts, ends = np.maximum(starts, 0), np.minimum(ends, size)
        counts = counts[..., None, :] * (ends - starts)[:, None]
    return total / counts.astype(x.dtype)


def _windows(
    x: Array, window_shape: Sequence[int], strides: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> dict[str, tuple]:
    """The arguments of `lax.reduce_window` for all axes of `x`."""
    spatial = len(window_shape)
    strides, padding, dilation = each(strides, spatial), each(padding, spatial), each(dilation, spatial)
    lead = x.ndim - spatial - 1
    pads = [
        window_pads(*axis, ceil_mode)
        for axis in zip(x.shape[lead:-1], window_shape, strides, padding, dilation, strict=True)
    ]
    return {
        "window_dimensions": (*(1,) * lead, *window_shape, 1),
        "window_strides": (*(1,) * lead, *strides, 1),
        "padding": (*((0, 0),) * lead, *pads, (0, 0)),
        "window_dilation": (*(1,) * lead, *dilation, 1),
    }


def lowest(dtype: Any) -> np.ndarray:
    """The least number of a dtype."""
    least = -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min
    return np.array(least, dtype)


def adaptive_avg_pool(x: Inexact[AnyArray, "... C"], output_size: Sequence[int]) -> Inexact[Array, "... C"]:
    """`torch.nn.AdaptiveAvgPool1d`, `2d` and `3d`: averages over bins of nearly equal size.

    Bin `i` of `n` over an axis of size `s` holds the entries from `floor(i * s / n)` up to `ceil((i + 1) * s / n)`:
    bins overlap where `n` does not divide `s`.

    **Arguments:**

    - `output_size`: the number of bins of each spatial axis.

    >>> adaptive_avg_pool(jnp.arange(3.0).reshape(3, 1), (2,))[:, 0].tolist()
    [0.5, 1.5]
    """
    lead = x.ndim - len(output_size) - 1
    windows = _even_bins(x.shape[lead:-1], output_size)
    if windows is not None:
        return avg_pool(x, windows, windows)
    for k, bins in enumerate(output_size):
        x = _bin_means(x, lead + k, bins)
    return x


def _bin_means(x: Array, axis: int, bins: int) -> Array:
    table, counts = _bins(x.shape[axis], bins)
    mask = np.arange(table.shape[1]) < counts[:, None]
    shape = (-1,) + (1,) * (x.ndim - axis - 1)
    members = jnp.where(mask.reshape(bins, *shape), take(x, table, axis), 0)
    return members.sum(axis + 1) / counts.reshape(shape).astype(x.dtype)


def adaptive_max_pool(x: Num[AnyArray, "... C"], output_size: Sequence[int]) -> Num[Array, "... C"]:
    """`torch.nn.AdaptiveMaxPool1d`, `2d` and `3d`: maxima over the bins of `adaptive_avg_pool`.

    >>> adaptive_max_pool(jnp.arange(3.0).reshape(3, 1), (2,))[:, 0].tolist()
    [1.0, 2.0]
    """
    windows = _even_bins(x.shape[x.ndim - len(output_size) - 1 : -1], output_size)
    if windows is not None:
        return max_pool(x, windows, windows)
    return adaptive_max_pool_with_indices(x, output_size)[0]


def adaptive_max_pool_with_indices(
    x: Num[AnyArray, "... C"], output_size: Sequence[int]
) -> tuple[Num[Array, "*pooled C"], Int[Array, "*pooled C"]]:
    """`adaptive_max_pool` with `return_indices=True`: see `max_pool_with_indices`.

    >>> values, indices = adaptive_max_pool_with_indices(jnp.array([[3.0], [3.0], [1.0]]), (2,))
    >>> values[:, 0].tolist(), indices[:, 0].tolist()
    ([3.0, 3.0], [0, 1])
    """
    spatial = len(output_size)
    lead = x.ndim - spatial - 1
    windows = _even_bins(x.shape[lead:-1], output_size)
    if windows is not None:
        return max_pool_with_indices(x, windows, windows)
    indices = jnp.arange(np.prod(x.shape[lead:-1]), dtype=jnp.int32).reshape(*x.shape[lead:-1], 1)
    best, indices = lax.stop_gradient(x), jnp.broadcast_to(indices, x.shape)
    for axis in reversed(range(lead, lead + spatial)):  # the first of equal ones in the order of PyTorch's loops
        table, _ = _bins(x.shape[axis], output_size[axis - lead])
        best, indices = take(best, table, axis), take(indices, table, axis)
        winner = jnp.argmax(best, axis + 1, keepdims=True)
        best, indices = (jnp.take_along_axis(a, winner, axis + 1).squeeze(axis + 1) for a in (best, indices))
    return _gather(x, indices, spatial), indices


def _even_bins(sizes: Sequence[int], bins: Sequence[int]) -> tuple[int, ...] | None:
    """The window of every bin, if the bins are equal."""
    even = all(size % count == 0 for size, count in zip(sizes, bins, strict=True))
    return tuple(size // count for size, count in zip(sizes, bins, strict=True)) if even else None


def _bins(size: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The entries of each bin, `[bins, longest]` with the last repeated in shorter bins, and their number."""
    starts = np.arange(bins) * size // bins
    counts = -(-(np.arange(bins) + 1) * size // bins) - starts
    return starts[:, None] + np.minimum(np.arange(counts.max()), counts[:, None] - 1), counts
