"""Dropout of every kind."""

import math

import torch

from jaxensemble.layers.dropout import SATURATION
from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import shape_argument
from torch_bridge.lowering.layouts.layout import Layout
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value


@register("torch_bridge.dropout.default")
def dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _drop(b, "nnx.Dropout", x, p, mode, "dropout")


@register("torch_bridge.feature_dropout.default")
def feature_dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _drop(b, "nnx.Dropout", x, p, mode, "dropout", channels=True)


@register("torch_bridge.alpha_dropout.default")
def alpha_dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _drop(b, "layers.AlphaDropout", x, p, mode, "alpha_dropout")


@register("torch_bridge.feature_alpha_dropout.default")
def feature_alpha_dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _drop(b, "layers.AlphaDropout", x, p, mode, "alpha_dropout", channels=True)


def _drop(b: Builder, type_: str, x: Value, p: float, mode: str, name: str, channels: bool = False) -> Value:
    """Dropout as a layer with a random stream of its own.

    `F.dropout(x)` drops in evaluation too: each call passes `deterministic=False` to its layer. A rate of 0 does
    nothing.
    """
    if mode == "never" or p == 0 or (b.draw_mode == "evaluation" and mode == "by_mode"):
        return x
    x = b.value(x)
    x = b.tidy(x) if channels else b.plain(x) if x.open else x
    if b.draw_mode is not None and p < 1:
        return write_out_dropout(b, x, p, alpha=type_ == "layers.AlphaDropout", channels=channels)
    options: dict[str, Arg] = {"rate": p}
    if channels:
        options |= {"broadcast_dims": tuple(sorted(x.axis(dim) for dim in range(2, x.ndim)))}
    always: dict[str, Arg] = {"deterministic": False} if mode == "always" else {}
    path = b.stateless_layer(type_, options, name)
    return b.laid(b.emit(f"layer:{path}", x.expr, **always), x.layout)


def write_out_dropout(b: Builder, x: Value, p: float, *, alpha: bool = False, channels: bool = False) -> Value:
    """Dropout as arithmetic, so that PyTorch can be given the draws.

    A draw is a mask of the elements, or channels, that are kept.
    """
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if channels else x.shape
    kept = b.new(b.emit("jax.random.bernoulli", b.random_key(), 1 - p, shape_argument(b, shape)), shape, torch.bool)
    b.note_draw(kept)
    if not channels:  # stored as `x` is, so that `x` need not move
        kept = b.arrange(Value(kept.expr, Layout(x.layout.dims, x.layout.dims), torch.bool), x.layout.axes)
    if not alpha:
        return b.elementwise("jnp.where", kept, b.elementwise("/", x, 1 - p), 0.0)
    scale = 1 / math.sqrt((SATURATION**2 * p + 1) * (1 - p))
    dropped = b.elementwise("jnp.where", kept, b.elementwise("*", x, scale), -SATURATION * scale)
    return b.elementwise("+", dropped, SATURATION * scale * p)
