"""Operations on one element at a time: arithmetic, comparison, activations."""

from typing import Any

from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value

UNARY = {
    "aten.relu.default": "nnx.relu",
    "aten.sigmoid.default": "nnx.sigmoid",
    "aten.tanh.default": "jnp.tanh",
    "aten.silu.default": "nnx.silu",
    "aten.exp.default": "jnp.exp",
}
"""Operations that are one function of one array."""

BINARY = {
    "aten.mul.Tensor": "*",
    "aten.div.Tensor": "/",
}
"""Operations that are one function of two arrays, or of an array and a number."""


def _unary(target: str) -> Any:
    return lambda b, x: b.elementwise(target, x)


def _binary(target: str) -> Any:
    return lambda b, x, y: b.elementwise(target, x, y)


for operation, name in UNARY.items():
    register(operation)(_unary(name))
for operation, name in BINARY.items():
    register(operation)(_binary(name))


@register("aten.add.Tensor", "aten.add.Scalar")
def add(b: Builder, x: Value, y: Any, alpha: Any = 1) -> Value:
    return b.elementwise("+", x, y if alpha == 1 else b.elementwise("*", y, alpha))


@register("aten.sub.Tensor", "aten.sub.Scalar")
def sub(b: Builder, x: Value, y: Any, alpha: Any = 1) -> Value:
    return b.elementwise("-", x, y if alpha == 1 else b.elementwise("*", y, alpha))
