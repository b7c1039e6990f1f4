"""Dropout of every kind, as layers that draw from a random stream of their own."""

from jaxensemble.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value


@register("torch_bridge.dropout.default")
def dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _dropped(b, "nnx.Dropout", x, p, mode, "dropout")


@register("torch_bridge.feature_dropout.default")
def feature_dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _dropped(b, "nnx.Dropout", x, p, mode, "dropout", channels=True)


@register("torch_bridge.alpha_dropout.default")
def alpha_dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _dropped(b, "layers.AlphaDropout", x, p, mode, "alpha_dropout")


@register("torch_bridge.feature_alpha_dropout.default")
def feature_alpha_dropout(b: Builder, x: Value, p: float, mode: str) -> Value:
    return _dropped(b, "layers.AlphaDropout", x, p, mode, "alpha_dropout", channels=True)


def _dropped(b: Builder, type_: str, x: Value, p: float, mode: str, name: str, channels: bool = False) -> Value:
    """`F.dropout(x)` drops in evaluation too: its layer is told so at each call. A rate of 0 never does anything."""
    if mode == "never" or p == 0:
        return x
    x = b.value(x)
    x = b.tidy(x) if channels else b.plain(x) if x.open else x
    options: dict[str, Arg] = {"rate": p}
    if channels:
        options |= {"broadcast_dims": tuple(sorted(x.axis(dim) for dim in range(2, x.ndim)))}
    always: dict[str, Arg] = {"deterministic": False} if mode == "always" else {}
    path = b.stateless(type_, options, name)
    return b.laid(b.emit(f"layer:{path}", x.expr, **always), x.layout)
