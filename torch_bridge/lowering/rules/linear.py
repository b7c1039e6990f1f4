"""Dense layers and products of matrices."""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import arrange_alike, result_with_dims, settled_value
from torch_bridge.lowering.dtypes import param_dtype
from torch_bridge.lowering.layouts import alignment
from torch_bridge.lowering.layouts.layout import Layout, Size, new_group, refinement, replace_atoms
from torch_bridge.lowering.rules.complex_numbers import conj
from torch_bridge.lowering.rules.contract import contract, parse_equation
from torch_bridge.lowering.rules.reduce import reduce_dims
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value


@register("aten.linear.default")
def linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    x = settled_value(b, x)
    weight = b.resolve(b.value(weight)) if b.value(weight).open else b.value(weight)
    # A weight that was stored for this input, and is now used transposed, shares its atoms.
    weight = dataclasses.replace(weight, layout=alignment.renew_atoms(weight.layout))
    x, weight = _move_features_last(b, x, weight)
    bias = None if bias is None else b.value(bias)
    out, features = weight.layout.dims
    stored = Layout((out, features), (x.layout.axes[-1], out))  # [O, I] -> [I, O]
    # Sizes of computed weights may be open. No layer holds these.
    options: dict[str, Any] = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    options |= {} if bias is not None else {"use_bias": False}
    path = b.claim("nnx.Linear", options | param_dtype(weight), {"kernel": (weight, stored), "bias": (bias, None)})
    fresh_out = new_group(weight.shape[0])
    result = Layout((*x.layout.dims[:-1], fresh_out), (*x.layout.axes[:-1], fresh_out))
    if path is not None:
        return b.laid(b.emit(f"layer:{path}", x.expr), result)
    y = b.emit("@", x.expr, b.array(weight, stored.axes))
    return b.laid(y if bias is None else b.emit("+", y, b.plain(bias).expr), result)


def _move_features_last(b: Builder, x: Value, weight: Value) -> tuple[Value, Value]:
    """The input with its features as one last axis, in stored order, and the weight in the same atoms.

    After a flatten, features are stored channels-last, but PyTorch's weight wants them channels-first. The features
    stay. Instead, the weight's rows are reordered once, when they are stored.
    """
    features = x.layout.dims[-1]
    parts = refinement(features, weight.layout.dims[-1])
    if parts is None:
        x = b.opaque(x)
        features = x.layout.dims[-1]
        parts = refinement(features, weight.layout.dims[-1])
        if parts is None:
            return _move_features_last(b, x, b.opaque(weight))
    first, second = parts
    layout = Layout(replace_atoms(x.layout.dims, first), replace_atoms(x.layout.axes, first))
    held = Layout(replace_atoms(weight.layout.dims, second), replace_atoms(weight.layout.axes, second))
    return _merge_features(b, Value(x.expr, layout, x.dtype)), Value(
        weight.expr, held, weight.dtype, weight.key, weight.open
    )


def _merge_features(b: Builder, x: Value) -> Value:
    """The feature atoms as one last axis, in the order in which they are stored. Other axes stay."""
    features = set(x.layout.dims[-1])
    axes = x.layout.axes
    leading = tuple(axis for axis in axes if not features & set(axis))
    if not features:
        return x if axes and not axes[-1] else b.arrange(x, (*leading, ()))
    if all(x.layout.dims[:-1]):
        leading = tuple(axis for axis in leading if axis)
    mixed = [axis for axis in axes if features & set(axis) and not set(axis) <= features]
    last = tuple(atom for axis in axes for atom in axis if atom in features)
    if mixed or (axes[-1] and not set(axes[-1]) <= features):
        return b.plain(x) if mixed else b.arrange(x, (*leading, x.layout.dims[-1]))
    return b.arrange(x, (*leading, last))


# Products


@register(
    "aten.matmul.default",
    "aten.mm.default",
    "aten.bmm.default",
    "aten.mv.default",
    "aten.dot.default",
)
def matmul(b: Builder, x: Operand, y: Operand) -> Value:
    left, right = b.value(x), b.value(y)
    rank = max(left.ndim, right.ndim, 2)
    batch = [f"b{k}" for k in range(rank - 2)]
    names = ([*batch, "i", "j"][-left.ndim :] if left.ndim > 1 else ["j"], [*batch, "j", "k"][-right.ndim :])
    names = (names[0], names[1] if right.ndim > 1 else ["j"])
    out = [*batch, *(["i"] if left.ndim > 1 else []), *(["k"] if right.ndim > 1 else [])]
    return contract(b, [left, right], *_replace_names(names, out))


