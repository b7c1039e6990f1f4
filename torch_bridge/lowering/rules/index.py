"""Indexing, gathers, searches and histograms."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jaxensemble.network.network import Arg, Slice
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import arrange_alike, axis_argument, element_count, result_with_dims, settled_value
from torch_bridge.lowering.layouts.layout import Layout, new_group
from torch_bridge.lowering.rules.shape import expand_to, reshape_to
from torch_bridge.lowering.table import refuse, register
from torch_bridge.lowering.values import Operand, Value, fix_sizes

Index = Value | Tensor | None


# Reading


@register("aten.index.Tensor")
def index(b: Builder, x: Value, indices: Sequence[Index]) -> Value:
    value = settled_value(b, x)
    places = integer_indices(b, indices)
    _fix_mask_sizes(b, value, places)
    named = [dim for dim, place in enumerate(places) if place is not None]
    if len(named) == 1:
        return _index_one(b, value, named[0], places[named[0]])
    value = b.plain(value)
    item = tuple(Slice() if place is None else _place(b, place) for place in places)
    return b.new(b.emit("[]", value.expr, item))


def _fix_mask_sizes(b: Builder, value: Value, places: Sequence[Index]) -> None:
    """Fixes PyTorch's symbol for the number of elements that constant masks choose."""
    shapes = [() if place is None else b.value(place).shape for place in places]
    if all(isinstance(size, int) for shape in shapes for size in shape):
        wide = torch.broadcast_shapes(*shapes)
        named = [k for k, place in enumerate(places) if place is not None]
        start = named[0] if named == list(range(named[0], named[-1] + 1)) else 0
        fix_sizes(b.result.shape[start : start + len(wide)], wide)


def _index_one(b: Builder, value: Value, dim: int, place: Index) -> Value:
    """An index of one dimension, along the axis that stores this dimension."""
    value = b.tidy(value)
    axis = value.axis(dim)
    where = b.value(place)
    item = (*(Slice(),) * axis, _place(b, place))
    expr = b.emit("[]", value.expr, item if axis else item[0])
    new = tuple(new_group(size) for size in where.shape)
    dims, axes = value.layout.dims, value.layout.axes
    return b.laid(expr, Layout((*dims[:dim], *new, *dims[dim + 1 :]), (*axes[:axis], *new, *axes[axis + 1 :])))


def _place(b: Builder, place: Index) -> Arg:
    """An index as an argument: a number or an array."""
    return int(place) if isinstance(place, Tensor) and place.ndim == 0 else b.plain(place).expr


def integer_indices(b: Builder, indices: Sequence[Index]) -> list[Index]:
    """The indices, with constant masks replaced by the positions of their true elements.

    **Raises:** `UnsupportedError` for masks that are computed: the number of elements that they choose depends on
    values.
    """
    result: list[Index] = []
    for place in indices:
        if place is None or place.dtype not in (torch.bool, torch.uint8):
            result.append(place)
        elif isinstance(place, Tensor):
            result += place.nonzero(as_tuple=True)
        else:
            raise b.unsupported(
                "the size of x[mask] depends on the values of the mask, and XLA needs fixed sizes; use "
                "torch.where(mask, x, other) or multiply by the mask"
            )
    return result


@register("aten.index_select.default")
def index_select(b: Builder, x: Value, dim: int, index: Operand) -> Value:
    value = settled_value(b, x)
    where = (
        index.reshape(-1) if isinstance(index, Tensor) else reshape_to(b, b.value(index), b.value(index).shape or (1,))
    )
    return _index_one(b, value, dim % value.ndim, where) if value.ndim else value


@register("aten.take.default")
def take(b: Builder, x: Value, index: Operand) -> Value:
    return b.new(b.emit("jnp.take", b.plain(x).expr, b.plain(index).expr))


@register("aten.gather.default")
def gather(b: Builder, x: Operand, dim: int, index: Operand, *, sparse_grad: bool = False) -> Value:
    value, where = b.value(x), b.value(index)
    if not value.ndim:
        return expand_to(b, value, b.result_shape)
    return _take_along(b, _narrow(b, value, where, dim), where, dim)


def _narrow(b: Builder, value: Value, index: Value, dim: int) -> Value:
    """The value cut to the index's size in all other dimensions: `gather` and `scatter` ignore the rest."""
    cut = {
        k: size
        for k, (size, own) in enumerate(zip(index.shape, value.shape, strict=True))
        if k != dim % value.ndim and size != own
    }
    if not cut:
        return value
    value = b.tidy(value)
    items: list[Arg] = [Slice()] * value.ndim
    for k, size in cut.items():
        items[value.axis(k)] = Slice(None, b.size(size))
    new = {k: new_group(size) for k, size in cut.items()}
    return result_with_dims(b, value, b.emit("[]", value.expr, tuple(items)), new, value.dtype)


