"""Backward operations.

They are in forwards that take derivatives.
"""

from collections.abc import Sequence
from typing import Any

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.layouts.layout import Layout, new_group
from torch_bridge.lowering.rules.conv import (
    feature_map,
    option_unless_ones,
    padding_option,
    padding_pairs,
    spatial_values,
)
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value, sizes


@register("aten.convolution_backward.default")
def convolution(
    b: Builder,
    gradient: Value,
    x: Value,
    weight: Value,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    """The gradients of input, kernel and bias, as far as `output_mask` asks for them."""
    if transposed:
        raise b.unsupported("derivatives of transposed convolutions are not carried within a forward; take them in JAX")
    spatial = b.value(weight).ndim - 2
    window = tuple(int(size) for size in b.value(weight).shape[2:])
    options: dict[str, Arg] = {
        **option_unless_ones("strides", spatial_values(stride, spatial)),
        "padding": padding_option(padding_pairs(padding, window, spatial_values(dilation, spatial))),
        **option_unless_ones("kernel_dilation", spatial_values(dilation, spatial)),
        **({"feature_group_count": groups} if groups != 1 else {}),
    }
    given = b.channels_last(gradient, spatial)
    of_input = of_kernel = of_bias = None
    if output_mask[0]:
        out, within, *space = b.value(weight).layout.dims
        kernel = b.array(b.value(weight), (*space, within, out))  # [O, I, *spatial] -> [*spatial, I, O]
        size = tuple(b.size(entry) for entry in b.value(x).shape[-spatial:])
        of_input = feature_map(b, b.emit("ops.conv_input_pullback", given.expr, kernel, size, **options), spatial)
    if output_mask[1]:
        shape = sizes(b.node.meta["val"][1].shape)
        expr = b.emit("ops.conv_kernel_pullback", given.expr, b.channels_last(x, spatial).expr, window, **options)
        out, within, *space = (new_group(entry) for entry in shape)
        of_kernel = b.laid(expr, Layout((out, within, *space), (*space, within, out)), gradient.dtype)
    if output_mask[2]:
        total = b.emit(".sum", given.expr, axis=tuple(range(given.ndim - 1)))
        of_bias = b.new(total, (gradient.shape[1],), gradient.dtype)
    return of_input, of_kernel, of_bias


@register("aten.avg_pool2d_backward.default", "aten.avg_pool3d_backward.default")
def avg_pool(
    b: Builder,
    gradient: Value,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> Value:
    spatial = 2 if "2d" in str(b.node.target) else 3
    window = spatial_values(tuple(kernel_size), spatial)
    strides = spatial_values(tuple(stride), spatial) if stride else window
    options: dict[str, Arg] = {"padding": spatial_values(tuple(padding), spatial)} if any(padding) else {}
    options |= {"ceil_mode": True} if ceil_mode else {}
    options |= {} if count_include_pad else {"count_include_pad": False}
    options |= {} if divisor_override is None else {"divisor_override": divisor_override}
    arrays = [b.channels_last(each_, spatial).expr for each_ in (gradient, x)]
    return feature_map(b, b.emit("ops.avg_pool_pullback", *arrays, window, strides, **options), spatial)


@register("aten._adaptive_avg_pool2d_backward.default", "aten._adaptive_avg_pool3d_backward.default")
def adaptive_avg_pool(b: Builder, gradient: Value, x: Value) -> Value:
    spatial = 2 if "2d" in str(b.node.target) else 3
    arrays = [b.channels_last(each_, spatial).expr for each_ in (gradient, x)]
    size = tuple(int(entry) for entry in b.value(gradient).shape[-spatial:])
    return feature_map(b, b.emit("ops.adaptive_avg_pool_pullback", *arrays, size), spatial)
