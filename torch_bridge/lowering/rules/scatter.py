"""Writes by index."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import arrange_alike, axis_argument
from torch_bridge.lowering.dtypes import cast
from torch_bridge.lowering.rules.index import Index, integer_indices
from torch_bridge.lowering.rules.order import line_up
from torch_bridge.lowering.rules.shape import END, expand_to, reshape_to, slice_bounds
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value, as_number


@register("aten.copy.default")
def copy(b: Builder, x: Value, src: Operand, non_blocking: bool = False) -> Value:
    """The values of a tensor after `x.copy_(src)` or `x[...] = src`."""
    return expand_to(b, cast(b, src, b.dtype), b.result_shape)


def _write(b: Builder, target: str, x: Operand, dim: int, *rest: Any, **options: Arg) -> Value:
    """`target(x, axis, *rest)`, where the values among `rest` have the dimensions of `x`."""
    queue = [cast(b, item, b.dtype) if _is_floating(item) else item for item in rest]
    arrays = [item for item in queue if isinstance(item, Value) or (isinstance(item, Tensor) and item.ndim)]
    (value, *moved), order = arrange_alike(b, b.value(x), *arrays)
    if order:
        axis = axis_argument(order.index(dim % len(order)), len(order))
    else:
        (value, *moved), axis = [line_up(b, operand, 0)[0] for operand in (value, *moved)], 0
    values = iter(moved)
    args = [next(values).expr if any(item is array for array in arrays) else as_number(item) for item in queue]
    return b.laid(b.emit(target, value.expr, axis, *args, **options), value.layout)


def _is_floating(item: Any) -> bool:
    return isinstance(item, Value | Tensor) and (item.dtype.is_floating_point or item.dtype.is_complex)


@register("aten.select_scatter.default")
def select_scatter(b: Builder, x: Operand, src: Operand, dim: int, index: Any) -> Value:
    value, part = b.value(x), b.value(cast(b, src, b.dtype))
    dim %= value.ndim
    (value,), order = arrange_alike(b, value)
    axis = order.index(dim)
    part = b.arrange(part, tuple(part.layout.dims[k - (k > dim)] for k in order if k != dim))
    expr = b.emit("ops.select_scatter", value.expr, part.expr, axis_argument(axis, len(order)), b.size(index))
    return b.laid(expr, value.layout)


@register("aten.slice_scatter.default")
def slice_scatter(
    b: Builder, x: Operand, src: Operand, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    value, part = b.value(x), b.value(cast(b, src, b.dtype))
    dim %= value.ndim
    bounds = slice_bounds(b, value.shape[dim], start, END if end is None else end, step)
    if bounds is None:
        return part
    (value, part), order = arrange_alike(b, value, part, lead=0)
    axis = axis_argument(order.index(dim), len(order))
    args: list[Arg] = [] if bounds.start is None else [bounds.start]
    options: dict[str, Arg] = {} if bounds.stop is None else {"stop": bounds.stop}
    options |= {} if step == 1 else {"step": step}
    if args and "stop" in options:
        args.append(options.pop("stop"))
    return b.laid(b.emit("ops.slice_scatter", value.expr, part.expr, axis, *args, **options), value.layout)


@register("aten.diagonal_scatter.default")
def diagonal_scatter(b: Builder, x: Operand, src: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    value, part = b.plain(x), b.plain(cast(b, src, b.dtype))
    options: dict[str, Arg] = {"offset": offset} if offset else {}
    dims = (dim1 % value.ndim, dim2 % value.ndim)
    options |= {} if dims == (0, 1) else {"axis1": dims[0], "axis2": dims[1]}
    return b.new(b.emit("ops.diagonal_scatter", value.expr, part.expr, **options))


@register("aten.index_put.default")
def index_put(b: Builder, x: Operand, indices: Sequence[Index], values: Operand, accumulate: bool = False) -> Value:
    filled: Value | Tensor = cast(b, values, b.dtype)
    masks = [k for k, place in enumerate(indices) if isinstance(place, Value) and place.dtype == torch.bool]
    if masks:
        return _masked_put(b, b.value(x), indices, filled, accumulate)
    where = integer_indices(b, indices)
    named = [dim for dim, place in enumerate(where) if place is not None]
    if len(named) == 1 and b.value(where[named[0]]).ndim == 1:
        return _put_along(b, b.value(x), named[0], b.value(where[named[0]]), filled, accumulate)
    value = b.plain(x)
    places = tuple(None if place is None else b.plain(place).expr for place in where)
    what = as_number(filled) if isinstance(filled, Tensor) and filled.ndim == 0 else b.plain(filled).expr
    options: dict[str, Arg] = {"accumulate": True} if accumulate else {}
    return b.new(b.emit("ops.index_put", value.expr, places, what, **options))


def _put_along(b: Builder, x: Value, dim: int, index: Value, filled: Value | Tensor, accumulate: bool) -> Value:
    """`x[:, index] = y`, along the axis that stores the dimension."""
    target = "ops.index_add" if accumulate else "ops.index_copy"
    if isinstance(filled, Tensor) and filled.ndim == 0:
        return _write_indexed(b, target, x, dim, index, filled)
    shape = (*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    return _write_indexed(b, target, x, dim, index, expand_to(b, filled, shape))


def _masked_put(b: Builder, value: Value, indices: Sequence[Index], filled: Value | Tensor, accumulate: bool) -> Value:
    """`x[mask] = y`, where `y` has one value for all elements that the mask chooses."""
    named = [k for k, place in enumerate(indices) if place is not None]
    mask = indices[named[0]]
    assert isinstance(mask, Value)
    rest = value.ndim - named[0] - mask.ndim
    if len(named) > 1 or filled.ndim > rest + 1 or (filled.ndim == rest + 1 and filled.shape[0] != 1):
        raise b.unsupported(
            "x[mask] = y takes as many elements of y as the mask is true in, and XLA needs fixed sizes; use "
            "torch.where(mask, y, x) with y of the shape of x"
        )
    if filled.ndim == rest + 1:
        filled = filled[0] if isinstance(filled, Tensor) else reshape_to(b, filled, filled.shape[1:])
    wide = reshape_to(b, mask, (*mask.shape, *(1,) * rest))
    chosen = b.elementwise("+", value, filled, dtype=b.dtype) if accumulate else filled
    return b.elementwise("jnp.where", wide, chosen, value)


@register("aten.masked_scatter.default")
def masked_scatter(b: Builder, x: Operand, mask: Operand, source: Operand) -> Value:
    arrays = [expand_to(b, operand, b.result_shape) for operand in (x, mask)]
    return b.new(b.emit("ops.masked_scatter", *[b.plain(operand).expr for operand in (*arrays, source)]))


@register("aten.put.default")
def put(b: Builder, x: Operand, index: Operand, source: Operand, accumulate: bool = False) -> Value:
    options: dict[str, Arg] = {"accumulate": True} if accumulate else {}
    part = reshape_to(b, b.value(source), b.value(index).shape)
    return b.new(b.emit("ops.put", *[b.plain(operand).expr for operand in (x, index, part)], **options))


@register("aten.scatter.src", "aten.scatter.value")
def scatter(b: Builder, x: Operand, dim: int, index: Operand, src: Operand) -> Value:
    return _write(b, "ops.scatter", x, dim, b.value(index), src)


@register("aten.scatter_add.default")
def scatter_add(b: Builder, x: Operand, dim: int, index: Operand, src: Operand) -> Value:
    return _write(b, "ops.scatter_add", x, dim, b.value(index), src)


@register("aten.scatter_reduce.two")
def scatter_reduce(
    b: Builder, x: Operand, dim: int, index: Operand, src: Operand, reduce: str, *, include_self: bool = True
) -> Value:
    options: dict[str, Arg] = {} if include_self else {"include_self": False}
    return _write(b, "ops.scatter_reduce", x, dim, b.value(index), src, reduce=reduce, **options)


@register("aten.scatter.reduce")
def scatter_with(b: Builder, x: Operand, dim: int, index: Operand, src: Operand, *, reduce: str) -> Value:
    return scatter_reduce(b, x, dim, index, src, {"add": "sum", "multiply": "prod"}[reduce])


@register("aten.index_add.default")
def index_add(b: Builder, x: Operand, dim: int, index: Operand, source: Operand, *, alpha: complex = 1) -> Value:
    part = source if alpha == 1 else b.elementwise("*", source, alpha)
    return _write_indexed(b, "ops.index_add", x, dim, index, part)


@register("aten.index_reduce.default")
def index_reduce(
    b: Builder, x: Operand, dim: int, index: Operand, source: Operand, reduce: str, *, include_self: bool = True
) -> Value:
    part = b.value(source)
    dim %= max(part.ndim, 1)
    places = b.value(index)
    if part.ndim:
        places = reshape_to(b, places, [places.shape[0] if k == dim else 1 for k in range(part.ndim)])
    return scatter_reduce(b, x, dim, expand_to(b, places, part.shape), part, reduce, include_self=include_self)


@register("aten.index_copy.default")
def index_copy(b: Builder, x: Operand, dim: int, index: Operand, source: Operand) -> Value:
    return _write_indexed(b, "ops.index_copy", x, dim, index, source)


@register("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(b: Builder, x: Operand, dim: int, index: Operand, value: Operand) -> Value:
    return _write_indexed(b, "ops.index_copy", x, dim, index, value)


def _write_indexed(b: Builder, target: str, x: Operand, dim: int, index: Operand, part: Operand) -> Value:
    """`target(x, axis, index, part)`, along the axis that stores the dimension."""
    value = b.value(x)
    if not value.ndim:
        line = b.arrange(value, ((),))
        places = b.plain(reshape_to(b, b.value(index), b.value(index).shape or (1,)))
        what = b.plain(part).expr if isinstance(part, Value) else as_number(part)
        return b.laid(b.emit(target, line.expr, 0, places.expr, what), line.layout)
    if isinstance(part, Value) and part.ndim == value.ndim:
        (value, part), order = arrange_alike(b, value, cast(b, part, b.dtype), lead=0)
        what: Arg = part.expr
    else:
        (value,), order = arrange_alike(b, value)
        what = b.plain(part).expr if isinstance(part, Value) else as_number(part)
    axis = axis_argument(order.index(dim % value.ndim), value.ndim)
    return b.laid(b.emit(target, value.expr, axis, b.plain(index).expr, what), value.layout)