def _take_along(b: Builder, value: Value, where: Value, dim: int) -> Value:
    """Elements along a dimension, at the positions of an index of the same rank."""
    (first, second), order = arrange_alike(b, value, where)
    dim %= len(order)
    axis = axis_argument(order.index(dim), len(order))
    expr = b.emit("jnp.take_along_axis", first.expr, second.expr, axis=axis)
    dims = tuple(
        second.layout.dims[k] if k == dim else mine or other
        for k, (mine, other) in enumerate(zip(first.layout.dims, second.layout.dims, strict=True))
    )
    return b.laid(expr, Layout(dims, tuple(dims[k] for k in order)))


@register("aten.take_along_dim.default")
def take_along_dim(b: Builder, x: Operand, indices: Operand, dim: int | None = None) -> Value:
    if dim is None:
        flat = [reshape_to(b, b.plain(operand), (element_count(b.value(operand)),)) for operand in (x, indices)]
        return b.new(b.emit("jnp.take", *[b.plain(operand).expr for operand in flat]))
    return _take_along(b, b.value(x), b.value(indices), dim)


# Searching


@register("aten.bucketize.Tensor", "aten.bucketize.Scalar")
def bucketize(b: Builder, x: Operand, boundaries: Operand, *, out_int32: bool = False, right: bool = False) -> Value:
    return searchsorted(b, boundaries, x, right=right)


@register("aten.searchsorted.Tensor", "aten.searchsorted.Scalar")
def searchsorted(
    b: Builder,
    sorted_sequence: Operand,
    x: Operand,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Operand | None = None,
) -> Value:
    options: dict[str, Arg] = {"side": "right"} if right or side == "right" else {}
    bounds = b.plain(sorted_sequence)
    if sorter is not None:
        bounds = b.new(b.emit("jnp.take_along_axis", bounds.expr, b.plain(sorter).expr, axis=-1), bounds.shape)
    value = b.value(x) if bounds.ndim == 1 else b.plain(x)
    value = b.plain(value) if value.open else value
    target = "jnp.searchsorted" if bounds.ndim == 1 else "ops.searchsorted"
    return b.laid(b.emit(target, bounds.expr, value.expr, **options), value.layout)


@register("aten.isin.Tensor_Tensor")
def isin(b: Builder, x: Value, test: Operand, *, assume_unique: bool = False, invert: bool = False) -> Value:
    options: dict[str, Arg] = {"invert": True} if invert else {}
    value = settled_value(b, x)
    return b.laid(b.emit("jnp.isin", value.expr, b.plain(test).expr, **options), value.layout)


@register("aten.histc.default")
def histc(b: Builder, x: Value, bins: int = 100, min: float = 0, max: float = 0) -> Value:
    bounds: list[Arg] = [] if min == max == 0 else [min, max]
    return b.new(b.emit("ops.histogram_counts", b.plain(x).expr, bins, *bounds))


@register("aten.nonzero_static.default")
def nonzero_static(b: Builder, x: Value, *, size: int, fill_value: int = -1) -> Value:
    value = b.plain(x)
    if 0 in value.shape:
        return b.constant(torch.full((size, value.ndim), fill_value))
    return b.new(b.emit("jnp.argwhere", value.expr, size=size, fill_value=fill_value))


# Results without a fixed size


_SIZE = "the size of its result depends on values, and XLA needs fixed sizes"

refuse("aten.masked_select.default", f"{_SIZE}; use torch.where(mask, x, other) or multiply by the mask")
refuse(
    "aten.nonzero.default aten.nonzero_numpy.default aten.argwhere.default aten.where.default",
    f"{_SIZE}; use the mask itself, as in torch.where(mask, x, other), or its first k places, "
    "torch.nonzero_static(mask, size=k). Compute each expert for all rows, and multiply by its gate, which is zero for "
    "the rows of other experts",
)
refuse(
    "aten._unique2.default aten.unique_consecutive.default aten.unique_dim.default",
    f"{_SIZE}; sort the values, s = x.sort().values, and mark where a new value begins, s[1:] != s[:-1]",
)
COUNTS = "count with F.one_hot(x, n).sum(0), or add up weights with torch.zeros(n).index_add(0, x, weights)"
refuse("aten.bincount.default", f"{_SIZE}, with `minlength` too; {COUNTS}")


@register("aten.repeat_interleave.self_Tensor")
def repeat_interleave(
    b: Builder, x: Value, repeats: Operand, dim: int | None = None, *, output_size: Any = None
) -> Value:
    if not isinstance(repeats, Tensor):
        raise b.unsupported("the size of its result depends on values; give the repeats as constants")
    value = settled_value(b, x)
    value, dim = (value, dim) if dim is not None else (reshape_to(b, b.plain(value), (element_count(value),)), 0)
    size = value.shape[dim % value.ndim]
    if not isinstance(size, int):
        raise b.open_size_error("the number of repeats depends", size)
    where = torch.arange(size).repeat_interleave(repeats.expand(size) if repeats.numel() == 1 else repeats)
    fix_sizes([b.result.shape[dim]], [len(where)])
    return _index_one(b, value, dim % value.ndim, where)
