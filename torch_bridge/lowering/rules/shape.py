"""Reshapes, permutations, slices and expansions."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxensemble.network.network import Slice
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import (
    axis_of,
    element_count,
    index_at,
    relabel_dims,
    result_with_dims,
    result_without_dims,
    settled_value,
    shape_argument,
)
from torch_bridge.lowering.layouts import alignment
from torch_bridge.lowering.layouts.layout import Layout, Size, new_group, reshape_layout, tidy_axes
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value, sizes

END = 2**63 - 1
"""The end of PyTorch's slices that have no end."""


@register(
    "aten.alias.default",
    "aten.contiguous.default",
    "aten.lift_fresh_copy.default",
)
def same(b: Builder, x: Value, memory_format: Any = None) -> Value:
    return x


# Changes of the layout alone: nothing is emitted


@register("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def reshape(b: Builder, x: Value, shape: Sequence[Size]) -> Value:
    return reshape_to(b, settled_value(b, x), b.result_shape)


@register("aten.flatten.using_ints", "aten.unflatten.int")
def flatten(b: Builder, x: Value, *_: Any) -> Value:
    return reshape_to(b, settled_value(b, x), b.result_shape)


def reshape_to(b: Builder, value: Value, shape: Sequence[Size]) -> Value:
    """The value with another shape: by its layout alone where the new dimensions consist of whole atoms."""
    layout = reshape_layout(value.layout, shape)
    if layout is not None:
        return Value(value.expr, layout, value.dtype)
    value = b.plain(value)
    args = b.shape_args(value.expr, value.layout.stored_shape, shape)
    return b.new(b.emit(".reshape", value.expr, *args), shape, value.dtype)


@register("aten.permute.default")
def permute(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    value = settled_value(b, x)
    return relabel_dims(value, [value.layout.dims[dim % value.ndim] for dim in dims])


@register("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(b: Builder, x: Value, dim0: int, dim1: int) -> Value:
    value = settled_value(b, x)
    order = list(range(value.ndim))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(b, value, order)


@register("aten.t.default", "aten.numpy_T.default")
def transpose_all(b: Builder, x: Value) -> Value:
    return relabel_dims(settled_value(b, x), settled_value(b, x).layout.dims[::-1])


@register("aten.detach.default")
def detach(b: Builder, x: Value) -> Value:
    return b.elementwise("lax.stop_gradient", x)


@register("aten.unsqueeze.default")
def unsqueeze(b: Builder, x: Value, dim: int) -> Value:
    value = settled_value(b, x)
    dims = list(value.layout.dims)
    dims.insert(dim % (value.ndim + 1), ())
    return relabel_dims(value, dims)


@register("aten.squeeze.default")
def squeeze_all(b: Builder, x: Value) -> Value:
    value = settled_value(b, x)
    _refuse_batch_squeeze(b, value, range(value.ndim))
    return relabel_dims(value, [group for group in value.layout.dims if group])


@register("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(b: Builder, x: Value, dim: int | Sequence[int]) -> Value:
    value = settled_value(b, x)
    named = {d % value.ndim for d in ((dim,) if isinstance(dim, int) else dim)} if value.ndim else set()
    _refuse_batch_squeeze(b, value, named)
    return relabel_dims(value, [group for k, group in enumerate(value.layout.dims) if group or k not in named])


def _refuse_batch_squeeze(b: Builder, value: Value, dims: Iterable[int]) -> None:
    """Checks that no open dimension is dropped: the rank of outputs would depend on the batch size.

    **Raises:** `UnsupportedError` if one is.
    """
    for size in (value.shape[dim] for dim in dims):
        if not isinstance(size, int):
            what = b.axis_name(size) or "batch"
            raise b.unsupported(f"it would drop a {what} of one as well; name another dimension, such as squeeze(-1)")


@register("aten.as_strided.default")
def as_strided(
    b: Builder, x: Value, size: Sequence[Size], stride: Sequence[Size], storage_offset: Size | None = None
) -> Value:
    """Strides that a reshape and a permutation of a contiguous tensor give: every element once."""
    order = sorted(range(len(size)), key=lambda k: (_number(stride[k]), _number(size[k])), reverse=True)
    step: Size = 1
    for k in reversed(order):
        if size[k] != 1 and stride[k] != step:
            raise b.unsupported("only strides that show every element once are carried over; use slices or unfold")
        step = step * size[k]
    value = settled_value(b, x)
    source = b.node.args[0].meta["val"]  # type: ignore[union-attr]
    if storage_offset or step != element_count(value) or not source.is_contiguous():
        raise b.unsupported("only strides that show every element once are carried over; use slices or unfold")
    value = reshape_to(b, value, [size[k] for k in order])
    return relabel_dims(value, [value.layout.dims[order.index(k)] for k in range(len(size))])


def _number(entry: Size) -> int:
    """A size as a key to sort by. Sizes that grow with the batch are larger than those that do not."""
    return entry if isinstance(entry, int) else END


# Parts


@register("aten.slice.Tensor", "aten.narrow_copy.default")
def slice_(b: Builder, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    value = settled_value(b, x)
    dim %= value.ndim
    if str(b.node.target) == "aten.narrow_copy.default":
        end = start + end
    bounds = slice_bounds(b, value.shape[dim], start, end, step)
    if bounds is None:
        return value
    value = b.tidy(value)
    axis, rank = value.axis(dim), value.ndim
    expr = b.emit("[]", value.expr, index_at(axis, rank, bounds))
    return result_with_dims(b, value, expr, {dim: new_group(b.result_shape[dim])})


def slice_bounds(b: Builder, size: Size, start: Any, end: Any, step: int) -> Slice | None:
    """A slice along a dimension of this size, or None if the slice is the whole dimension."""
    start = None if start is None or start == 0 or (isinstance(size, int) and start == -size) else start
    end = None if end is None or end == END or end == size or (_both_int(size, end) and end > size) else end
    if start is None and end is None and step == 1:
        return None
    first, last = (None if bound is None else b.size(bound) for bound in (start, end))
    return Slice(first, last, None if step == 1 else step)


def _both_int(first: Any, second: Any) -> bool:
    return isinstance(first, int) and isinstance(second, int)


@register("aten.select.int")
def select(b: Builder, x: Value, dim: int, index: Any) -> Value:
    value = settled_value(b, x)
    dim %= value.ndim
    if dim == value.ndim - 1 and value in b.pairs:
        return b.elementwise(("jnp.real", "jnp.imag")[index], b.pairs[value])
    if not value.layout.dims[dim]:
        return relabel_dims(value, [group for k, group in enumerate(value.layout.dims) if k != dim])
    value = b.tidy(value)
    expr = b.emit("[]", value.expr, index_at(value.axis(dim), value.ndim, b.size(index)))
    return result_without_dims(b, value, expr, {dim})


@register("aten.unbind.int")
def unbind(b: Builder, x: Value, dim: int = 0) -> tuple[Value, ...]:
    count = settled_value(b, x).shape[dim]
    if not isinstance(count, int):
        raise b.open_size_error("the number of parts depends", count)
    return tuple(select(b, x, dim, k) for k in range(count))


@register("aten.split.Tensor", "aten.unsafe_split.Tensor", "aten.chunk.default")
def split(b: Builder, x: Value, split_size: Size, dim: int = 0) -> tuple[Value, ...]:
    return split_with_sizes(b, x, [sizes(part.shape)[dim] for part in b.node.meta["val"]], dim)


@register(
    "aten.split_with_sizes.default",
    "aten.unsafe_split_with_sizes.default",
    "aten.split_with_sizes_copy.default",
)
def split_with_sizes(b: Builder, x: Value, split_sizes: Sequence[Size], dim: int = 0) -> tuple[Value, ...]:
    value = settled_value(b, x)
    dim %= value.ndim
    if len(split_sizes) == 1:
        return (value,)
    value = b.tidy(value)
    ends = tuple(b.size(sum(split_sizes[: k + 1])) for k in range(len(split_sizes) - 1))
    how = len(split_sizes) if len(set(split_sizes)) == 1 else ends
    parts = b.emit("jnp.split", value.expr, how, axis=axis_of(value, dim))
    return tuple(
        result_with_dims(b, value, b.emit("[]", parts, k), {dim: new_group(size)}) for k, size in enumerate(split_sizes)
    )


# Repetition


@register("aten.expand_as.default")
def expand_as(b: Builder, x: Value, other: Operand) -> Value:
    return expand_to(b, x, b.result_shape)


@register("aten.expand.default", "aten.broadcast_to.default")
def expand(b: Builder, x: Value, size: Sequence[Size], implicit: bool = False) -> Value:
    return expand_to(b, x, b.result_shape)


def expand_to(b: Builder, x: Operand, shape: Sequence[Size]) -> Value:
    """The value broadcast to a shape."""
    value = settled_value(b, x)
    layout = alignment.pad_rank(value.layout, len(shape))
    value = Value(value.expr, layout, value.dtype)
    if value.shape == tuple(shape):
        return value
    axes = tidy_axes(layout)
    lead = len(axes) - len(layout.axes)
    if not (lead >= 0 and axes[lead:] == layout.axes and not any(axes[:lead])):
        value = b.arrange(value, axes)
    tidy = Value(value.expr, Layout(layout.dims, axes), value.dtype)
    new = {dim: new_group(size) for dim, size in enumerate(shape) if not layout.dims[dim] and size != 1}
    result = result_with_dims(b, tidy, tidy.expr, new, value.dtype)
    wide = b.emit("jnp.broadcast_to", tidy.expr, shape_argument(b, result.layout.stored_shape, [value]))
    expanded = b.laid(wide, result.layout, value.dtype)
    b.expanded[expanded] = value  # with the axes that it has: `tidy` may have more in front
    return expanded


@register("aten.broadcast_tensors.default")
def broadcast_tensors(b: Builder, tensors: Sequence[Value]) -> tuple[Value, ...]:
    return tuple(expand_to(b, tensor, b.result_shape) for tensor in tensors)


@register("aten.repeat.default", "aten.tile.default")
def repeat(b: Builder, x: Value, repeats: Sequence[Size]) -> Value:
    value = settled_value(b, x)
    rank = max(len(repeats), value.ndim)
    times = (*(1,) * (rank - len(repeats)), *repeats)
    value = Value(value.expr, alignment.pad_rank(value.layout, rank), value.dtype)
    if all(count == 1 for count in times):
        return value
    value = b.tidy(value)
    stored = tuple(b.size(times[dim]) for dim in sorted(range(rank), key=value.axis))
    new = {dim: new_group(b.result_shape[dim]) for dim, count in enumerate(times) if count != 1}
    return result_with_dims(b, value, b.emit("jnp.tile", value.expr, stored), new)


@register("aten.repeat_interleave.self_int")
def repeat_interleave(b: Builder, x: Value, repeats: Any, dim: int | None = None, output_size: Any = None) -> Value:
    if dim is None:
        return b.new(b.emit("jnp.repeat", b.plain(x).expr, b.size(repeats)))
    value = b.tidy(x)
    dim %= value.ndim
    expr = b.emit("jnp.repeat", value.expr, b.size(repeats), axis=axis_of(value, dim))
    return result_with_dims(b, value, expr, {dim: new_group(b.result_shape[dim])})


@register("aten.clone.default")
def clone(b: Builder, x: Value, **_: Any) -> Value:
    """A copy, which is the value itself. Running statistics are read before the call of the layer that writes them."""
    value = b.resolve(x)
    if value.key is not None and b.is_statistic(value.key):
        plain = b.plain(value)
        return b.laid(b.emit("jnp.asarray", plain.expr), plain.layout)
    return x
