"""Pooling.

`nnx.max_pool` and `nnx.avg_pool` are used where they compute the same, `jaxensemble.ops` elsewhere. Feature maps are
stored channels-last.
"""

import operator
from collections.abc import Callable, Sequence

import torch

from jaxensemble.network.network import Arg, Ref
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.layouts.layout import Layout
from torch_bridge.lowering.rules.conv import Ints, feature_map, spatial_values
from torch_bridge.lowering.table import Rule, refuse, register
from torch_bridge.lowering.values import Value


def _bind_spatial(rule: Rule, spatial: int) -> Rule:
    """A rule with the number of spatial dimensions fixed."""
    return lambda b, *args, **kwargs: rule(b, spatial, *args, **kwargs)


def register_per_rank(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for 1, 2 and 3 spatial dimensions, under names such as `aten.max_pool{}d.default`."""

    def enter(rule: Rule) -> Rule:
        for spatial in (1, 2, 3):
            register(*[name.format(spatial) for name in names])(_bind_spatial(rule, spatial))
        return rule

    return enter


@register_per_rank("aten.max_pool{}d.default")
def max_pool(
    b: Builder,
    spatial: int,
    x: Value,
    kernel_size: Ints,
    stride: Ints = (),
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Value:
    x = b.channels_last(x, spatial)
    window, strides, pads = _geometry(spatial, kernel_size, stride, padding)
    dilations = spatial_values(dilation, spatial)
    if ceil_mode or set(dilations) != {1} or not b.dtype.is_floating_point:
        extra = {} if set(dilations) == {1} else {"dilation": dilations}
        options = _own_options(pads, ceil_mode) | extra
        return feature_map(b, b.emit("ops.max_pool", x.expr, window, strides, **options), spatial)
    return feature_map(b, b.emit("nnx.max_pool", x.expr, window, **_flax_options(strides, pads)), spatial)


@register_per_rank("aten.max_pool{}d_with_indices.default")
def max_pool_with_indices(
    b: Builder,
    spatial: int,
    x: Value,
    kernel_size: Ints,
    stride: Ints = (),
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> tuple[Value, ...]:
    if not _has_used_indices(b):
        return (max_pool(b, spatial, x, kernel_size, stride, padding, dilation, ceil_mode),)
    x = b.channels_last(x, spatial)
    window, strides, pads = _geometry(spatial, kernel_size, stride, padding)
    options = _own_options(pads, ceil_mode)
    options |= {} if set(spatial_values(dilation, spatial)) == {1} else {"dilation": spatial_values(dilation, spatial)}
    return _both_results(b, b.emit("ops.max_pool_with_indices", x.expr, window, strides, **options), spatial)


@register_per_rank("aten.avg_pool{}d.default")
def avg_pool(
    b: Builder,
    spatial: int,
    x: Value,
    kernel_size: Ints,
    stride: Ints = (),
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    if not b.dtype.is_floating_point:
        raise b.unsupported("averages of whole numbers are rounded; convert the input to floating point first")
    x = b.channels_last(x, spatial)
    window, strides, pads = _geometry(spatial, kernel_size, stride, padding)
    counts_padding = count_include_pad or set(pads) == {0}
    if ceil_mode or not counts_padding or divisor_override is not None:
        options = _own_options(pads, ceil_mode)
        options |= {} if counts_padding else {"count_include_pad": False}
        options |= {} if divisor_override is None else {"divisor_override": divisor_override}
        return feature_map(b, b.emit("ops.avg_pool", x.expr, window, strides, **options), spatial)
    return feature_map(b, b.emit("nnx.avg_pool", x.expr, window, **_flax_options(strides, pads)), spatial)


def _geometry(spatial: int, kernel_size: Ints, stride: Ints, padding: Ints) -> tuple[tuple[int, ...], ...]:
    """Window, strides and padding per spatial dimension."""
    window = spatial_values(kernel_size, spatial)
    return (
        window,
        window if stride == () or stride == [] else spatial_values(stride, spatial),
        spatial_values(padding, spatial),
    )


def _flax_options(strides: tuple[int, ...], pads: tuple[int, ...]) -> dict[str, Arg]:
    options: dict[str, Arg] = {"strides": strides} if set(strides) != {1} else {}
    return options | ({"padding": tuple((p, p) for p in pads)} if any(pads) else {})


def _own_options(pads: tuple[int, ...], ceil_mode: bool) -> dict[str, Arg]:
    options: dict[str, Arg] = {"padding": pads} if any(pads) else {}
    return options | ({"ceil_mode": True} if ceil_mode else {})


def _has_used_indices(b: Builder) -> bool:
    """Returns whether the positions of the maxima are used."""
    return any(user.target is not operator.getitem or (user.args[1] == 1 and user.users) for user in b.node.users)


def _both_results(b: Builder, result: Ref, spatial: int) -> tuple[Value, Value]:
    """The maxima and their positions."""
    values, indices = b.emit("[]", result, 0), b.emit("[]", result, 1)
    return feature_map(b, values, spatial), feature_map(b, indices, spatial, torch.int64)


@register_per_rank("aten.adaptive_avg_pool{}d.default")
def adaptive_avg_pool(b: Builder, spatial: int, x: Value, output_size: Sequence[int]) -> Value:
    if set(output_size) == {1}:
        return _mean(b, spatial, x)
    x = b.channels_last(x, spatial)
    return feature_map(b, b.emit("ops.adaptive_avg_pool", x.expr, tuple(output_size)), spatial)


def _mean(b: Builder, spatial: int, x: Value) -> Value:
    """The mean over all spatial dimensions, which have no stored axes afterwards."""
    x = b.tidy(x)
    reduced = {x.axis(dim) for dim in range(x.ndim - spatial, x.ndim)}
    kept = tuple(axis for k, axis in enumerate(x.layout.axes) if k not in reduced)
    dims = (*x.layout.dims[: x.ndim - spatial], *((),) * spatial)
    return b.laid(b.emit("jnp.mean", x.expr, tuple(sorted(reduced))), Layout(dims, kept))


@register_per_rank("aten.adaptive_max_pool{}d.default")
def adaptive_max_pool(b: Builder, spatial: int, x: Value, output_size: Sequence[int]) -> tuple[Value, ...]:
    x = b.channels_last(x, spatial)
    if not _has_used_indices(b):
        return (feature_map(b, b.emit("ops.adaptive_max_pool", x.expr, tuple(output_size)), spatial),)
    return _both_results(b, b.emit("ops.adaptive_max_pool_with_indices", x.expr, tuple(output_size)), spatial)


@register("aten.max_unpool2d.default")
def max_unpool2d(b: Builder, x: Value, indices: Value, output_size: Sequence[int]) -> Value:
    return _max_unpool(b, 2, x, indices, output_size)


@register("aten.max_unpool3d.default")
def max_unpool3d(
    b: Builder, x: Value, indices: Value, output_size: Sequence[int], stride: Ints, padding: Ints
) -> Value:
    return _max_unpool(b, 3, x, indices, output_size)


def _max_unpool(b: Builder, spatial: int, x: Value, indices: Value, output_size: Sequence[int]) -> Value:
    x, indices = b.channels_last(x, spatial), b.channels_last(indices, spatial)
    return feature_map(b, b.emit("ops.max_unpool", x.expr, indices.expr, tuple(output_size)), spatial)


refuse(
    "aten.fractional_max_pool2d.default aten.fractional_max_pool3d.default",
    "fractional max pooling draws its windows at random, in evaluation mode too; use nn.MaxPool2d or nn.MaxPool3d",
)
