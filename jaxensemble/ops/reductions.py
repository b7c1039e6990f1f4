"""Reductions whose values or gradients differ in PyTorch from those of `jax.numpy`.

The `arg...` functions give the places of elements along an axis. The axis stays, with size one, or with its own size if
there is a place for every element. `jnp.take_along_axis` then gives the elements, whose gradient goes to these places
alone, as in PyTorch.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, Real, Shaped

from jaxensemble.ops.annotations import AnyArray

Axes = int | Sequence[int] | None


def root(square: Float[ArrayLike, "*shape"], degree: float = 2) -> Float[Array, "*shape"]:
    """The root of numbers that are not negative, with gradient 0 at 0, where the power's gradient is infinite.

    >>> import jax
    >>> root(jnp.array([0.0, 4.0])).tolist(), jax.grad(root)(0.0).item()
    ([0.0, 2.0], 0.0)
    """
    zero = square == 0
    safe = jnp.where(zero, 1, square)
    return jnp.where(zero, 0, jnp.sqrt(safe) if degree == 2 else safe ** (1 / degree))


def std(
    x: Num[AnyArray, "..."], axis: Axes = None, *, correction: float = 1, keepdims: bool = False
) -> Float[Array, "..."]:
    """The standard deviation, `sqrt(sum((x - mean)²) / (n - correction))`, with gradient 0 where it is 0.

    Source: `std_backward` in torch/csrc/autograd/FunctionsManual.cpp.

    >>> std(jnp.array([1.0, 2.0, 3.0])).item()
    1.0
    """
    axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
    return root(jnp.var(x, axis, correction=correction, keepdims=keepdims))


def vector_norm(
    x: Num[AnyArray, "..."], ord: float = 2, axis: Axes = None, *, keepdims: bool = False
) -> Num[Array, "..."]:
    """`sum(|x|^ord)^(1 / ord)` over one, several or all axes; `ord` may also be 0, inf or -inf.

    The gradient is 0 where the norm is 0, and shared evenly among equal largest elements. Source: `norm_backward` in
    torch/csrc/autograd/FunctionsManual.cpp.

    >>> vector_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]), axis=1).tolist()
    [5.0, 0.0]
    """
    axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
    if ord == 0:
        return jnp.sum(jnp.where(x != 0, 1, 0).astype(x.real.dtype), axis, keepdims=keepdims)
    if ord == 2:
        return root(jnp.sum(x * x if jnp.isrealobj(x) else x.real**2 + x.imag**2, axis, keepdims=keepdims))
    size = jnp.abs(x)
    if math.isinf(ord):
        return (jnp.max if ord > 0 else jnp.min)(size, axis, keepdims=keepdims)
    if ord == 1:
        return jnp.sum(size, axis, keepdims=keepdims)
    powers = size**ord if ord > 1 or ord < 0 else jnp.where(size == 0, 0, jnp.where(size == 0, 1, size) ** ord)
    return root(jnp.sum(powers, axis, keepdims=keepdims), ord)


def median(x: Real[AnyArray, "..."]) -> Real[Array, ""]:
    """The median of all elements, the lower of two; NaN if any element is NaN. Equal elements share its gradient.

    >>> median(jnp.array([[4.0, 1.0], [3.0, 2.0]])).item()
    2.0
    """
    flat = x.ravel()
    return _shared(flat, jnp.take_along_axis(flat, argmedian(flat), 0)[0])


def nanmedian(x: Real[AnyArray, "..."]) -> Real[Array, ""]:
    """The median of all elements except NaNs, the lower of two. Equal elements share its gradient.

    >>> nanmedian(jnp.array([[4.0, 1.0], [3.0, jnp.nan]])).item()
    3.0
    """
    flat = x.ravel()
    return _shared(flat, jnp.take_along_axis(flat, argnanmedian(flat), 0)[0])


def _shared(x: Real[AnyArray, " n"], value: Real[AnyArray, ""]) -> Real[Array, ""]:
    """The value, as a function of all elements that are equal to it."""
    value = lax.stop_gradient(value)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return value
    equal = (x == value) | (jnp.isnan(x) & jnp.isnan(value))
    return value + jnp.sum(jnp.where(equal, x - lax.stop_gradient(x), 0)) / jnp.sum(equal)


def argmedian(x: Real[AnyArray, "..."], axis: int = -1) -> Int[Array, "..."]:
    """The place of the median along an axis: of the lower of two, or of a NaN. The axis stays, with size one.

    >>> argmedian(jnp.array([4.0, 1.0, 3.0, 2.0])).tolist()
    [3]
    """
    middle = _nth(jnp.argsort(x, axis), (x.shape[axis] - 1) // 2, axis)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return middle
    missing = jnp.isnan(x)
    first = jnp.argmax(missing, axis, keepdims=True)
    return jnp.where(jnp.any(missing, axis, keepdims=True), first, middle)


def argnanmedian(x: Real[AnyArray, "..."], axis: int = -1) -> Int[Array, "..."]:
    """The place of the median of all except NaNs along an axis, the lower of two. The axis stays, with size one.

    >>> argnanmedian(jnp.array([4.0, jnp.nan, 3.0, 2.0])).tolist()
    [2]
    """
    count = jnp.sum(~jnp.isnan(x), axis, keepdims=True)
    return jnp.take_along_axis(jnp.argsort(x, axis), jnp.maximum(count - 1, 0) // 2, axis)


def argkth(x: Shaped[AnyArray, "..."], k: int, axis: int = -1) -> Int[Array, "..."]:
    """The place of the `k`-th smallest element along an axis, counted from 1. The axis stays, with size one.

    >>> argkth(jnp.array([4.0, 1.0, 3.0]), 2).tolist()
    [2]
    """
    return _nth(jnp.argsort(x, axis), k - 1, axis)


def _nth(x: Array, n: int, axis: int) -> Array:
    return lax.slice_in_dim(x, n, n + 1, axis=axis)


def argmode(x: Shaped[AnyArray, "..."], axis: int = -1) -> Int[Array, "..."]:
    """The last place of the most frequent element, the smallest of several, along an axis, which stays with size one.

    >>> argmode(jnp.array([3, 1, 3, 1, 2])).tolist()
    [3]
    """
    rows = jnp.moveaxis(x, axis, -1)
    equal = rows[..., :, None] == rows[..., None, :]
    if jnp.issubdtype(x.dtype, jnp.inexact):
        equal |= jnp.isnan(rows)[..., :, None] & jnp.isnan(rows)[..., None, :]
    count = jnp.sum(equal, -1)
    order = jnp.argsort(rows, -1)
    ranked = jnp.take_along_axis(count, order, -1)
    winner = jnp.take_along_axis(order, jnp.argmax(ranked, -1, keepdims=True), -1)
    same = jnp.take_along_axis(equal, winner[..., None], -2)[..., 0, :]
    last = same.shape[-1] - 1 - jnp.argmax(same[..., ::-1], -1, keepdims=True)
    return jnp.moveaxis(last, -1, axis)


def argcummax(x: Real[AnyArray, "*shape"], axis: int = -1) -> Int[Array, "*shape"]:
    """The place of the largest element so far along an axis, the last of equal elements; a NaN stays the largest.

    >>> argcummax(jnp.array([1.0, 3.0, 2.0, 3.0])).tolist()
    [0, 1, 1, 3]
    """
    return _argcum(x, lax.cummax(x, axis % x.ndim), axis % x.ndim)


def argcummin(x: Real[AnyArray, "*shape"], axis: int = -1) -> Int[Array, "*shape"]:
    """The place of the smallest element so far along an axis, the last of equal elements; a NaN stays the smallest.

    >>> argcummin(jnp.array([2.0, 3.0, 1.0, 1.0])).tolist()
    [0, 0, 2, 3]
    """
    return _argcum(x, lax.cummin(x, axis % x.ndim), axis % x.ndim)


def _argcum(x: Real[AnyArray, "*shape"], extreme: Real[AnyArray, "*shape"], axis: int) -> Int[Array, "*shape"]:
    reached = x == extreme
    if jnp.issubdtype(x.dtype, jnp.inexact):
        reached |= jnp.isnan(x)
    place = lax.broadcasted_iota(int, x.shape, axis)
    return lax.cummax(jnp.where(reached, place, 0), axis)


def pairwise_distances(
    x: Num[AnyArray, "*#batch P M"], y: Num[AnyArray, "*#batch R M"], ord: float = 2
) -> Num[Array, "*batch P R"]:
    """The distance of every row of `x` `[..., P, M]` from every row of `y` `[..., R, M]`: `[..., P, R]`.

    >>> pairwise_distances(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
    [[5.0, 1.0]]
    """
    return vector_norm(x[..., :, None, :] - y[..., None, :, :], ord, axis=-1)


def renormalised(x: Num[AnyArray, "*shape"], ord: float, axis: int, limit: Num[ArrayLike, ""]) -> Num[Array, "*shape"]:
    """`x`, with every slice along an axis scaled down so that its norm is at most `limit`.

    Source: `renorm_scale_factor_impl` in aten/src/ATen/native: the factor is `limit / (norm + 1e-7)`.

    >>> renormalised(jnp.array([[3.0, 4.0], [0.0, 1.0]]), 2, 0, 2.5).round(4).tolist()
    [[1.5, 2.0], [0.0, 1.0]]
    """
    others = [k for k in range(x.ndim) if k != axis % x.ndim]
    norm = vector_norm(x, ord, others, keepdims=True)
    return jnp.where(norm > limit, x * (limit / (norm + 1e-7)), x)


def argsmallest(x: Shaped[AnyArray, "..."], k: int, axis: int = -1) -> Int[Array, "..."]:
    """The places of the `k` smallest elements along an axis, the smallest first.

    >>> argsmallest(jnp.array([4.0, 1.0, 3.0, 2.0]), 2).tolist()
    [1, 3]
    """
    return lax.slice_in_dim(jnp.argsort(x, axis), 0, k, axis=axis)
