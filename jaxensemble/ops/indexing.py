"""Reads and writes by index with PyTorch's semantics, as functions that return the changed array.

Every function takes the axis that PyTorch's function takes, and leaves its arguments as they are.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, Num, Shaped

from jaxensemble.ops.annotations import AnyArray

Reduction = Literal["sum", "prod", "mean", "amax", "amin"]


def _index_axis(axis: int, rank: int, item: Any) -> tuple[Any, ...]:
    """An index that takes `item` along one axis."""
    return (*(slice(None),) * (axis % rank), item)


def select_scatter(
    x: Shaped[AnyArray, "*shape"], y: Shaped[ArrayLike, "..."], axis: int, index: int
) -> Shaped[Array, "*shape"]:
    """`x` with `x[..., index, ...]` replaced by `y`: `torch.select_scatter`.

    >>> select_scatter(jnp.zeros((2, 2)), jnp.ones(2), 1, 0).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    return jnp.asarray(x).at[_index_axis(axis, x.ndim, index)].set(y)


def slice_scatter(
    x: Shaped[AnyArray, "*shape"],
    y: Shaped[ArrayLike, "..."],
    axis: int,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> Shaped[Array, "*shape"]:
    """`x` with `x[..., start:stop:step, ...]` replaced by `y`: `torch.slice_scatter`.

    >>> slice_scatter(jnp.zeros(4), jnp.ones(2), 0, 1, step=2).tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    x, axis = jnp.asarray(x), axis % x.ndim
    if step != 1:
        return x.at[_index_axis(axis, x.ndim, slice(start, stop, step))].set(y)
    # Before and after it, `x` is copied: a scatter would count as mixing rows, and take longer.
    first, last, _ = slice(start, stop).indices(x.shape[axis])
    last = max(first, last)
    shape = (*x.shape[:axis], last - first, *x.shape[axis + 1 :])
    before, after = lax.slice_in_dim(x, 0, first, axis=axis), lax.slice_in_dim(x, last, None, axis=axis)
    return jnp.concatenate([before, jnp.broadcast_to(jnp.asarray(y, x.dtype), shape), after], axis)


def diagonal_scatter(
    x: Shaped[AnyArray, "*shape"], y: Shaped[ArrayLike, "..."], offset: int = 0, axis1: int = 0, axis2: int = 1
) -> Shaped[Array, "*shape"]:
    """`x` with the diagonal over two axes replaced by `y`, whose last axis runs along it: `torch.diagonal_scatter`.

    >>> diagonal_scatter(jnp.zeros((2, 2)), jnp.array([1.0, 2.0])).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    moved = jnp.moveaxis(x, (axis1, axis2), (-2, -1))
    rows, columns = _diagonal(moved.shape[-2], moved.shape[-1], offset)
    return jnp.moveaxis(moved.at[..., rows, columns].set(y), (-2, -1), (axis1, axis2))


def diag_embed(
    x: Shaped[AnyArray, "*batch n"], offset: int = 0
) -> Shaped[Array, "*batch {x.shape[-1]+abs(offset)} {x.shape[-1]+abs(offset)}"]:
    """Matrices with the last axis of `x` on a diagonal, zeros elsewhere: `torch.diag_embed`.

    >>> diag_embed(jnp.array([1.0, 2.0])).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    size = x.shape[-1] + abs(offset)
    rows, columns = _diagonal(size, size, offset)
    return jnp.zeros((*x.shape[:-1], size, size), x.dtype).at[..., rows, columns].set(x)


def _diagonal(rows: int, columns: int, offset: int) -> tuple[Array, Array]:
    count = min(rows + min(offset, 0), columns - max(offset, 0))
    return jnp.arange(count) - min(offset, 0), jnp.arange(count) + max(offset, 0)


def unfold(x: Shaped[AnyArray, "..."], size: int, step: int, axis: int = -1) -> Shaped[Array, "..."]:
    """Windows of `size` elements, `step` apart, along an axis: it becomes two, `[..., windows, size, ...]`.

    `torch.Tensor.unfold` puts the second one last.

    >>> unfold(jnp.arange(5), 3, 2).tolist()
    [[0, 1, 2], [2, 3, 4]]
    """
    axis %= x.ndim
    starts = jnp.arange(0, x.shape[axis] - size + 1, step)
    return jnp.take(x, starts[:, None] + jnp.arange(size), axis)


def index_add(
    x: Shaped[AnyArray, "*shape"], axis: int, index: Integer[AnyArray, "..."], y: Shaped[ArrayLike, "..."]
) -> Shaped[Array, "*shape"]:
    """`x` with slices of `y` added to the slices that `index` names; a slice named twice gets both: `torch.index_add`.

    >>> index_add(jnp.zeros(3), 0, jnp.array([0, 2, 0]), jnp.ones(3)).tolist()
    [2.0, 0.0, 1.0]
    """
    return jnp.asarray(x).at[_index_axis(axis, x.ndim, index)].add(y)


def index_copy(
    x: Shaped[AnyArray, "*shape"], axis: int, index: Integer[AnyArray, "..."], y: Shaped[ArrayLike, "..."]
) -> Shaped[Array, "*shape"]:
    """`x` with the slices that `index` names replaced by slices of `y`, or by a number: `torch.index_copy`.

    >>> index_copy(jnp.zeros(3), 0, jnp.array([0, 2]), jnp.array([1.0, 2.0])).tolist()
    [1.0, 0.0, 2.0]
    """
    return jnp.asarray(x).at[_index_axis(axis, x.ndim, index)].set(y)


def index_put(
    x: Shaped[AnyArray, "*shape"],
    index: Sequence[Integer[AnyArray, "..."] | Bool[AnyArray, "..."] | None],
    y: Shaped[ArrayLike, "..."],
    *,
    accumulate: bool = False,
) -> Shaped[Array, "*shape"]:
    """`x` with `x[index]` replaced by `y`, or `y` added to it; None is a whole axis: `torch.index_put`.

    >>> index_put(jnp.zeros((2, 2)), (None, jnp.array([1])), 5.0).tolist()
    [[0.0, 5.0], [0.0, 5.0]]
    """
    place = jnp.asarray(x).at[tuple(slice(None) if item is None else item for item in index)]
    return place.add(y) if accumulate else place.set(y)


def put(
    x: Shaped[AnyArray, "*shape"],
    index: Integer[AnyArray, "..."],
    y: Shaped[ArrayLike, "..."],
    *,
    accumulate: bool = False,
) -> Shaped[Array, "*shape"]:
    """`x` with the elements that `index` counts through all axes replaced by `y`, or `y` added to them: `torch.put`.

    >>> put(jnp.zeros((2, 2)), jnp.array([1, 2]), jnp.array([5.0, 6.0])).tolist()
    [[0.0, 5.0], [6.0, 0.0]]
    """
    return index_put(x.ravel(), (index,), y, accumulate=accumulate).reshape(x.shape)


def scatter(
    x: Shaped[AnyArray, "*shape"], axis: int, index: Integer[AnyArray, "..."], y: Shaped[ArrayLike, "..."]
) -> Shaped[Array, "*shape"]:
    """`x` with the elements that `index` names along an axis replaced by those of `y`, or by a number: `torch.scatter`.

    `index` and `y` have one axis for each of `x`, and may be smaller: `y[i, j]` goes to `[index[i, j], j]` for axis 0.

    >>> scatter(jnp.zeros((2, 2)), 0, jnp.array([[1, 0]]), jnp.array([[5.0, 6.0]])).tolist()
    [[0.0, 6.0], [5.0, 0.0]]
    """
    return jnp.asarray(x).at[_places(axis, index)].set(_cut(y, index))


def scatter_add(
    x: Shaped[AnyArray, "*shape"], axis: int, index: Integer[AnyArray, "..."], y: Shaped[ArrayLike, "..."]
) -> Shaped[Array, "*shape"]:
    """`scatter` that adds to `x`, and adds up all elements that go to one place: `torch.scatter_add`.

    >>> scatter_add(jnp.ones(2), 0, jnp.array([0, 0]), jnp.array([2.0, 3.0])).tolist()
    [6.0, 1.0]
    """
    return jnp.asarray(x).at[_places(axis, index)].add(_cut(y, index))


def scatter_reduce(
    x: Shaped[AnyArray, "*shape"],
    axis: int,
    index: Integer[AnyArray, "..."],
    y: Shaped[ArrayLike, "..."],
    reduce: Reduction,
    *,
    include_self: bool = True,
) -> Shaped[Array, "*shape"]:
    """`scatter` that combines all elements of one place, and that of `x` if `include_self`: `torch.scatter_reduce`.

    Equal largest elements share the gradient evenly. Takes memory for every pair of a source and a place along the
    axis, unless it sums.

    >>> scatter_reduce(jnp.zeros(2), 0, jnp.array([0, 0]), jnp.array([2.0, 3.0]), "amax").tolist()
    [3.0, 0.0]
    """
    if reduce in ("sum", "mean"):
        start = x if include_self else jnp.where(_counts(x, axis, index) > 0, jnp.zeros_like(x), x)
        total = scatter_add(start, axis, index, y)
        count = jnp.maximum(_counts(x, axis, index) + include_self, 1)
        return total if reduce == "sum" else _divide(total, count)
    region = tuple(slice(size if k != axis % x.ndim else None) for k, size in enumerate(index.shape))
    changed = _combine(x[region], axis, index, _cut(y, index), reduce, include_self)
    return jnp.asarray(x).at[region].set(changed)


def _combine(x: Array, axis: int, index: Array, y: Array, reduce: Reduction, include_self: bool) -> Array:
    combine, neutral = {
        "prod": (jnp.prod, 1),
        "amax": (jnp.max, _extreme(x.dtype, -1)),
        "amin": (jnp.min, _extreme(x.dtype, 1)),
    }[reduce]
    x, index, y = (jnp.moveaxis(array, axis, -1) for array in (x, index, y))
    goes = index[..., None, :] == jnp.arange(x.shape[-1])[:, None]
    reached = jnp.any(goes, -1)
    parts = jnp.where(goes, y[..., None, :], neutral)
    own = jnp.where(include_self | ~reached, x, neutral)
    return jnp.moveaxis(combine(jnp.concatenate([own[..., None], parts], -1), axis=-1), -1, axis)


def _extreme(dtype: Any, sign: int) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return sign * jnp.inf
    return jnp.iinfo(dtype).max if sign > 0 else jnp.iinfo(dtype).min


def _divide(total: Array, count: Array) -> Array:
    return total / count.astype(total.dtype) if jnp.issubdtype(total.dtype, jnp.inexact) else total // count


def _counts(x: Shaped[AnyArray, "*shape"], axis: int, index: Integer[AnyArray, "..."]) -> Integer[Array, "*shape"]:
    return scatter_add(jnp.zeros(x.shape, int), axis, index, 1)


def _places(axis: int, index: Array) -> tuple[Array, ...]:
    grid = list(jnp.indices(index.shape, sparse=True))
    grid[axis] = index
    return tuple(grid)


def _cut(y: ArrayLike, index: Array) -> Array:
    y = jnp.asarray(y)
    return y[tuple(map(slice, index.shape))] if y.ndim else y


def masked_scatter(
    x: Shaped[AnyArray, "*shape"], mask: Bool[AnyArray, "..."], y: Shaped[AnyArray, "..."]
) -> Shaped[Array, "*shape"]:
    """`x` with the elements where `mask` is true replaced by elements of `y`, in order: `torch.masked_scatter`.

    >>> masked_scatter(jnp.zeros(3), jnp.array([True, False, True]), jnp.array([5.0, 6.0])).tolist()
    [5.0, 0.0, 6.0]
    """
    mask = jnp.broadcast_to(mask, x.shape)
    order = jnp.maximum(jnp.cumsum(mask.ravel()) - 1, 0).reshape(x.shape)
    return jnp.where(mask, y.ravel()[order], x)


def searchsorted(
    boundaries: Num[AnyArray, "*batch n"], x: Num[AnyArray, "*batch k"], *, side: Literal["left", "right"] = "left"
) -> Integer[Array, "*batch k"]:
    """The place of each element of `x` among `boundaries`, row by row: both have the same leading axes.

    >>> searchsorted(jnp.array([[1.0, 2.0], [5.0, 6.0]]), jnp.array([[1.5], [7.0]])).tolist()
    [[1], [2]]
    """
    find = lambda rows, values: jnp.searchsorted(rows, values, side=side)  # noqa: E731
    for _ in range(boundaries.ndim - 1):
        find = jax.vmap(find)
    return find(boundaries, x)


def histogram_counts(x: Num[AnyArray, "..."], bins: int, low: float = 0, high: float = 0) -> Num[Array, " {bins}"]:
    """The number of elements of `x` in each of `bins` equal parts of `[low, high]`, in the dtype of `x`: `torch.histc`.

    Elements outside are not counted. If both bounds are equal, the least and the largest element are used.

    >>> histogram_counts(jnp.array([0.0, 1.0, 1.5, 9.0]), 2, 0, 2).tolist()
    [1.0, 2.0]
    """
    x = x.ravel()
    start, end = (jnp.min(x), jnp.max(x)) if low == high else (jnp.asarray(low, x.dtype), jnp.asarray(high, x.dtype))
    alike = start == end
    start, end = jnp.where(alike, start - 1, start), jnp.where(alike, end + 1, end)
    place = jnp.minimum(((x - start) * bins / (end - start)).astype(int), bins - 1)
    counted = (x >= start) & (x <= end)
    return jnp.zeros(bins, x.dtype).at[jnp.where(counted, place, bins)].add(1, mode="drop")
