"""Convolutions.

Feature maps are stored `[N, *spatial, C]`, kernels `[*spatial, I, O]`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from jaxensemble.network.network import Arg, Ref, Var
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dtypes import param_dtype
from torch_bridge.lowering.layouts.layout import Layout, new_group, reshape_layout
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value

Ints = int | Sequence[int]
Pairs = tuple[tuple[int, int], ...]


def spatial_values(value: Ints, spatial: int) -> tuple[int, ...]:
    """A number for each spatial dimension. PyTorch's shorthand is one number for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def padding_pairs(padding: Ints | str, kernel: Sequence[int], dilation: Sequence[int]) -> Pairs:
    """Zeros before and after, per spatial dimension. `"same"` puts the odd one after, as PyTorch does."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    pads = spatial_values(0 if padding == "valid" else padding, len(kernel))  # type: ignore[arg-type]
    return tuple((p, p) for p in pads)


@register(
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.conv3d.padding",
)
def conv(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Value:
    weight = b.value(weight)
    spatial = weight.ndim - 2
    kernel = tuple(int(size) for size in weight.shape[2:])
    dilations = spatial_values(dilation, spatial)
    options: dict[str, Any] = {
        "in_features": int(weight.shape[1]) * groups,
        "out_features": weight.shape[0],  # an open size in computed weights, which no layer holds
        "kernel_size": kernel,
        "padding": padding_option(padding_pairs(padding, kernel, dilations)),
        **option_unless_ones("strides", spatial_values(stride, spatial)),
        **option_unless_ones("kernel_dilation", dilations),
        **({"feature_group_count": groups} if groups != 1 else {}),
    }
    out, within, *space = weight.layout.dims
    stored = Layout(weight.layout.dims, (*space, within, out))  # [O, I, *spatial] -> [*spatial, I, O]
    path = _layer(b, "nnx.Conv", options, weight, stored, bias)
    x = b.channels_last(x, spatial)
    if path is not None:
        return feature_map(b, b.emit(f"layer:{path}", x.expr), spatial)
    return _call_conv(b, x, b.array(weight, stored.axes), bias, spatial, options)


@register("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def conv_transpose(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Value:
    """A convolution of the input, spread out by `stride`, with the kernel reversed.

    `nnx.ConvTranspose` is used where it computes the same. It has no groups: there, `nnx.Conv` with an `input_dilation`
    is used. Both hold the reversed kernel.
    """
    weight, split = _split_groups(b, b.value(weight), groups)
    spatial = weight.ndim - 2
    kernel = tuple(int(size) for size in weight.shape[2:])
    strides, dilations = spatial_values(stride, spatial), spatial_values(dilation, spatial)
    reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    extras = spatial_values(output_padding, spatial)
    if not all(isinstance(extra, int) for extra in extras):
        raise b.open_size_error("the padding of the output depends", *extras)
    sides = zip(reach, spatial_values(padding, spatial), extras, strict=True)
    pairs = tuple((r - p, r - p + extra) for r, p, extra in sides)
    shared: dict[str, Any] = {
        "in_features": weight.shape[0],
        "out_features": int(weight.shape[1]) * groups,
        "kernel_size": kernel,
    }
    dilated = option_unless_ones("kernel_dilation", dilations)
    spread = option_unless_ones("input_dilation", strides)
    # With input dilation, JAX takes no words for padding.
    pads = _number_or_pairs(pairs) if spread else padding_option(pairs)
    as_conv = shared | {"padding": pads, **spread, **dilated}
    ins, outs, *space = weight.layout.dims
    if groups == 1:
        # [I, O, *spatial] -> [*spatial, I, O]
        stored = Layout(weight.layout.dims, (*space, ins, outs))
        is_valid = all(pair == (r, r) and s <= r + 1 for pair, r, s in zip(pairs, reach, strides, strict=True))
        options = shared | option_unless_ones("strides", strides) | dilated
        options |= {"padding": "VALID" if is_valid else _number_or_pairs(pairs)}
        path = _layer(b, "nnx.ConvTranspose", options, weight, stored, bias, flipped=True)
    else:
        # [G x I, O, *spatial] -> [*spatial, I, G x O]
        stored = Layout(weight.layout.dims, (*space, ins[split:], (*ins[:split], *outs)))
        as_conv["feature_group_count"] = groups
        path = _layer(b, "nnx.Conv", as_conv, weight, stored, bias, flipped=True)
    x = b.channels_last(x, spatial)
    if path is not None:
        return feature_map(b, b.emit(f"layer:{path}", x.expr), spatial)
    turned = b.emit("jnp.flip", b.array(weight, stored.axes), tuple(range(spatial)))
    return _call_conv(b, x, turned, bias, spatial, as_conv)


def _split_groups(b: Builder, weight: Value, groups: int) -> tuple[Value, int]:
    """A kernel whose input features `G x I` have separate atoms for the groups, and the number of these atoms."""
    shape = (groups, weight.shape[0] // groups, *weight.shape[1:])
    layout = reshape_layout(weight.layout, shape)
    if layout is None:
        weight = b.opaque(weight)
        layout = reshape_layout(weight.layout, shape)
        assert layout is not None
    group, within, *rest = layout.dims
    return dataclasses.replace(weight, layout=Layout(((*group, *within), *rest), layout.axes)), len(group)


@register("aten.convolution.default")
def convolution(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> Value:
    if transposed:
        return conv_transpose(b, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(b, x, weight, bias, stride, padding, dilation, groups)


def _layer(
    b: Builder,
    type_: str,
    options: dict[str, Arg],
    weight: Value,
    stored: Layout,
    bias: Value | None,
    *,
    flipped: bool = False,
) -> str | None:
    """The path of a layer with this kernel, or None where no layer can hold it."""
    use_bias = {} if bias is not None else {"use_bias": False}
    turned = tuple(range(2, weight.ndim)) if flipped else ()
    leaves = {"kernel": (weight, stored), "bias": (bias, None)}
    return b.claim(type_, options | use_bias | param_dtype(weight), leaves, turned)


def _call_conv(
    b: Builder, x: Value, kernel: Ref | Var, bias: Value | None, spatial: int, options: dict[str, Arg]
) -> Value:
    """A convolution with a kernel that no layer holds."""
    held = ("in_features", "out_features", "kernel_size")
    arguments = {name: value for name, value in options.items() if name not in held and (name, value) != NO_PADDING}
    y = b.emit("ops.conv", x.expr, kernel, **arguments)
    return feature_map(b, y if bias is None else b.emit("+", y, b.plain(bias).expr), spatial)


NO_PADDING = ("padding", "VALID")
"""The default of `ops.conv`. Flax has another default."""


def option_unless_ones(name: str, values: tuple[int, ...]) -> dict[str, Arg]:
    """An option, left out where all its values are 1."""
    return {} if set(values) == {1} else {name: values}


def padding_option(pairs: Pairs) -> Arg:
    """Padding as a Flax programmer writes it: `"VALID"`, a number, or pairs."""
    return "VALID" if all(pair == (0, 0) for pair in pairs) else _number_or_pairs(pairs)


def _number_or_pairs(pairs: Pairs) -> Arg:
    return pairs[0][0] if len({side for pair in pairs for side in pair}) == 1 else pairs


def feature_map(b: Builder, expr: Ref | Var, spatial: int, dtype: torch.dtype | None = None) -> Value:
    """A result `[..., C, *spatial]` that is stored channels-last."""
    dims = tuple(map(new_group, b.result_shape))
    channels = len(dims) - spatial - 1
    layout = Layout(dims, (*dims[:channels], *dims[channels + 1 :], dims[channels]))
    return b.laid(expr, layout, dtype)
