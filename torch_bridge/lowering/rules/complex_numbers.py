"""Complex numbers, their parts, conjugates and angles."""

import torch

from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import settled_value
from torch_bridge.lowering.dtypes import apply, cast
from torch_bridge.lowering.rules.shape import reshape_to
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value


@register("aten.complex.default")
def complex_(b: Builder, real: Operand, imag: Operand) -> Value:
    part = b.dtype.to_real()
    parts, layout = b.align(cast(b, real, part), cast(b, imag, part))
    alike = parts[0].layout.stored_shape == parts[1].layout.stored_shape
    return b.laid(b.emit("lax.complex" if alike else "ops.complex_of", *[value.expr for value in parts]), layout)


@register("aten.polar.default")
def polar(b: Builder, size: Operand, angle: Operand) -> Value:
    return b.elementwise("ops.polar", size, angle)


@register("aten.view_as_real.default", "aten.view_as_real_copy.default")
def view_as_real(b: Builder, x: Value) -> Value:
    value = b.plain(x)
    parts = [b.emit("jnp.real", value.expr), b.emit("jnp.imag", value.expr)]
    result = b.new(b.emit("jnp.stack", parts, axis=-1), (*value.shape, 2))
    b.pairs[result] = value
    return result


@register("aten.view_as_complex.default", "aten.view_as_complex_copy.default")
def view_as_complex(b: Builder, x: Value) -> Value:
    value = b.plain(x)
    parts = [b.emit("[]", value.expr, (..., k)) for k in range(2)]
    return b.new(b.emit("lax.complex", *parts), value.shape[:-1])


@register("aten.view.dtype")
def view_as_dtype(b: Builder, x: Value, dtype: torch.dtype) -> Value:
    value = settled_value(b, x)
    if value.dtype.is_complex and dtype == value.dtype.to_real():
        return reshape_to(b, view_as_real(b, value), b.result_shape)
    if dtype.is_complex and value.dtype == dtype.to_real():
        return view_as_complex(b, reshape_to(b, value, (*b.result_shape, 2)))
    raise b.unsupported(
        "it shows bits as numbers of another kind; only complex numbers and their parts are carried over"
    )


@register("aten.real.default")
def real(b: Builder, x: Value) -> Value:
    return b.elementwise("jnp.real", x) if x.dtype.is_complex else x


@register("aten.imag.default")
def imag(b: Builder, x: Value) -> Value:
    return b.elementwise("jnp.imag", x)


@register("aten._conj.default", "aten.conj.default", "aten._conj_physical.default", "aten.conj_physical.default")
def conj(b: Builder, x: Value) -> Value:
    """The conjugate. PyTorch's conjugates are lazy; here they are ordinary numbers."""
    return b.elementwise("jnp.conj", x) if x.dtype.is_complex else x


@register("aten.resolve_conj.default", "aten.resolve_neg.default")
def resolve_conj(b: Builder, x: Value) -> Value:
    return x


@register("aten._neg_view.default")
def negative(b: Builder, x: Value) -> Value:
    return apply(b, "neg", x)


@register("aten.angle.default")
def angle(b: Builder, x: Value) -> Value:
    return b.elementwise("ops.angle", cast(b, x, b.dtype) if not x.dtype.is_complex else x)


@register("aten.sgn.default")
def sgn(b: Builder, x: Value) -> Value:
    return b.elementwise("ops.sgn", x) if x.dtype.is_complex else apply(b, "jnp.sign", x)


@register("aten.isreal.default")
def isreal(b: Builder, x: Value) -> Value:
    return b.elementwise("jnp.isreal", x, dtype=torch.bool)
