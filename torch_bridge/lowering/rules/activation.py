"""Activations, softmax and gated units."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import result_with_dims
from torch_bridge.lowering.dtypes import apply, cast, param_dtype
from torch_bridge.lowering.layouts.layout import Layout, new_group
from torch_bridge.lowering.rules.pointwise import clamp
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value

PLAIN = {
    "relu": "nnx.relu",
    "relu6": "nnx.relu6",
    "sigmoid": "nnx.sigmoid",
    "special_expit": "nnx.sigmoid",
    "log_sigmoid": "nnx.log_sigmoid",
    "silu": "nnx.silu",
    "mish": "jax.nn.mish",
    "selu": "nnx.selu",
    "hardswish": "nnx.hard_swish",
    "hardsigmoid": "ops.hard_sigmoid",
}
"""Activations without options."""


def _plain(target: str) -> Callable[[Builder, Value], Value]:
    """The rule of an activation without options."""
    return lambda b, x: apply(b, target, x)


for _name, _target in PLAIN.items():
    register(f"aten.{_name}.default")(_plain(_target))


@register("aten.gelu.default")
def gelu(b: Builder, x: Value, approximate: str = "none") -> Value:
    return b.elementwise("nnx.gelu", x, approximate=False) if approximate == "none" else b.elementwise("nnx.gelu", x)


@register("aten.leaky_relu.default")
def leaky_relu(b: Builder, x: Value, negative_slope: float = 0.01) -> Value:
    return _call_with_options(b, "ops.leaky_relu", x, (negative_slope, 0.01))


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1)
"""The ELU by which PyTorch computes a SELU."""


@register("aten.elu.default")
def elu(b: Builder, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if (alpha, scale, input_scale) == _SELU:
        return b.elementwise("nnx.selu", x)
    if (scale, input_scale) != (1, 1):
        raise b.unsupported("an ELU with a scale of its own is not carried; multiply before and after it instead")
    return _call_with_options(b, "nnx.elu", x, (alpha, 1))


@register("aten.celu.default")
def celu(b: Builder, x: Value, alpha: float = 1.0) -> Value:
    exact = 1 / float(np.float32(alpha)) == 1 / alpha
    return _call_with_options(b, "nnx.celu" if exact else "ops.celu", x, (alpha, 1))


@register("aten.hardtanh.default")
def hardtanh(b: Builder, x: Value, min_val: float = -1, max_val: float = 1) -> Value:
    if (min_val, max_val) == (0, 6) and x.dtype.is_floating_point:
        return b.elementwise("nnx.relu6", x)
    if not x.dtype.is_floating_point:
        return clamp(b, x, min_val, max_val)
    return b.elementwise("ops.hard_tanh", x, *(() if (min_val, max_val) == (-1, 1) else (min_val, max_val)))


@register("aten.softplus.default")
def softplus(b: Builder, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    return _call_with_options(b, "ops.softplus", x, (beta, 1), (threshold, 20))


@register("aten.threshold.default")
def threshold(b: Builder, x: Value, threshold: float, value: float) -> Value:
    below = b.elementwise("<=", x, threshold, dtype=torch.bool)
    return b.elementwise("jnp.where", below, value, x)


def _call_with_options(b: Builder, target: str, x: Value, *options: tuple[float, float]) -> Value:
    """A call with the options up to the last that is not the default."""
    changed = [k for k, (value, default) in enumerate(options, 1) if value != default]
    return b.elementwise(target, x, *(value for value, _ in options[: max(changed, default=0)]))


@register("aten.softmax.int", "aten._softmax.default", "aten.special_softmax.default")
def softmax(b: Builder, x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    return _call_over_dim(b, "nnx.softmax", x, dim)


@register("aten._safe_softmax.default")
def safe_softmax(b: Builder, x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    return _call_over_dim(b, "ops.safe_softmax", x, dim)


@register("aten.log_softmax.int", "aten._log_softmax.default", "aten.special_log_softmax.default")
def log_softmax(b: Builder, x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    return _call_over_dim(b, "nnx.log_softmax", x, dim)


def _call_over_dim(b: Builder, target: str, x: Value, dim: int) -> Value:
    """A call on a whole dimension, wherever it is stored."""
    x = cast(b, x, b.dtype)
    if x.ndim and not x.open and _has_own_axes(x.layout) and x.layout.dims[dim]:
        axis = x.layout.axes.index(x.layout.dims[dim])
        last: dict[str, Arg] = {} if axis == len(x.layout.axes) - 1 else {"axis": axis}
        return b.laid(b.emit(target, x.expr, **last), x.layout)
    x = b.tidy(x)
    if x.ndim == 0:  # PyTorch treats it as a vector of one
        return b.laid(b.emit(target, b.emit("jnp.expand_dims", x.expr, 0)), Layout((), ((),)))
    return b.laid(b.emit(target, x.expr, **_axis(x, dim)), x.layout)


def _has_own_axes(layout: Layout) -> bool:
    """Returns whether each dimension has an axis. Dimensions of size one may have none."""
    return {dim for dim in layout.dims if dim} == {axis for axis in layout.axes if axis}


def _axis(x: Value, dim: int) -> dict[str, Arg]:
    """The stored axis of a dimension of a `tidy` value, as an option. The last axis is the default, and left out."""
    axis = x.axis(dim)
    return {} if axis == x.ndim - 1 else {"axis": axis}


@register("aten.glu.default")
def glu(b: Builder, x: Value, dim: int = -1) -> Value:
    x = b.tidy(x)
    half = new_group(b.result_shape[dim])
    return result_with_dims(b, x, b.emit("nnx.glu", x.expr, **_axis(x, dim)), {dim % x.ndim: half})


@register("aten.prelu.default")
def prelu(b: Builder, x: Value, weight: Value) -> Value:
    """PReLU. The slopes belong to dimension 1; a single slope is for all elements."""
    x, weight = b.value(x), b.value(weight)
    count = int(weight.shape[0]) if weight.ndim else 1
    options: dict[str, Arg] = {"num_parameters": count} if count > 1 else {}
    if count > 1:
        x = b.tidy(x)
        options |= _axis(x, 1)
    elif x.open:
        x = b.plain(x)
    path = None
    if weight.ndim:
        path = b.claim("layers.PReLU", options | param_dtype(weight), {"negative_slope": (weight, None)})
    if path is not None:
        return b.laid(b.emit(f"layer:{path}", x.expr), x.layout)
    slopes = b.plain(weight)
    dims = (*slopes.layout.dims, *((),) * (x.ndim - 2)) if x.ndim and slopes.ndim else ()
    slopes = dataclasses.replace(slopes, layout=Layout(dims, slopes.layout.axes))
    return b.elementwise("ops.leaky_relu", x, slopes)


@register("torch_bridge.rrelu.default")
def rrelu(b: Builder, x: Value, lower: float, upper: float, mode: str) -> Value:
    if mode == "never":
        return leaky_relu(b, x, (lower + upper) / 2)
    b.refuse_hidden_draws(mode)
    x = b.plain(x) if x.open else x
    options: dict[str, Arg] = {}
    options |= {"lower": lower} if lower != 1 / 8 else {}
    options |= {"upper": upper} if upper != 1 / 3 else {}
    path = b.stateless_layer("layers.RReLU", options, "rrelu")
    always: dict[str, Arg] = {"deterministic": False} if mode == "always" else {}
    return b.laid(b.emit(f"layer:{path}", x.expr, **always), x.layout)
