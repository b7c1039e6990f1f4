"""Sampling feature maps `[N, *spatial, C]` at places that are computed: `grid_sample` and `affine_grid`.

Conventions are those of PyTorch's `ATen/native/GridSampler.h`. Places are given between -1 and 1, the last spatial axis
first, as in `torch.nn.functional.grid_sample`.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.interpolation import cubic_weights

Outside: TypeAlias = Literal["zeros", "border", "reflection"]
Tap: TypeAlias = tuple[Array, Array]
"""A place along one axis, as a whole number held in floating point, and its weight."""


def grid_sample(
    x: Float[AnyArray, "N *spatial C"],
    grid: Float[AnyArray, "N *out axes"],
    method: Literal["linear", "nearest", "cubic"] = "linear",
    *,
    padding_mode: Outside = "zeros",
    align_corners: bool = False,
) -> Float[Array, "N *out C"]:
    """`torch.nn.functional.grid_sample`; bilinear and trilinear are `"linear"`.

    **Arguments:**

    - `x`: `[N, *spatial, C]`.
    - `grid`: `[N, *out, len(spatial)]`, the places to sample. A place that is NaN holds zero, as on PyTorch's
      GPUs; PyTorch's CPU code has NaN there in the plane and zero in space.
    - `padding_mode`: the values outside of `x`.
    - `align_corners`: whether -1 and 1 are the centres of the outermost entries or their outer edges.

    **Returns:** `[N, *out, C]`.

    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> grid_sample(x, jnp.zeros((1, 1, 1, 2)))[0, 0, 0].tolist()
    [1.5]
    """
    sizes = x.shape[1:-1]
    axes = [
        _taps(grid[..., len(sizes) - 1 - k], size, method, padding_mode, align_corners) for k, size in enumerate(sizes)
    ]
    batch = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (grid.ndim - 2))
    total = jnp.zeros((*grid.shape[:-1], x.shape[-1]), x.dtype)
    for taps in itertools.product(*axes):
        weight = jnp.ones((), x.dtype)
        inside = jnp.ones((), bool)
        index = [batch]
        for (place, factor), size in zip(taps, sizes, strict=True):
            inside &= (place >= 0) & (place < size)
            weight = weight * factor
            index.append(jnp.clip(place, 0, size - 1).astype(jnp.int32))
        total += jnp.where(inside[..., None], x[tuple(index)] * weight[..., None], 0)
    return total


def _taps(grid: Array, size: int, method: str, padding_mode: Outside, align_corners: bool) -> list[Tap]:
    """The entries along one axis that a place is made of."""
    place = (grid + 1) / 2 * (size - 1) if align_corners else ((grid + 1) * size - 1) / 2
    if method == "cubic":  # the four entries are clipped or reflected, not the place
        first = jnp.floor(place)
        weights = cubic_weights(place - first)
        places = [_move_inside(first + k, size, padding_mode, align_corners) for k in range(-1, 3)]
        return list(zip(places, weights, strict=True))
    place = _move_inside(place, size, padding_mode, align_corners)
    if method == "nearest":
        return [(jnp.round(place), jnp.ones((), place.dtype))]
    first = jnp.floor(place)
    return [(first, first + 1 - place), (first + 1, place - first)]


def _move_inside(place: Array, size: int, padding_mode: Outside, align_corners: bool) -> Array:
    if padding_mode == "zeros":
        return place
    if padding_mode == "reflection":
        place = _reflect(place, 0.0, size - 1.0) if align_corners else _reflect(place, -0.5, size - 0.5)
    # Borders are outside as far as the gradient goes.
    return jnp.where(place <= 0, 0.0, jnp.where(place >= size - 1, size - 1.0, place))


def _reflect(place: Array, low: float, high: float) -> Array:
    if low == high:
        return jnp.zeros_like(place)
    span = high - low
    distance = jnp.where(place < low, low - place, place - low)
    turns = jnp.floor(distance / span)
    rest = distance - turns * span
    return jnp.where(turns % 2 == 0, rest, span - rest) + low


def affine_grid(
    theta: Float[AnyArray, "N axes axes+1"], size: Sequence[int], *, align_corners: bool = False
) -> Float[Array, "N *size axes"]:
    """`torch.nn.functional.affine_grid`: the places of a regular grid under an affine map.

    **Arguments:**

    - `theta`: `[N, axes, axes + 1]`.
    - `size`: the spatial sizes of the grid, `axes` of them.

    **Returns:** `[N, *size, axes]`.

    >>> affine_grid(jnp.eye(2, 3)[None], (1, 2))[0, 0].tolist()
    [[-0.5, 0.0], [0.5, 0.0]]
    """
    axes = len(size)
    result = jnp.broadcast_to(theta[:, :, axes].reshape(-1, *(1,) * axes, axes), (theta.shape[0], *size, axes))
    for k, count in enumerate(size):
        places = jnp.linspace(-1, 1, count, dtype=theta.dtype) if count > 1 else jnp.zeros(1, theta.dtype)
        if not align_corners:
            places = places * (count - 1) / count
        column = theta[:, :, axes - 1 - k].reshape(-1, *(1,) * axes, axes)
        result += column * places.reshape(-1, *(1,) * (axes - k))
    return result
