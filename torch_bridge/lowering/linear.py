"""Dense layers and products of matrices."""

from typing import Any

from jaxensemble.network import Arg, Dtype
from torch_bridge.layout import Atom, Layout, Size, refinement, replaced
from torch_bridge.lowering import alignment
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import DTYPES, Value


def param_dtype(weight: Value) -> dict[str, Arg]:
    """The constructor's `param_dtype`, where it is not the default."""
    name = DTYPES[weight.dtype]
    return {} if name == "float32" else {"param_dtype": Dtype(name)}


@register("aten.linear.default")
def linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    x, weight = _features_last(b, b.value(x), b.value(weight))
    out, features = weight.layout.dims
    stored = Layout((out, features), (x.layout.axes[-1], out))  # [O, I] -> [I, O]
    options = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    options |= {} if bias is not None else {"use_bias": False}
    path = b.claim(
        "nnx.Linear", options | param_dtype(weight), {"kernel": (weight, stored), "bias": (bias, None)}
    )
    fresh_out = (Atom(weight.shape[0]),) if weight.shape[0] != 1 else ()
    result = Layout((*x.layout.dims[:-1], fresh_out), (*x.layout.axes[:-1], fresh_out))
    if path is not None:
        return b.laid(b.emit(f"layer:{path}", x.expr), result)
    y = b.emit("@", x.expr, b.array(weight, stored.axes))
    return b.laid(y if bias is None else b.emit("+", y, b.plain(bias).expr), result)


def _features_last(b: Builder, x: Value, weight: Value) -> tuple[Value, Value]:
    """The input with its features as one last axis, in stored order, and the weight told in the same atoms.

    After a flatten, features are stored channels-last while PyTorch's weight wants them channels-first. They are left
    as they are: it is the weight's rows that get another order, once, when they are stored.
    """
    features = x.layout.dims[-1]
    parts = refinement(features, weight.layout.dims[-1])
    if parts is None:
        x = b.opaque(x)
        features = x.layout.dims[-1]
        parts = refinement(features, weight.layout.dims[-1])
        if parts is None:
            return _features_last(b, x, b.opaque(weight))
    first, second = parts
    layout = Layout(replaced(x.layout.dims, first), replaced(x.layout.axes, first))
    held = Layout(replaced(weight.layout.dims, second), replaced(weight.layout.axes, second))
    return _merged(b, Value(x.expr, layout, x.dtype)), Value(weight.expr, held, weight.dtype, weight.key, weight.open)


def _merged(b: Builder, x: Value) -> Value:
    """The feature atoms as one last axis, in the order in which they are stored; other axes as they are."""
    features = set(x.layout.dims[-1])
    axes = x.layout.axes
    leading = tuple(axis for axis in axes if not features & set(axis))
    mixed = [axis for axis in axes if features & set(axis) and not set(axis) <= features]
    last = tuple(atom for axis in axes for atom in axis if atom in features)
    if mixed or (features and axes[-1] and not set(axes[-1]) <= features):
        return b.plain(x) if mixed else b.arranged(x, (*leading, x.layout.dims[-1]))
    if axes != (*leading, last):  # it is reshaped anyway: axes of size one go with it
        leading = tuple(axis for axis in leading if axis)
    return b.arranged(x, (*leading, last))
