"""Interpolation, sampling on a grid, padding, pixel shuffles and windows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxensemble.network.network import Arg, Ref, Slice, Var
from jaxensemble.ops.windows import window_count
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.layouts.layout import Group, Layout, Size, new_group, reshape_layout
from torch_bridge.lowering.rules.conv import Ints, feature_map, option_unless_ones, spatial_values
from torch_bridge.lowering.sizes import is_never_negative
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value, sizes

# Interpolation

NEAREST = {
    f"aten.{prefix}{spatial}d.vec": method
    for prefix, method in {"upsample_nearest": "nearest", "_upsample_nearest_exact": "nearest-exact"}.items()
    for spatial in (1, 2, 3)
}
"""Operations `(x, size, scale_factors)`, and the method of `ops.resize`."""

INTERPOLATED = {
    "aten.upsample_linear1d.vec": {"method": "linear"},
    "aten.upsample_bilinear2d.vec": {"method": "linear"},
    "aten.upsample_trilinear3d.vec": {"method": "linear"},
    "aten.upsample_bicubic2d.vec": {"method": "cubic"},
    "aten._upsample_bilinear2d_aa.vec": {"method": "linear", "antialias": True},
    "aten._upsample_bicubic2d_aa.vec": {"method": "cubic", "antialias": True},
}
"""Operations `(x, size, align_corners, scale_factors)`, and the options of `ops.resize`."""


def _nearest(method: str) -> Callable[..., Value]:
    """The rule of nearest-neighbour resizing."""

    def rule(b: Builder, x: Value, output_size: Any, scale_factors: Any) -> Value:
        return _resize(b, x, scale_factors, method)

    return rule


def _interpolated(method: str, **options: Arg) -> Callable[..., Value]:
    """The rule of an interpolation."""

    def rule(b: Builder, x: Value, output_size: Any, align_corners: bool, scale_factors: Any) -> Value:
        if align_corners:  # then only sizes matter
            return _resize(b, x, None, method, align_corners=True, **options)
        return _resize(b, x, scale_factors, method, **options)

    return rule


for operation, name in NEAREST.items():
    register(operation)(_nearest(name))
for operation, arguments in INTERPOLATED.items():
    register(operation)(_interpolated(**arguments))


def _resize(b: Builder, x: Value, scale: Sequence[float] | None, method: str, **options: Arg) -> Value:
    if not method.startswith("nearest") and not b.dtype.is_floating_point:
        raise b.unsupported("interpolated whole numbers are rounded; convert the input to floating point first")
    spatial = x.ndim - 2
    x = b.channels_last(x, spatial)
    before, after = x.shape[2:], b.result_shape[2:]
    if "antialias" in options and _ints(b, after)[1] == 1 and after[0] != before[0]:
        raise b.unsupported("PyTorch repeats the first row of an antialiased image one pixel wide; resize width last")
    if scale is not None and any(_differs(*axis) for axis in zip(before, after, scale, strict=True)):
        options["scale"] = tuple(float(factor) for factor in scale)
    return feature_map(b, b.emit("ops.resize", x.expr, after, method, **options), spatial)


def _differs(before: Size, after: Size, scale: float) -> bool:
    """Returns whether a factor says anything that the sizes do not, in either precision that PyTorch computes with."""
    if not (isinstance(before, int) and isinstance(after, int)):
        return scale not in (1, 2, 4, 8) or after != int(scale) * before
    step, implied = 1.0 / scale, before / after
    return step != implied or np.float32(step) != np.float32(before) / np.float32(after)


def _ints(b: Builder, sizes: Sequence[Size]) -> tuple[int, ...]:
    """Sizes that must be fixed."""
    if not all(isinstance(size, int) for size in sizes):
        raise b.open_size_error("spatial sizes depend", *sizes)
    return tuple(int(size) for size in sizes)


# Sampling on a grid

METHODS = ("linear", "nearest", "cubic")
OUTSIDE = ("zeros", "border", "reflection")


@register("aten.grid_sampler.default", "aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def grid_sample(
    b: Builder, x: Value, grid: Value, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Value:
    spatial = b.value(x).ndim - 2
    options: dict[str, Arg] = {} if interpolation_mode == 0 else {"method": METHODS[interpolation_mode]}
    options |= {} if padding_mode == 0 else {"padding_mode": OUTSIDE[padding_mode]}
    options |= {"align_corners": True} if align_corners else {}
    x = b.channels_last(x, spatial)
    return feature_map(b, b.emit("ops.grid_sample", x.expr, b.plain(grid).expr, **options), spatial)


@register("aten.affine_grid_generator.default")
def affine_grid(b: Builder, theta: Value, size: Sequence[Size], align_corners: bool) -> Value:
    options: dict[str, Arg] = {"align_corners": True} if align_corners else {}
    return b.new(b.emit("ops.affine_grid", b.plain(theta).expr, _ints(b, tuple(size)[2:]), **options))


# Padding

PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""PyTorch's modes and their names in `jnp.pad`."""


