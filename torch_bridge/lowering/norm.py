"""Normalisation: layers with running statistics, and those over features, groups or instances."""

import dataclasses
from collections.abc import Sequence
from decimal import Decimal

import torch
from torch import nn

from jaxensemble.network import Arg, Var
from torch_bridge.layout import Layout, fresh
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.features import featured
from torch_bridge.lowering.linear import param_dtype
from torch_bridge.lowering.promotion import apply, promoted
from torch_bridge.lowering.state import COUNTER
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value

Weight = Value | None

UNTRACKED = (
    "it writes running statistics in evaluation mode too; pass running_mean=None and running_var=None, or let "
    "`training` follow the module's mode"
)
UNHELD = "the weights of a batch normalisation are not all that one module holds, so that its statistics cannot move"


# With running statistics


@register("torch_bridge.batch_norm.default")
def batch_norm(
    b: Builder, x: Value, w: Weight, bias: Weight, mean: Weight, var: Weight, momentum: float, eps: float, mode: str
) -> Value:
    x = b.value(x)
    if mode == "always" and (mean is not None or var is not None):
        raise b.unsupported(UNTRACKED)
    if x.ndim > 2:
        x = b.channels_last(x, x.ndim - 2)
    x, axes, weights = featured(b, x, (1,), w, bias, mean, var, merged=True)
    options = _axis(x, axes) | _eps(eps, 1e-5) | _affine(w, bias)
    if mode == "always":
        options = {"num_features": x.shape[1], **options}
        return _scaled_layer(b, "layers.BatchNorm", x, weights[:2], options | {"track_running_stats": False}, (1,))
    leaves = dict(zip(("scale", "bias", "mean", "var"), weights, strict=True))
    path = None
    if mode == "by_mode" or b.evaluation_only:
        path = _tracking_layer(b, "layers.BatchNorm", leaves, options, momentum)
    if path is not None:
        return b.laid(b.emit(f"layer:{path}", x.expr), x.layout)
    if mode == "by_mode":
        b.evaluation_only = b.evaluation_only or UNHELD
    return _given_statistics(b, x, axes, weights, eps)


@register("torch_bridge.instance_norm.default")
def instance_norm(
    b: Builder, x: Value, w: Weight, bias: Weight, mean: Weight, var: Weight, momentum: float, eps: float, mode: str
) -> Value:
    x = b.value(x)
    if mode == "always" and (mean is not None or var is not None):
        raise b.unsupported(UNTRACKED)
    x = b.channels_last(x, x.ndim - 2)
    x, axes, weights = featured(b, x, (1,), w, bias, mean, var)
    if mode == "always":
        options = {"num_features": x.shape[1]} | _eps(eps, 1e-6) | _affine(w, bias) | {"use_fast_variance": False}
        return _scaled_layer(b, "nnx.InstanceNorm", x, weights[:2], options, (1,))
    leaves = dict(zip(("scale", "bias", "mean", "var"), weights, strict=True))
    path = None
    if mode == "by_mode" or b.evaluation_only:
        path = _tracking_layer(b, "layers.InstanceNorm", leaves, _eps(eps, 1e-5) | _affine(w, bias), momentum)
    if path is not None:
        return b.laid(b.emit(f"layer:{path}", x.expr), x.layout)
    if mode == "by_mode":
        b.evaluation_only = b.evaluation_only or UNHELD
    return _given_statistics(b, x, axes, weights, eps)


def _tracking_layer(
    b: Builder, type_: str, leaves: dict[str, tuple[Weight, Layout | None]], options: dict[str, Arg], momentum: float
) -> str | None:
    """The path of the layer that holds the weights, its counter of batches included."""
    keys = [weight.key for weight, _ in leaves.values() if weight is not None]
    owner = next(iter(b.owners([key for key in keys if key is not None])), None) if None not in keys else None
    if owner is None:
        return None
    counter = f"{owner}.{COUNTER}"
    tensor = b.state.tensors.get(counter)
    first = leaves["mean"][0]
    assert first is not None
    options = {"num_features": first.shape[0], **_momentum(b, owner, momentum), **options}
    options |= {} if tensor is not None else {"count_batches": False}
    path = b.claim(type_, options | param_dtype(first), leaves)
    if path == owner and tensor is not None:
        key = b.state.names[counter][0]
        if key not in b.storage:
            layout = fresh(tuple(tensor.shape))
            b.store(Value(Var(counter), layout, tensor.dtype, key=key), counter, layout)
    return path


def _momentum(b: Builder, owner: str, momentum: float) -> dict[str, Arg]:
    """Flax's momentum is the share of the old average, PyTorch's that of the new value."""
    module = b.state.modules[owner]
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
        return {"momentum": None}
    kept = float(1 - Decimal(repr(float(momentum))))
    return {} if kept == 0.9 else {"momentum": kept}


def _given_statistics(
    b: Builder, x: Value, axes: Sequence[int], weights: Sequence[tuple[Weight, Layout | None]], eps: float
) -> Value:
    scale, bias, mean, var = (w if w is None or layout is None else b.array(w, layout.axes) for w, layout in weights)
    affine = (scale, bias) if bias is not None else (scale,) if scale is not None else ()
    options = _axis(x, axes) | _eps(eps, 1e-5)
    return b.laid(b.emit("ops.batch_norm", x.expr, mean, var, *affine, **options), x.layout)