def _replace_names(names: Sequence[Sequence[str]], out: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The dimensions' names replaced by single letters."""
    letters = dict(
        zip(dict.fromkeys(name for term in (*names, out) for name in term), string.ascii_letters, strict=False)
    )
    return [[letters[name] for name in term] for term in names], [letters[name] for name in out]


@register("aten.vdot.default")
def vdot(b: Builder, x: Operand, y: Operand) -> Value:
    return matmul(b, conj(b, b.value(x)), y)


@register("aten.outer.default", "aten.ger.default")
def outer(b: Builder, x: Operand, y: Operand) -> Value:
    return contract(b, [x, y], ["i", "j"], "ij")


@register("aten.inner.default")
def inner(b: Builder, x: Operand, y: Operand) -> Value:
    left, right = b.value(x), b.value(y)
    if not left.ndim or not right.ndim:
        return b.elementwise("*", x, y)
    rows = [f"l{k}" for k in range(left.ndim - 1)]
    columns = [f"r{k}" for k in range(right.ndim - 1)]
    return contract(b, [left, right], *_replace_names([[*rows, "j"], [*columns, "j"]], [*rows, *columns]))


@register("aten.tensordot.default")
def tensordot(b: Builder, x: Operand, y: Operand, dims_self: Sequence[int], dims_other: Sequence[int]) -> Value:
    left, right = b.value(x), b.value(y)
    rows, columns = [f"l{k}" for k in range(left.ndim)], [f"r{k}" for k in range(right.ndim)]
    for first, second in zip(dims_self, dims_other, strict=True):
        columns[second] = rows[first]
    out = [name for name in rows if name not in columns] + [name for name in columns if name not in rows]
    return contract(b, [left, right], *_replace_names([rows, columns], out))


@register("aten.linalg_vecdot.default")
def vecdot(b: Builder, x: Operand, y: Operand, *, dim: int = -1) -> Value:
    return reduce_dims(b, "jnp.sum", b.elementwise("*", conj(b, b.value(x)), y), dim, False)


@register("aten.einsum.default")
def einsum(b: Builder, equation: str, tensors: Sequence[Operand], *, path: Any = None) -> Value:
    values = [b.value(tensor) for tensor in tensors]
    letters, out = parse_equation(equation, [value.ndim for value in values])
    whole = all(set(term) == set(dict.fromkeys(term)) and len(set(term)) == len(term) for term in letters)
    sizes: dict[str, set[Size]] = {}
    for value, term in zip(values, letters, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes.setdefault(letter, set()).add(size)
    as_written = all(len(known) == 1 for known in sizes.values())
    stored = all(value.open or value.layout.axes == value.layout.dims for value in values)
    if not whole or (as_written and stored):
        exprs = [b.plain(value).expr for value in values]
        return b.new(b.emit("jnp.einsum", equation.replace(" ", ""), *exprs))
    return contract(b, values, letters, out)


@register("aten.addmm.default", "aten.addmv.default", "aten.baddbmm.default")
def add_product(b: Builder, x: Operand, y: Operand, z: Operand, *, beta: complex = 1, alpha: complex = 1) -> Value:
    return _sum(b, x, matmul(b, y, z), beta, alpha)


@register("aten.addr.default")
def add_outer(b: Builder, x: Operand, y: Operand, z: Operand, *, beta: complex = 1, alpha: complex = 1) -> Value:
    return _sum(b, x, outer(b, y, z), beta, alpha)


@register("aten.addbmm.default")
def add_products(b: Builder, x: Operand, y: Operand, z: Operand, *, beta: complex = 1, alpha: complex = 1) -> Value:
    return _sum(b, x, contract(b, [y, z], ["bij", "bjk"], "ik"), beta, alpha)


def _sum(b: Builder, x: Operand, product: Value, beta: complex, alpha: complex) -> Value:
    """`beta * x + alpha * product`. With `beta` 0, `x` may contain anything, even NaN."""
    product = product if alpha == 1 else b.elementwise("*", product, alpha)
    if beta == 0:
        return product
    return b.elementwise("+", x if beta == 1 else b.elementwise("*", x, beta), product)


@register("aten.bilinear.default")
def bilinear(b: Builder, x: Value, y: Value, weight: Operand, bias: Operand | None = None) -> Value:
    kernel = b.value(weight)
    out, first, second = kernel.layout.dims
    stored = Layout(kernel.layout.dims, (first, second, out))  # [O, I, J] -> [I, J, O]
    shape = tuple(int(size) for size in kernel.shape)
    options: dict[str, Arg] = {"in1_features": shape[1], "in2_features": shape[2], "out_features": shape[0]}
    options |= {} if bias is not None else {"use_bias": False}
    held = b.value(bias) if bias is not None else None
    (left, right), order = arrange_alike(b, x, y)
    path = None
    if order[-1] == left.ndim - 1:
        path = b.claim(
            "layers.Bilinear", options | param_dtype(kernel), {"kernel": (kernel, stored), "bias": (held, None)}
        )
    if path is not None:
        return result_with_dims(
            b, left, b.emit(f"layer:{path}", left.expr, right.expr), {left.ndim - 1: new_group(shape[0])}
        )
    rows = list(string.ascii_lowercase[: b.value(x).ndim - 1])
    y_ = contract(b, [x, y, kernel], [[*rows, "x"], [*rows, "y"], ["z", "x", "y"]], [*rows, "z"])
    return y_ if held is None else b.elementwise("+", y_, held)
