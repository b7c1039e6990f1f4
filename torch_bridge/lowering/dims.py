"""Values by PyTorch's dimensions: their stored axes, and results in which some dimensions are new."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from jaxensemble.network.network import Arg, Ref, Slice, Var
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.layouts.layout import Group, Layout, Size, tidy_axes
from torch_bridge.lowering.values import Operand, Value


def settled_value(b: Builder, operand: Operand) -> Value:
    """An operand whose storage is settled. A weight that is still open is stored as PyTorch sees it."""
    value = b.value(operand)
    return b.plain(value) if value.open else value


def relabel_dims(value: Value, dims: Sequence[Group]) -> Value:
    """The same array with other dimensions."""
    return Value(value.expr, Layout(tuple(dims), value.layout.axes), value.dtype)


def axis_argument(axis: int, rank: int) -> int:
    """An axis as a programmer writes it: the last one as -1, unless it is the only one."""
    return -1 if axis == rank - 1 and rank > 1 else axis


def axis_of(value: Value, dim: int) -> int:
    """The stored axis of a dimension of a tidy value, as an argument."""
    return axis_argument(value.axis(dim), len(value.layout.axes))


def index_at(axis: int, rank: int, item: Arg) -> Arg:
    """An index that takes `item` along one axis and everything along the others."""
    if axis == 0:
        return item
    return (..., item) if axis == rank - 1 and axis > 1 else (*(Slice(),) * axis, item)


def result_with_dims(
    b: Builder, tidy: Value, expr: Ref | Var, new: Mapping[int, Group], dtype: torch.dtype | None = None
) -> Value:
    """The result of a call on a tidy value that keeps its axes. The dimensions of `new` have new atoms."""
    dims, axes = list(tidy.layout.dims), list(tidy.layout.axes)
    order = tidy.axis_order
    for dim, group in new.items():
        dims[dim] = axes[order[dim]] = group
    return b.laid(expr, Layout(tuple(dims), tuple(axes)), dtype)


def result_without_dims(
    b: Builder, tidy: Value, expr: Ref | Var, gone: Collection[int], dtype: torch.dtype | None = None
) -> Value:
    """The result of a call on a tidy value that removes the dimensions `gone` and their axes."""
    order = tidy.axis_order
    axes_gone = {order[dim] for dim in gone}
    dims = tuple(group for dim, group in enumerate(tidy.layout.dims) if dim not in gone)
    axes = tuple(group for axis, group in enumerate(tidy.layout.axes) if axis not in axes_gone)
    return b.laid(expr, Layout(dims, axes), dtype)


def arrange_alike(b: Builder, *operands: Operand, lead: int | None = None) -> tuple[list[Value], tuple[int, ...]]:
    """Arranges operands of equal rank in one order, with one axis per dimension.

    **Arguments:** `lead` is the number of the operand whose order is taken. Without it, an operand leads that is not
    stored as PyTorch sees it, if there is one.

    **Returns:** the values, and the dimensions in the order of the axes.
    """
    values = [b.value(operand) for operand in operands]
    keys = [value.key for value in values if value.open]
    values = [b.plain(v) if v.open and keys.count(v.key) > 1 else v for v in values]
    lead = _lead(values) if lead is None else lead
    order = stored_order(values[lead])
    return [b.arrange(value, tuple(value.layout.dims[dim] for dim in order)) for value in values], order


def stored_order(value: Value) -> tuple[int, ...]:
    """The dimensions in the order in which a tidy arrangement stores them."""
    tidy = Value(value.expr, Layout(value.layout.dims, tidy_axes(value.layout)), value.dtype)
    return tuple(sorted(range(value.ndim), key=tidy.axis))


def _lead(values: Sequence[Value]) -> int:
    def rank(k: int) -> tuple[bool, bool, int]:
        value = values[k]
        order = stored_order(value)
        return not isinstance(value.expr, Var), order != tuple(sorted(order)), sum(map(bool, value.layout.dims))

    return max(range(len(values)), key=rank)


def shape_argument(b: Builder, shape: Sequence[Size], near: Sequence[Value] = ()) -> tuple[Arg, ...]:
    """A shape as an argument. Sizes that depend on the batch size are read from the `near` arrays first."""
    known = [(value.expr, value.layout.stored_shape) for value in near]
    return tuple(b.size(entry, known) for entry in shape)


def element_count(value: Value) -> Size:
    """The number of elements of a value."""
    return math.prod(value.shape, start=1)


def named_dims(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The dimensions that an argument names, in ascending order. An argument that names none means all of them."""
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return tuple(range(rank))
    named = (dims,) if isinstance(dims, int) else dims
    return tuple(sorted({dim % rank for dim in named})) if rank else ()
