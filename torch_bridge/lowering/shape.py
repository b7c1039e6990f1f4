"""Reshapes, transposes, slices: most of them change nothing but the layout."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch_bridge.layout import Layout, Size, reshaped
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value


@register(
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.contiguous.default",
    "aten.lift_fresh_copy.default",
)
def same(b: Builder, x: Value, memory_format: Any = None) -> Value:
    return x


@register("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def reshape(b: Builder, x: Value, shape: Sequence[Size]) -> Value:
    value = b.value(x)
    layout = reshaped(value.layout, b.result_shape)
    if layout is None:
        value = b.plain(value)
        args = b.shape_args(value.expr, value.layout.stored_shape, b.result_shape)
        return b.new(b.emit(".reshape", value.expr, *args))
    return dataclasses.replace(value, layout=layout)


@register("aten.permute.default")
def permute(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    value = b.value(x)
    order = [dim % value.ndim for dim in dims]
    return dataclasses.replace(value, layout=Layout(tuple(value.layout.dims[d] for d in order), value.layout.axes))
