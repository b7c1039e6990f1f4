"""Normalisation."""

import dataclasses
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TypeAlias

import torch
from torch import nn

from jaxensemble.network.network import Arg, Var
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dtypes import apply, param_dtype, promote_operands
from torch_bridge.lowering.features import Features, align_features
from torch_bridge.lowering.layouts.layout import Layout, Size, plain_layout
from torch_bridge.lowering.rules.reduce import reduce_dims
from torch_bridge.lowering.table import register
from torch_bridge.lowering.tensors import COUNTER
from torch_bridge.lowering.values import Value

Weight: TypeAlias = Value | None
Options: TypeAlias = dict[str, Arg]


# With running statistics


@register("torch_bridge.batch_norm.default")
def batch_norm(
    b: Builder, x: Value, w: Weight, bias: Weight, mean: Weight, var: Weight, momentum: float, eps: float, mode: str
) -> Value:
    x = b.value(x)
    if x.ndim > 2:
        x = b.channels_last(x, x.ndim - 2)
    features = align_features(b, x, (1,), w, bias, mean, var, merged=True)
    options = _features(features.x) | _axis(features) | _eps(eps, 1e-5) | _affine(w, bias)
    if mode == "always":
        _refuse_writing(b, mean, var)
        return _call_scaled(b, "layers.BatchNorm", features, (1,), options | {"track_running_stats": False})
    return _call_tracking(b, "layers.BatchNorm", features, options, momentum, mode)


@register("torch_bridge.instance_norm.default")
def instance_norm(
    b: Builder, x: Value, w: Weight, bias: Weight, mean: Weight, var: Weight, momentum: float, eps: float, mode: str
) -> Value:
    x = b.value(x)
    features = align_features(b, b.channels_last(x, x.ndim - 2), (1,), w, bias, mean, var)
    options = _features(features.x) | _affine(w, bias)
    if mode == "always":
        _refuse_writing(b, mean, var)
        options |= _eps(eps, 1e-6) | {"use_fast_variance": False}
        return _call_scaled(b, "nnx.InstanceNorm", features, (1,), options)
    return _call_tracking(b, "layers.InstanceNorm", features, options | _eps(eps, 1e-5), momentum, mode)


def _refuse_writing(b: Builder, mean: Weight, var: Weight) -> None:
    """Checks that evaluation mode writes no running statistics.

    **Raises:** `UnsupportedError` if it does.
    """
    if mean is not None or var is not None:
        raise b.unsupported(
            "it writes running statistics in evaluation mode too; pass running_mean=None and running_var=None, or let "
            "`training` follow the module's mode"
        )


def _call_tracking(b: Builder, type_: str, features: Features, options: Options, momentum: float, mode: str) -> Value:
    """A call of a layer with running statistics.

    Without a mode, or without a module that holds just its weights, the statistics are only used.
    """
    x = features.x
    if mode == "by_mode" or b.evaluation_only:
        path = _tracking_layer(b, type_, features, options, momentum)
        if path is not None:
            return b.laid(b.emit(f"layer:{path}", x.expr), x.layout)
        b.evaluation_only = b.evaluation_only or (
            f"the weights of a normalisation in {b.module_path or 'the root module'} are not held by one module, "
            "so that no layer can keep its running statistics"
        )
    scale, bias, mean, var = (w if w is None or held is None else b.array(w, held.axes) for w, held in features.weights)
    affine = (scale, bias) if bias is not None else (scale,) if scale is not None else ()
    given = _axis(features) | {name: value for name, value in options.items() if name == "epsilon"}
    return b.laid(b.emit("ops.batch_norm", x.expr, mean, var, *affine, **given), x.layout)  # type: ignore[arg-type]