# Without


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
    options = _eps(eps, 1e-6) | _affine(weight, bias) | {"use_fast_variance": False}
    return _over_features(b, "nnx.LayerNorm", x, normalized_shape, (weight, bias), options)


@register("aten.rms_norm.default")
def rms_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Weight = None, eps: float | None = None
) -> Value:
    x = b.value(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    options = _eps(eps, 1e-6) | ({} if weight is not None else {"use_scale": False})
    return _over_features(b, "nnx.RMSNorm", x, normalized_shape, (weight, None), options)


def _over_features(
    b: Builder, type_: str, x: Value, shape: Sequence[int], weights: Sequence[Weight], options: dict[str, Arg]
) -> Value:
    """A normalisation over the last dimensions, wherever these are stored."""
    dims = tuple(range(-len(shape), 0))
    x, axes, held = featured(b, b.value(x), dims, *weights)
    count = 1
    for size in shape:
        count *= int(size)
    from_end = tuple(axis - len(x.layout.axes) for axis in axes)
    where: dict[str, Arg] = {}
    if from_end != (-1,):
        over = from_end if len(from_end) > 1 else from_end[0]
        where = {"reduction_axes": over, "feature_axes": over}
    options = {"num_features": count, **options, **where}
    return _scaled_layer(b, type_, x, held, options, dims)


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
    """Channels-last, the groups are still runs of neighbouring channels: they must be stored in PyTorch's order."""
    x = b.value(x)
    x = b.channels_last(x, x.ndim - 2)
    x, _, held = featured(b, x, (1,), weight, bias)
    groups: dict[str, Arg] = {} if num_groups == 32 else {"num_groups": num_groups}
    options = {**groups, **_eps(eps, 1e-6), **_affine(weight, bias), "use_fast_variance": False}
    return _scaled_layer(b, "nnx.GroupNorm", x, held, {"num_features": x.shape[1], **options}, (1,))


def _scaled_layer(
    b: Builder,
    type_: str,
    x: Value,
    weights: Sequence[tuple[Weight, Layout | None]],
    options: dict[str, Arg],
    dims: Sequence[int],
) -> Value:
    """A layer that normalises, with scale and bias of its own if a module holds just these, else applied after it."""
    first = next((weight for weight, _ in weights if weight is not None), None)
    leaves = dict(zip(("scale", "bias"), weights, strict=True))
    path = None if first is None else b.claim(type_, options | param_dtype(first), leaves)
    if path is not None:
        return b.laid(b.emit(f"layer:{path}", x.expr), x.layout)
    bare: dict[str, Arg] = {"use_scale": False} if type_ == "nnx.RMSNorm" else {"use_bias": False, "use_scale": False}
    name = type_.partition(".")[2].replace("Norm", "_norm").lower()
    y = b.laid(b.emit(f"layer:{b.stateless(type_, options | bare, name)}", x.expr), x.layout)
    for target, (weight, _) in zip("*+", weights, strict=True):
        if weight is not None:
            y = apply(b, target, y, _beside(b, weight, x, dims))
    return y


def _beside(b: Builder, weight: Value, x: Value, dims: Sequence[int]) -> Value:
    """A weight with dimensions of size one for those of `x` that follow its own."""
    following = x.ndim - 1 - dims[-1] % x.ndim
    if following == 0:
        return weight
    weight = b.plain(weight)
    return dataclasses.replace(weight, layout=Layout((*weight.layout.dims, *((),) * following), weight.layout.axes))


def _eps(eps: float, default: float) -> dict[str, Arg]:
    return {} if eps == default else {"epsilon": eps}


def _affine(weight: Weight, bias: Weight) -> dict[str, Arg]:
    missing = {"use_bias": bias, "use_scale": weight}
    return {name: False for name, held in missing.items() if held is None}


def _axis(x: Value, axes: Sequence[int]) -> dict[str, Arg]:
    (axis,) = axes
    return {} if axis == len(x.layout.axes) - 1 else {"axis": axis}


# By a norm


@register("aten._weight_norm.default")
def weight_norm(b: Builder, v: Value, g: Value, dim: int = 0) -> Value:
    options: dict[str, Arg] = {} if dim == 0 else {"axis": None if dim == -1 else dim}
    return b.new(b.emit("ops.weight_norm", b.plain(v).expr, b.plain(g).expr, **options))


@register("aten.cosine_similarity.default")
def cosine_similarity(b: Builder, x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    x, y = promoted(b, (x1, x2), b.dtype)
    options: dict[str, Arg] = ({} if dim == 1 else {"axis": dim}) | ({} if eps == 1e-8 else {"epsilon": eps})
    return b.new(b.emit("ops.cosine_similarity", b.plain(x).expr, b.plain(y).expr, **options))


@register("aten.pairwise_distance.default")
def pairwise_distance(
    b: Builder, x1: Value, x2: Value, p: float = 2, eps: float = 1e-6, keepdim: bool = False
) -> Value:
    difference = b.plain(apply(b, "+", apply(b, "-", x1, x2), eps))
    order = () if p == 2 else (p,)
    options: dict[str, Arg] = {"axis": -1} | ({"keepdims": True} if keepdim else {})
    return b.new(b.emit("ops.vector_norm", difference.expr, *order, **options))