@register("aten.pad.default")
def pad(b: Builder, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Padding. `pad` holds pairs for the last dimension, the one before it, and so on; negative ones crop."""
    x = b.tidy(x)
    widths: list[tuple[Size, Size]] = [(0, 0)] * x.ndim
    for k, pair in enumerate(zip(sizes(pad[::2]), sizes(pad[1::2]), strict=True)):
        for width in pair:
            if not isinstance(width, int) and not is_never_negative(width):
                raise b.open_size_error("whether it pads or crops depends", width)
        widths[x.axis(x.ndim - 1 - k)] = pair
    if mode == "circular" and any(
        any(map(_is_crop, pair)) and not all(_is_crop(width) or width == 0 for width in pair) for pair in widths
    ):
        raise b.unsupported("circular padding of one side and cropping of the other; crop in a separate step")
    return _resized_value(b, x, _crop(b, _pad(b, x.expr, widths, mode, value), widths))


@register("aten.constant_pad_nd.default")
def constant_pad(b: Builder, x: Value, pad_: Sequence[int], value: Any = 0) -> Value:
    return pad(b, x, pad_, value=value)


def _pad(b: Builder, expr: Ref | Var, widths: list[tuple[Size, Size]], mode: str, value: float | None) -> Ref | Var:
    grown = tuple(tuple(0 if _is_crop(width) else width for width in pair) for pair in widths)
    if not any(map(any, grown)):
        return expr
    if mode == "constant":
        fill = {"constant_values": value} if value else {}
        return b.emit("jnp.pad", expr, grown, **fill)
    return b.emit("jnp.pad", expr, grown, mode=PAD_MODES[mode])


def _is_crop(width: Size) -> bool:
    return isinstance(width, int) and width < 0


def _crop(b: Builder, expr: Ref | Var, widths: list[tuple[Size, Size]]) -> Ref | Var:
    ranges = tuple(
        Slice(-int(before) if _is_crop(before) else None, int(after) if _is_crop(after) else None)
        for before, after in widths
    )
    while ranges and ranges[-1] == Slice():
        ranges = ranges[:-1]
    return b.emit("[]", expr, ranges) if ranges else expr


def _resized_value(b: Builder, x: Value, expr: Ref | Var) -> Value:
    """The result of an operation on a tidy value that changed only the sizes of some dimensions."""
    dims = tuple(
        old if before == after else new_group(after)
        for old, before, after in zip(x.layout.dims, x.shape, b.result_shape, strict=True)
    )
    place = x.axis_order
    axes = tuple(dims[place.index(k)] for k in range(x.ndim))
    return b.laid(expr, Layout(dims, axes))


# Between space and channels: layout alone


@register("aten.pixel_shuffle.default")
def pixel_shuffle(b: Builder, x: Value, upscale_factor: int) -> Value:
    """`[..., C x r x s, H, W]` to `[..., C, H x r, W x s]`."""
    *lead, channels, height, width = b.value(x).shape
    r = upscale_factor
    value, (*ahead, c, rows, columns, h, w) = _split_dims(b, x, (*lead, int(channels) // r**2, r, r, height, width))
    return _regroup_dims(value, (*ahead, c, (*h, *rows), (*w, *columns)))


@register("aten.pixel_unshuffle.default")
def pixel_unshuffle(b: Builder, x: Value, downscale_factor: int) -> Value:
    """`[..., C, H x r, W x s]` to `[..., C x r x s, H, W]`."""
    *lead, channels, _, _ = b.value(x).shape
    *_, height, width = b.result_shape
    r = downscale_factor
    value, (*ahead, c, h, rows, w, columns) = _split_dims(b, x, (*lead, channels, height, r, width, r))
    return _regroup_dims(value, (*ahead, (*c, *rows, *columns), h, w))


@register("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")
def channel_shuffle(b: Builder, x: Value, groups: int) -> Value:
    """`[N, G x C, ...]` to `[N, C x G, ...]`."""
    batch, channels, *space = b.value(x).shape
    value, (n, g, c, *rest) = _split_dims(b, x, (batch, groups, int(channels) // groups, *space))
    return _regroup_dims(value, (n, (*c, *g), *rest))


def _split_dims(b: Builder, x: Value, shape: Sequence[Size]) -> tuple[Value, tuple[Group, ...]]:
    """The value and, for each entry of `shape`, its part of the value's dimensions."""
    value = b.value(x)
    layout = reshape_layout(value.layout, shape)
    if layout is None:
        value = b.opaque(value)
        layout = reshape_layout(value.layout, shape)
    if layout is None:
        raise b.unsupported("a tensor without elements cannot be split; leave such parts out")
    return dataclasses.replace(value, layout=layout), layout.dims


def _regroup_dims(value: Value, dims: tuple[Group, ...]) -> Value:
    """The value with other dimensions of the same atoms."""
    return dataclasses.replace(value, layout=Layout(dims, value.layout.axes))


# Windows


@register("aten.im2col.default")
def unfold(b: Builder, x: Value, kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints) -> Value:
    """`[N, C, H, W]` to `[N, C x window, windows]`."""
    window, options = _window_options(kernel_size, dilation, padding, stride)
    x = b.channels_last(x, 2)
    counts = _window_counts(_ints(b, x.shape[-2:]), kernel_size, dilation, padding, stride)
    lead, channels = x.layout.dims[:-3], x.layout.dims[-3]
    rows, columns = (new_group(count) for count in counts)
    i, j = (new_group(size) for size in window)
    layout = Layout((*lead, (*channels, *i, *j), (*rows, *columns)), (*lead, rows, i, columns, j, channels))
    return b.laid(b.emit("ops.patches", x.expr, window, **options), layout)


@register("aten.col2im.default")
def fold(
    b: Builder, x: Value, output_size: Ints, kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints
) -> Value:
    """`[N, C x window, windows]` to `[N, C, H, W]`."""
    window, options = _window_options(kernel_size, dilation, padding, stride)
    size = spatial_values(output_size, 2)
    counts = _window_counts(size, kernel_size, dilation, padding, stride)
    *lead, features, _ = b.value(x).shape
    shape = (*lead, int(features) // (window[0] * window[1]), *window, *counts)
    value, (*ahead, channels, i, j, rows, columns) = _split_dims(b, x, shape)
    arranged = b.array(value, (*ahead, rows, i, columns, j, channels))
    return feature_map(b, b.emit("ops.overlap_add", arranged, size, **options), 2)


def _window_options(
    kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints
) -> tuple[tuple[int, ...], dict[str, Arg]]:
    """Window size, and the options of `ops.patches` and `ops.overlap_add`."""
    pads = spatial_values(padding, 2)
    options: dict[str, Arg] = {
        **option_unless_ones("strides", spatial_values(stride, 2)),
        **option_unless_ones("dilation", spatial_values(dilation, 2)),
    }
    return spatial_values(kernel_size, 2), options | ({"padding": pads} if any(pads) else {})


def _window_counts(
    sizes: Sequence[int], kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints
) -> tuple[int, ...]:
    """The number of windows per spatial dimension."""
    axes = zip(*(spatial_values(value, 2) for value in (sizes, kernel_size, stride, padding, dilation)), strict=True)
    return tuple(window_count(*axis) for axis in axes)