def _tracking_layer(b: Builder, type_: str, features: Features, options: Options, momentum: float) -> str | None:
    """The path of the layer that holds the weights, and its counter of batches."""
    keys = [weight.key for weight, _ in features.weights if weight is not None]
    holders = b.holders([key for key in keys if key is not None]) if None not in keys else []
    if not holders:
        return None
    counter = f"{holders[0]}.{COUNTER}".lstrip(".")
    tensor = None if counter in b.state.unchanged_counters else b.state.tensors.get(counter)
    dtype = next(param_dtype(weight) for weight, _ in features.weights if weight is not None)
    options = options | _momentum(b, holders[0], momentum) | ({} if tensor is not None else {"count_batches": False})
    path = b.claim(type_, options | dtype, features.leaves("scale", "bias", "mean", "var"), within="norm")
    if path is not None and holders[0] in (path, path.rpartition(".")[0]) and tensor is not None:
        key, layout, counted = b.state.names[counter][0], plain_layout(tuple(tensor.shape)), f"{path}.{COUNTER}"
        if key not in b.storage:
            b.store(Value(Var(counted), layout, tensor.dtype, key=key), counted, layout)
    return path


def _momentum(b: Builder, owner: str, momentum: float) -> Options:
    """The option for momentum. Flax's is the share of the old average, PyTorch's the share of the new value."""
    module = b.state.modules[owner]
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
        return {"momentum": None}
    kept = float(1 - Decimal(repr(float(momentum))))
    return {} if kept == 0.9 else {"momentum": kept}


# Without running statistics


