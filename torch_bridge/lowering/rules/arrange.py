"""Flips, rolls, diagonals, triangles, windows and grids."""

from collections.abc import Sequence

from jaxensemble.network.network import Slice
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import axis_of, relabel_dims, result_without_dims, settled_value
from torch_bridge.lowering.layouts.layout import Group, Layout, new_group
from torch_bridge.lowering.rules.shape import reshape_to, transpose
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value


@register("aten.flip.default")
def flip(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    value = b.tidy(x)
    axes = tuple(sorted(axis_of(value, dim) % value.ndim for dim in dims))
    if not axes:
        return value
    axis = axis_of(value, dims[0]) if len(axes) == 1 else axes
    return b.laid(b.emit("jnp.flip", value.expr, axis=axis), value.layout)


@register("aten.fliplr.default")
def fliplr(b: Builder, x: Value) -> Value:
    return flip(b, x, [1])


@register("aten.flipud.default")
def flipud(b: Builder, x: Value) -> Value:
    return flip(b, x, [0])


@register("aten.rot90.default")
def rot90(b: Builder, x: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Value:
    first, second = dims
    turns = k % 4
    if turns % 2 == 0:
        return flip(b, x, dims) if turns else x
    return transpose(b, flip(b, x, [second if turns == 1 else first]), first, second)


@register("aten.roll.default")
def roll(b: Builder, x: Value, shifts: Sequence[int], dims: Sequence[int] | None = None) -> Value:
    if not dims:
        return b.new(b.emit("jnp.roll", b.plain(x).expr, shifts[0]))
    value = b.tidy(x)
    axes = [axis_of(value, dim) for dim in dims]
    shift, axis = (tuple(shifts), tuple(axes)) if len(dims) > 1 else (shifts[0], axes[0])
    return b.laid(b.emit("jnp.roll", value.expr, shift, axis=axis), value.layout)


# Diagonals


@register("aten.diagonal.default")
def diagonal(b: Builder, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    value = b.tidy(x)
    gone = (dim1 % value.ndim, dim2 % value.ndim)
    options = {"offset": offset} if offset else {}
    axes = {"axis1": axis_of(value, dim1), "axis2": axis_of(value, dim2)}
    options |= axes if list(axes.values()) != [0, 1] else {}
    rest = result_without_dims(b, value, b.emit("jnp.diagonal", value.expr, **options), gone)
    last = new_group(b.result_shape[-1])
    return b.laid(rest.expr, Layout((*rest.layout.dims, last), (*rest.layout.axes, last)))


@register("aten.linalg_diagonal.default")
def linalg_diagonal(b: Builder, x: Value, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    return diagonal(b, x, offset, dim1, dim2)


@register("aten.diag.default")
def diag(b: Builder, x: Value, diagonal: int = 0) -> Value:
    """The diagonal of a matrix, or the matrix with a vector as its diagonal."""
    return b.new(b.emit("jnp.diag", b.plain(x).expr, *([diagonal] if diagonal else [])))


@register("aten.tril.default")
def tril(b: Builder, x: Value, diagonal: int = 0) -> Value:
    return _triangle(b, "jnp.tril", x, diagonal)


@register("aten.triu.default")
def triu(b: Builder, x: Value, diagonal: int = 0) -> Value:
    return _triangle(b, "jnp.triu", x, diagonal)


def _triangle(b: Builder, target: str, x: Value, diagonal: int) -> Value:
    """A triangle of the last two dimensions, in PyTorch's order."""
    value = b.tidy(x)
    if (value.axis(-2), value.axis(-1)) != (value.ndim - 2, value.ndim - 1):
        value = b.plain(x)
    return b.laid(b.emit(target, value.expr, *([diagonal] if diagonal else [])), value.layout)


# Windows and grids


@register("aten.unfold.default")
def unfold(b: Builder, x: Value, dimension: int, size: int, step: int) -> Value:
    """Windows along a dimension, which become a last dimension. Windows without overlap or gaps are a reshape."""
    value = settled_value(b, x)
    if not value.ndim:
        return b.new(b.emit("[]", b.plain(relabel_dims(value, ((),))).expr, Slice(None, size)), (size,))
    dim = dimension % value.ndim
    count = b.result_shape[dim]
    if size == step and value.shape[dim] == count * size:
        parts = reshape_to(b, value, (*value.shape[:dim], count, size, *value.shape[dim + 1 :]))
        dims = list(parts.layout.dims)
        return relabel_dims(parts, [*dims[: dim + 1], *dims[dim + 2 :], dims[dim + 1]])
    value = b.tidy(value)
    axis = value.axis(dim)
    windows = b.emit("ops.unfold", value.expr, size, step, axis=axis_of(value, dim))
    outer, inner = new_group(count), new_group(size)
    dims = [outer if k == dim else group for k, group in enumerate(value.layout.dims)]
    axes: list[Group] = [*value.layout.axes[:axis], outer, inner, *value.layout.axes[axis + 1 :]]
    return b.laid(windows, Layout((*dims, inner), tuple(axes)))


@register("aten.diag_embed.default")
def diag_embed(b: Builder, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    value = b.plain(x)
    shape = list(b.result_shape)
    rank = len(shape)
    first, second = dim1 % rank, dim2 % rank
    if first > second:
        first, second, offset = second, first, -offset
    batch = [k for k in range(rank) if k not in (first, second)]
    matrices = b.new(
        b.emit("ops.diag_embed", value.expr, *([offset] if offset else [])), [shape[k] for k in (*batch, first, second)]
    )
    place = [*batch, first, second]
    return relabel_dims(matrices, [matrices.layout.dims[place.index(k)] for k in range(rank)])


@register("aten.meshgrid.default", "aten.meshgrid.indexing")
def meshgrid(b: Builder, tensors: Sequence[Value], indexing: str = "ij") -> tuple[Value, ...]:
    lines = [settled_value(b, tensor) for tensor in tensors]
    lines = [b.plain(line if line.ndim else relabel_dims(line, ((),))) for line in lines]
    grids = b.emit("jnp.meshgrid", *[line.expr for line in lines], indexing=indexing)
    return tuple(b.new(b.emit("[]", grids, k)) for k in range(len(tensors)))
