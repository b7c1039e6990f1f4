"""Positions of extremes, running sums, sorting and quantiles."""

from collections.abc import Callable
from typing import Any

import torch

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import axis_of, relabel_dims, result_with_dims, settled_value
from torch_bridge.lowering.layouts.layout import Layout, new_group
from torch_bridge.lowering.rules.reduce import cast_for_sum, keep_dims, reduce_dims
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value


def _place(target: str) -> Callable[..., Value]:
    """The rule of a function that gives the position of an extreme."""

    def rule(b: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        value = settled_value(b, x)
        if dim is None:
            expr = b.emit(target, b.plain(value).expr)
            return relabel_dims(b.new(expr, ()), [()] * value.ndim if keepdim else [])
        return reduce_dims(b, target, b.tidy(value), dim, keepdim) if value.ndim else b.new(b.emit(target, value.expr))

    return rule


register("aten.argmax.default")(_place("jnp.argmax"))
register("aten.argmin.default")(_place("jnp.argmin"))


def select_elements(
    b: Builder, target: str, x: Value, dim: int, keepdim: bool, *args: Arg, **options: Arg
) -> tuple[Value, Value]:
    """Elements along a dimension, and their positions.

    The positions come first, and select the elements: PyTorch's gradients flow in this way.
    """
    value = settled_value(b, x)
    if not value.ndim:
        return value, b.new(b.emit("jnp.asarray", 0), (), torch.int64)
    value = b.tidy(value)
    axis = axis_of(value, dim)
    places = b.emit(target, value.expr, *args, axis=axis, **options)
    elements = b.emit("jnp.take_along_axis", value.expr, places, axis=axis)
    return tuple(  # type: ignore[return-value]
        keep_dims(result_with_dims(b, value, expr, {dim % value.ndim: ()}, dtype), [dim % value.ndim], keepdim)
        for expr, dtype in ((elements, value.dtype), (places, torch.int64))
    )


@register("aten.max.dim")
def max_(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return select_elements(b, "jnp.argmax", x, dim, keepdim, keepdims=True)


@register("aten.min.dim")
def min_(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return select_elements(b, "jnp.argmin", x, dim, keepdim, keepdims=True)


@register("aten.median.dim")
def median(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return select_elements(b, "ops.argmedian", x, dim, keepdim)


@register("aten.nanmedian.dim")
def nanmedian(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return select_elements(b, "ops.argnanmedian", x, dim, keepdim)


@register("aten.mode.default")
def mode(b: Builder, x: Value, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    return select_elements(b, "ops.argmode", x, dim, keepdim)


@register("aten.kthvalue.default")
def kthvalue(b: Builder, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    return select_elements(b, "ops.argkth", x, dim, keepdim, k)


register("aten.median.default")(lambda b, x: reduce_dims(b, "ops.median", x, None, False))
register("aten.nanmedian.default")(lambda b, x: reduce_dims(b, "ops.nanmedian", x, None, False))


def _quantile(target: str) -> Callable[..., Value]:
    """The rule of a quantile."""

    def rule(
        b: Builder, x: Value, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
    ) -> Value:
        several = isinstance(q, Value | torch.Tensor) and q.ndim == 1
        at = q.item() if isinstance(q, torch.Tensor) and not several else q
        how: Arg = b.plain(at).expr if isinstance(at, Value | torch.Tensor) else at
        options: dict[str, Arg] = {} if interpolation == "linear" else {"method": interpolation}
        result = reduce_dims(b, target, x, dim, keepdim, how, options=options)
        if not several:
            return result
        first = new_group(b.result_shape[0])
        return b.laid(result.expr, Layout((first, *result.layout.dims), (first, *result.layout.axes)))

    return rule


register("aten.quantile.default", "aten.quantile.scalar")(_quantile("jnp.quantile"))
register("aten.nanquantile.default", "aten.nanquantile.scalar")(_quantile("jnp.nanquantile"))


# Along a dimension


def line_up(b: Builder, x: Operand, dim: int) -> tuple[Value, int]:
    """The operand with an axis for just this dimension, and this axis. A number is its own only element."""
    if not b.value(x).ndim:
        return b.arrange(b.value(x), ((),)), 0
    value = b.tidy(x)
    return value, axis_of(value, dim)


def _running(target: str) -> Callable[..., Value]:
    """The rule of a running sum or product."""

    def rule(b: Builder, x: Value, dim: int, *, dtype: torch.dtype | None = None) -> Value:
        value, axis = line_up(b, cast_for_sum(b, x), dim)
        return b.laid(b.emit(target, value.expr, axis=axis), value.layout)

    return rule


register("aten.cumsum.default")(_running("jnp.cumsum"))
register("aten.cumprod.default")(_running("jnp.cumprod"))


@register("aten.logcumsumexp.default")
def logcumsumexp(b: Builder, x: Value, dim: int) -> Value:
    value, axis = line_up(b, x, dim)
    return b.laid(b.emit("lax.cumlogsumexp", value.expr, axis=axis % len(value.layout.axes)), value.layout)


def _pick(b: Builder, target: str, x: Value, dim: int, **options: Arg) -> tuple[Value, Value]:
    """Elements in another order, and their old positions."""
    value, axis = line_up(b, x, dim)
    places = b.emit(target, value.expr, axis=axis, **options)
    elements = b.emit("jnp.take_along_axis", value.expr, places, axis=axis)
    return b.laid(elements, value.layout, value.dtype), b.laid(places, value.layout, torch.int64)


@register("aten.cummax.default")
def cummax(b: Builder, x: Value, dim: int) -> tuple[Value, Value]:
    return _pick(b, "ops.argcummax", x, dim)


@register("aten.cummin.default")
def cummin(b: Builder, x: Value, dim: int) -> tuple[Value, Value]:
    return _pick(b, "ops.argcummin", x, dim)


@register("aten.sort.default")
def sort(b: Builder, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    return _pick(b, "jnp.argsort", x, dim, **({"descending": True} if descending else {}))


@register("aten.sort.stable")
def sort_stable(
    b: Builder, x: Value, *, stable: bool | None = True, dim: int = -1, descending: bool = False
) -> tuple[Value, Value]:
    return sort(b, x, dim, descending)


@register("aten.argsort.default")
def argsort(b: Builder, x: Value, dim: int = -1, descending: bool = False) -> Value:
    return sort(b, x, dim, descending)[1]


@register("aten.argsort.stable")
def argsort_stable(b: Builder, x: Value, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Value:
    return sort(b, x, dim, descending)[1]


@register("aten.msort.default")
def msort(b: Builder, x: Value) -> Value:
    return sort(b, x, 0)[0]


@register("aten.topk.default")
def topk(b: Builder, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Value, Value]:
    if not isinstance(k, int):
        raise b.open_size_error("the number of elements depends", k)
    if not b.value(x).ndim:
        return _pick(b, "jnp.argsort", x, 0)
    value = b.tidy(x)
    dim %= value.ndim
    new = {dim: new_group(k)}
    if largest:
        axis = axis_of(value, dim)
        best = b.emit("lax.top_k", value.expr, k, **({} if axis in (-1, value.ndim - 1) else {"axis": axis}))
        parts = [b.emit("[]", best, part) for part in range(2)]
        return result_with_dims(b, value, parts[0], new, value.dtype), result_with_dims(
            b, value, parts[1], new, torch.int64
        )
    places = b.emit("ops.argsmallest", value.expr, k, axis=axis_of(value, dim))
    elements = b.emit("jnp.take_along_axis", value.expr, places, axis=axis_of(value, dim))
    return result_with_dims(b, value, elements, new, value.dtype), result_with_dims(b, value, places, new, torch.int64)