@register("aten.layer_norm.default")
def layer_norm(
    b: Builder,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Weight = None,
    bias: Weight = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    if _is_open(normalized_shape):
        x = b.value(x)
        centred = apply(b, "-", x, reduce_dims(b, "jnp.mean", x, range(-len(normalized_shape), 0), True))
        return _divide_by_rms(b, centred, len(normalized_shape), eps)
    options = _eps(eps, 1e-6) | _affine(weight, bias) | {"use_fast_variance": False}
    return _normalise_features(b, "nnx.LayerNorm", x, normalized_shape, (weight, bias), options)


@register("aten.rms_norm.default")
def rms_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Weight = None, eps: float | None = None
) -> Value:
    x = b.value(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if x.dtype.is_complex or _is_open(normalized_shape):  # Flax squares absolute values
        y = _divide_by_rms(b, x, len(normalized_shape), eps)
        return y if weight is None else apply(b, "*", y, weight)
    options = _eps(eps, 1e-6) | ({} if weight is not None else {"use_scale": False})
    return _normalise_features(b, "nnx.RMSNorm", x, normalized_shape, (weight, None), options)


def _is_open(shape: Sequence[Size]) -> bool:
    """Returns whether a normalisation is over an open size, for which no layer can hold weights."""
    return not all(isinstance(size, int) for size in shape)


def _divide_by_rms(b: Builder, x: Value, count: int, eps: float) -> Value:
    """A value divided by the root of the mean of its squares over the last `count` dimensions."""
    mean = reduce_dims(b, "jnp.mean", apply(b, "jnp.square", x), range(-count, 0), True)
    return apply(b, "*", x, apply(b, "lax.rsqrt", apply(b, "+", mean, eps)))


def _normalise_features(
    b: Builder, type_: str, x: Value, shape: Sequence[int], weights: Sequence[Weight], options: Options
) -> Value:
    """A normalisation over the last dimensions, wherever these are stored."""
    dims = tuple(range(-len(shape), 0))
    features = align_features(b, b.value(x), dims, *weights)
    from_end = tuple(axis - len(features.x.layout.axes) for axis in features.axes)
    count: Options = {"num_features": math.prod(int(size) for size in shape)}
    where: Options = {}
    if from_end != (-1,):
        over = from_end if len(from_end) > 1 else min(from_end)
        where = {"reduction_axes": over, "feature_axes": over}
    return _call_scaled(b, type_, features, dims, count | options | where)


@register("aten.group_norm.default")
def group_norm(
    b: Builder,
    x: Value,
    num_groups: int,
    weight: Weight = None,
    bias: Weight = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:
    """Group normalisation. The groups are runs of neighbouring channels, which must be stored in PyTorch's order."""
    x = b.value(x)
    x = b.channels_last(x, x.ndim - 2)
    features = align_features(b, x, (1,), weight, bias)
    options: Options = {} if num_groups == 32 else {"num_groups": num_groups}
    options |= _eps(eps, 1e-6) | _affine(weight, bias) | {"use_fast_variance": False}
    return _call_scaled(b, "nnx.GroupNorm", features, (1,), _features(features.x) | options)


def _call_scaled(b: Builder, type_: str, features: Features, dims: Sequence[int], options: Options) -> Value:
    """A call of a layer that normalises.

    The layer has its own scale and bias if a module holds just these. Otherwise they are applied after it.
    """
    x, weights = features.x, features.weights[:2]
    first = next((weight for weight, _ in weights if weight is not None), None)
    path = None if first is None else b.claim(type_, options | param_dtype(first), features.leaves("scale", "bias"))
    if path is not None:
        return b.laid(b.emit(f"layer:{path}", x.expr), x.layout)
    bare: Options = {"use_scale": False} if type_ == "nnx.RMSNorm" else {"use_bias": False, "use_scale": False}
    name = type_.partition(".")[2].replace("Norm", "_norm").lower()
    y = b.laid(b.emit(f"layer:{b.stateless_layer(type_, options | bare, name)}", x.expr), x.layout)
    for target, (weight, _) in zip("*+", weights, strict=True):
        if weight is not None:
            y = apply(b, target, y, _append_dims(b, weight, x, dims))
    return y


def _append_dims(b: Builder, weight: Value, x: Value, dims: Sequence[int]) -> Value:
    """A weight with a dimension of size one for each dimension of `x` that follows its own."""
    following = x.ndim - 1 - dims[-1] % x.ndim
    if following == 0:
        return weight
    weight = b.plain(weight)
    return dataclasses.replace(weight, layout=Layout((*weight.layout.dims, *((),) * following), weight.layout.axes))


def _features(x: Value) -> Options:
    return {"num_features": int(x.shape[1])}


def _eps(eps: float, default: float) -> Options:
    return {} if eps == default else {"epsilon": eps}


def _affine(weight: Weight, bias: Weight) -> Options:
    missing = {"use_bias": bias, "use_scale": weight}
    return {name: False for name, held in missing.items() if held is None}


def _axis(features: Features) -> Options:
    (axis,) = features.axes
    return {} if axis == len(features.x.layout.axes) - 1 else {"axis": axis}


# By a norm


@register("aten._weight_norm.default")
def weight_norm(b: Builder, v: Value, g: Value, dim: int = 0) -> Value:
    options: Options = {} if dim == 0 else {"axis": None if dim == -1 else dim}
    return b.new(b.emit("ops.weight_norm", b.plain(v).expr, b.plain(g).expr, **options))


@register("aten.cosine_similarity.default")
def cosine_similarity(b: Builder, x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    x, y = promote_operands(b, (x1, x2), b.dtype)
    options = ({"axis": dim} if dim != 1 else {}) | _eps(eps, 1e-8)
    return b.new(b.emit("ops.cosine_similarity", b.plain(x).expr, b.plain(y).expr, **options))


@register("aten.pairwise_distance.default")
def pairwise_distance(
    b: Builder, x1: Value, x2: Value, p: float = 2, eps: float = 1e-6, keepdim: bool = False
) -> Value:
    dtype = torch.promote_types(x1.dtype, x2.dtype)
    difference = b.plain(apply(b, "+", apply(b, "-", x1, x2, compute=dtype), eps, compute=dtype))
    order = () if p == 2 else (p,)
    options: Options = {"axis": -1, "keepdims": True} if keepdim else {"axis": -1}
    return b.new(b.emit("ops.vector_norm", difference.expr, *order, **options))
