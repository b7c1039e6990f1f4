"""Windows that slide over the spatial axes of a feature map `[..., *spatial, C]`."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Num, Shaped

from jaxensemble.ops.annotations import AnyArray

Ints: TypeAlias = int | Sequence[int]
"""One number for every spatial axis, or one for each."""


def each(value: Ints, spatial: int) -> tuple[int, ...]:
    """One number for each spatial axis.

    >>> each(2, 3), each((1, 2), 2)
    ((2, 2, 2), (1, 2))
    """
    return (value,) * spatial if isinstance(value, int) else tuple(value)


def window_count(size: int, window: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> int:
    """The number of windows along one axis, as PyTorch's pooling counts them.

    With `ceil_mode` a last window may reach beyond the padded axis, if it starts within the axis or its left padding
    (`pooling_output_shape` in PyTorch's `ATen/native/Pool.h`).

    >>> window_count(6, 3, 2, 0), window_count(6, 3, 2, 0, ceil_mode=True), window_count(4, 1, 2, 0, ceil_mode=True)
    (2, 3, 2)
    """
    room = size + 2 * padding - dilation * (window - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def window_pads(size: int, window: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> tuple[int, int]:
    """The padding before and after one axis that makes room for `window_count` windows and no more.

    >>> window_pads(6, 3, 2, 0, 1, ceil_mode=True)
    (0, 1)
    """
    count = window_count(size, window, stride, padding, dilation, ceil_mode)
    reach = (count - 1) * stride + dilation * (window - 1) + 1
    return padding, max(padding, reach - size - padding)


def take(x: Shaped[AnyArray, "..."], indices: Integer[np.ndarray, "..."], axis: int) -> Shaped[Array, "..."]:
    """Entries along one axis by a table of places within it: the axes of the table replace the axis.

    >>> take(jnp.arange(3.0), np.array([[0, 2]]), 0).tolist()
    [[0.0, 2.0]]
    """
    return jnp.take(x, indices.astype(np.int32), axis=axis, mode="clip")


def patches(
    x: Num[AnyArray, "... C"], window_shape: Sequence[int], strides: Ints = 1, padding: Ints = 0, dilation: Ints = 1
) -> Num[Array, "... C"]:
    """Every window of a feature map: `torch.nn.Unfold`, its axes kept apart.

    **Returns:** `[..., windows, window, windows, window, ..., C]`: for each spatial axis of `x`, padded with zeros,
    the window, and the place in it.

    >>> patches(jnp.arange(4.0).reshape(4, 1), (2,))[..., 0].tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    spatial = len(window_shape)
    strides, padding, dilation = each(strides, spatial), each(padding, spatial), each(dilation, spatial)
    lead = x.ndim - spatial - 1
    x = jnp.pad(x, [(0, 0)] * lead + [(p, p) for p in padding] + [(0, 0)])
    for k, window in enumerate(window_shape):
        axis = lead + 2 * k
        count = window_count(x.shape[axis], window, strides[k], 0, dilation[k])
        starts, offsets = strides[k] * np.arange(count), dilation[k] * np.arange(window)
        x = take(x, starts[:, None] + offsets, axis)
    return x


def overlap_add(
    columns: Num[AnyArray, "... C"],
    output_size: Sequence[int],
    strides: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
) -> Num[Array, "... C"]:
    """Puts windows back in their places and adds up overlaps: `torch.nn.Fold`, the transpose of `patches`.

    **Arguments:**

    - `columns`: `[..., windows, window, windows, window, ..., C]`, as `patches` gives them.
    - `output_size`: the spatial sizes of the result, without padding.

    **Returns:** `[..., *output_size, C]`.

    >>> overlap_add(jnp.ones((3, 2, 1)), (4,))[..., 0].tolist()
    [1.0, 2.0, 2.0, 1.0]
    """
    spatial = len(output_size)
    lead = columns.ndim - 2 * spatial - 1
    window_shape = columns.shape[lead + 1 : -1 : 2]
    shape = (*columns.shape[:lead], *output_size, columns.shape[-1])
    transpose = jax.linear_transpose(
        lambda x: patches(x, window_shape, strides, padding, dilation), jax.ShapeDtypeStruct(shape, columns.dtype)
    )
    return transpose(columns)[0]
