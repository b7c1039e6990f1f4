"""Concatenation and stacking."""

from collections.abc import Sequence

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import (
    arrange_alike,
    axis_argument,
    axis_of,
    relabel_dims,
    result_with_dims,
    settled_value,
)
from torch_bridge.lowering.dtypes import cast
from torch_bridge.lowering.layouts.layout import Layout, new_group
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value


@register("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(b: Builder, tensors: Sequence[Operand], dim: int = 0) -> Value:
    values = [b.value(tensor) for tensor in tensors]
    # PyTorch ignores empty vectors for historical reasons.
    values = [value for value in values if value.shape != (0,)] or values[:1]
    if len(values) == 1:
        return cast(b, settled_value(b, values[0]), b.dtype)
    values, order = arrange_alike(b, *[cast(b, value, b.dtype) for value in values])
    dim %= len(order)
    axis = axis_argument(order.index(dim), len(order))
    joined = b.emit("jnp.concatenate", [value.expr for value in values], axis=axis)
    new = {k: values[0].layout.dims[k] for k in range(len(order))} | {dim: new_group(b.result_shape[dim])}
    dims = tuple(new[k] for k in range(len(order)))
    return b.laid(joined, Layout(dims, tuple(dims[k] for k in order)))


@register("aten.stack.default")
def stack(b: Builder, tensors: Sequence[Operand], dim: int = 0) -> Value:
    values, order = arrange_alike(b, *[cast(b, b.value(tensor), b.dtype) for tensor in tensors])
    rank = len(order)
    dim %= rank + 1
    axis = rank if dim == rank else order.index(dim)
    new = new_group(len(values))
    joined = b.emit("jnp.stack", [value.expr for value in values], axis=axis_argument(axis, rank + 1))
    dims, axes = list(values[0].layout.dims), list(values[0].layout.axes)
    dims.insert(dim, new)
    axes.insert(axis, new)
    return b.laid(joined, Layout(tuple(dims), tuple(axes)))


def _pad_dims(b: Builder, tensor: Operand, before: Sequence[int]) -> Value:
    """The tensor with new dimensions of size one; `before[k]` is the number of those before a tensor of rank `k`."""
    value = settled_value(b, tensor)
    dims = value.layout.dims
    if value.ndim >= len(before):
        return value
    lead = before[value.ndim]
    return relabel_dims(value, (*((),) * lead, *dims, *((),) * (len(before) - lead - value.ndim)))


@register("aten.hstack.default")
def hstack(b: Builder, tensors: Sequence[Operand]) -> Value:
    values = [_pad_dims(b, tensor, (0,)) for tensor in tensors]
    return cat(b, values, 0 if values[0].ndim == 1 else 1)


@register("aten.vstack.default", "aten.row_stack.default")
def vstack(b: Builder, tensors: Sequence[Operand]) -> Value:
    return cat(b, [_pad_dims(b, tensor, (1, 1)) for tensor in tensors], 0)


@register("aten.dstack.default")
def dstack(b: Builder, tensors: Sequence[Operand]) -> Value:
    return cat(b, [_pad_dims(b, tensor, (1, 1, 0)) for tensor in tensors], 2)


@register("aten.column_stack.default")
def column_stack(b: Builder, tensors: Sequence[Operand]) -> Value:
    return cat(b, [_pad_dims(b, tensor, (0, 0)) for tensor in tensors], 1)


@register("aten.block_diag.default")
def block_diag(b: Builder, tensors: Sequence[Operand]) -> Value:
    return b.new(b.emit("jax.scipy.linalg.block_diag", *[b.plain(tensor).expr for tensor in tensors]))


@register("aten.diff.default")
def diff(
    b: Builder, x: Value, n: int = 1, dim: int = -1, prepend: Operand | None = None, append: Operand | None = None
) -> Value:
    values, order = arrange_alike(b, *[part for part in (x, prepend, append) if part is not None], lead=0)
    dim %= len(order)
    exprs = [value.expr for value in values]
    options: dict[str, Arg] = {"n": n} if n != 1 else {}
    options |= {"axis": axis_argument(order.index(dim), len(order))}
    names = [name for name, part in (("prepend", prepend), ("append", append)) if part is not None]
    options |= dict(zip(names, exprs[1:], strict=True))
    return result_with_dims(
        b, values[0], b.emit("jnp.diff", exprs[0], **options), {dim: new_group(b.result_shape[dim])}
    )


@register("aten.trapezoid.dx")
def trapezoid(b: Builder, x: Value, dx: float = 1, dim: int = -1) -> Value:
    value = b.tidy(x)
    dim %= value.ndim
    options: dict[str, Arg] = {"dx": dx} if dx != 1 else {}
    expr = b.emit("jnp.trapezoid", value.expr, **options, axis=axis_of(value, dim))
    dims = [group for k, group in enumerate(value.layout.dims) if k != dim]
    axes = [group for k, group in enumerate(value.layout.axes) if k != value.axis(dim)]
    return b.laid(expr, Layout(tuple(dims), tuple(axes)))
