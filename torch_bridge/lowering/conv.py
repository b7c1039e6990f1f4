"""Convolutions, channels-last: feature maps `[N, *spatial, C]`, kernels `[*spatial, I, O]`."""

from collections.abc import Sequence

from jaxensemble.network import Arg
from torch_bridge.layout import Atom, Layout
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.linear import param_dtype
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value, sizes

Ints = int | Sequence[int]


def each(value: Ints, spatial: int) -> tuple[int, ...]:
    """PyTorch's shorthand for one number in every spatial dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def padding_pairs(padding: Ints | str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after, per spatial dimension. `"same"` puts the odd one after, as PyTorch does."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    pads = each(0 if padding == "valid" else padding, len(kernel))  # type: ignore[arg-type]
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
    strides, dilations = each(stride, spatial), each(dilation, spatial)
    options: dict[str, Arg] = {
        "in_features": int(weight.shape[1]) * groups,
        "out_features": weight.shape[0],
        "kernel_size": kernel,
        "padding": padding_option(padding_pairs(padding, kernel, dilations)),
    }
    options |= {"strides": strides} if set(strides) != {1} else {}
    options |= {"kernel_dilation": dilations} if set(dilations) != {1} else {}
    options |= {"feature_group_count": groups} if groups != 1 else {}
    out, within, *space = weight.layout.dims
    stored = Layout(weight.layout.dims, (*space, within, out))  # [O, I, *spatial] -> [*spatial, I, O]
    x = b.channels_last(x, spatial)
    use_bias = {} if bias is not None else {"use_bias": False}
    path = b.claim(
        "nnx.Conv", options | use_bias | param_dtype(weight), {"kernel": (weight, stored), "bias": (bias, None)}
    )
    if path is not None:
        return feature_map(b, b.emit(f"layer:{path}", x.expr), spatial)
    arguments = {name: value for name, value in options.items() if not name.endswith("features")}
    arguments.pop("kernel_size")
    y = b.emit("ops.conv", x.expr, b.array(weight, stored.axes), **arguments)
    return feature_map(b, y if bias is None else b.emit("+", y, b.plain(bias).expr), spatial)


def padding_option(pairs: tuple[tuple[int, int], ...]) -> Arg:
    """Padding as a Flax programmer writes it: `"VALID"`, a number, or pairs."""
    if all(pair == (0, 0) for pair in pairs):
        return "VALID"
    if len({side for pair in pairs for side in pair}) == 1:
        return pairs[0][0]
    return pairs


def feature_map(b: Builder, expr: object, spatial: int) -> Value:
    """A result `[..., C, *spatial]` that is stored channels-last."""
    dims = tuple(() if size == 1 else (Atom(size),) for size in b.result_shape)
    channels = len(dims) - spatial - 1
    return b.laid(expr, Layout(dims, (*dims[:channels], *dims[channels + 1 :], dims[channels])))  # type: ignore[arg-type]
