"""Operations on single elements: arithmetic, comparison, logic, rounding, special functions, casts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from torch_bridge.compat import ties_share_gradients
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dtypes import apply, apply_predicate, cast, common_dtype, promote_operands
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value, as_number, is_array

UNARY = {
    "neg": "neg",
    "negative": "neg",
    "sign": "jnp.sign",
    "exp": "jnp.exp",
    "exp2": "jnp.exp2",
    "expm1": "jnp.expm1",
    "log": "jnp.log",
    "log2": "jnp.log2",
    "log10": "jnp.log10",
    "log1p": "jnp.log1p",
    "special_exp2": "jnp.exp2",
    "special_expm1": "jnp.expm1",
    "special_log1p": "jnp.log1p",
    "sqrt": "jnp.sqrt",
    "rsqrt": "lax.rsqrt",
    "square": "jnp.square",
    "reciprocal": "jnp.reciprocal",
    "sin": "jnp.sin",
    "cos": "jnp.cos",
    "tan": "jnp.tan",
    "asin": "jnp.arcsin",
    "arcsin": "jnp.arcsin",
    "acos": "jnp.arccos",
    "arccos": "jnp.arccos",
    "atan": "jnp.arctan",
    "arctan": "jnp.arctan",
    "sinh": "jnp.sinh",
    "cosh": "jnp.cosh",
    "tanh": "jnp.tanh",
    "asinh": "jnp.arcsinh",
    "arcsinh": "jnp.arcsinh",
    "acosh": "jnp.arccosh",
    "arccosh": "jnp.arccosh",
    "atanh": "jnp.arctanh",
    "arctanh": "jnp.arctanh",
    "deg2rad": "jnp.deg2rad",
    "rad2deg": "jnp.rad2deg",
    "sinc": "jnp.sinc",
    "special_sinc": "jnp.sinc",
    "erf": "lax.erf",
    "special_erf": "lax.erf",
    "erfc": "lax.erfc",
    "special_erfc": "lax.erfc",
    "erfinv": "lax.erf_inv",
    "special_erfinv": "lax.erf_inv",
    "lgamma": "lax.lgamma",
    "special_gammaln": "lax.lgamma",
    "digamma": "ops.digamma",
    "special_digamma": "ops.digamma",
    "special_psi": "ops.digamma",
    "special_i0e": "lax.bessel_i0e",
    "special_i1e": "lax.bessel_i1e",
    "i0": "ops.bessel_i0",
    "special_i0": "ops.bessel_i0",
    "special_i1": "ops.bessel_i1",
    "special_entr": "ops.entr",
    "special_ndtr": "ops.normal_cdf",
    "special_ndtri": "ops.normal_quantile",
    "bitwise_not": "~",
}
"""Functions of one array, computed in the dtype of the result. (`abs` and rounding are below: integers differ.)"""

CUT = {f"jnp.{name}": f"ops.{name}" for name in ("sqrt", "arcsin", "arccos", "arccosh")}
"""Functions that `jax.numpy` gets wrong on one side of their branch cut, for complex numbers."""

QUESTIONS = {
    "isnan": "jnp.isnan",
    "isinf": "jnp.isinf",
    "isfinite": "jnp.isfinite",
    "isposinf": "jnp.isposinf",
    "isneginf": "jnp.isneginf",
    "signbit": "jnp.signbit",
    "logical_not": "jnp.logical_not",
}
"""Functions of one array that give bools."""

BINARY = {
    "mul.Tensor": "*",
    "mul.Scalar": "*",
    "multiply.Tensor": "*",
    "multiply.Scalar": "*",
    "div.Tensor": "/",
    "div.Scalar": "/",
    "divide.Tensor": "/",
    "divide.Scalar": "/",
    "true_divide.Tensor": "/",
    "true_divide.Scalar": "/",
    "floor_divide.default": "//",
    "floor_divide.Scalar": "//",
    "remainder.Tensor": "%",
    "remainder.Scalar": "%",
    "remainder.Scalar_Tensor": "%",
    "fmod.Tensor": "jnp.fmod",
    "fmod.Scalar": "jnp.fmod",
    "maximum.default": "jnp.maximum",
    "max.other": "jnp.maximum",
    "minimum.default": "jnp.minimum",
    "min.other": "jnp.minimum",
    "atan2.default": "ops.arctan2",
    "arctan2.default": "ops.arctan2",
    "hypot.default": "jnp.hypot",
    "heaviside.default": "jnp.heaviside",
    "logaddexp.default": "jnp.logaddexp",
    "logaddexp2.default": "jnp.logaddexp2",
    "xlogy.Tensor": "ops.xlogy",
    "xlogy.Scalar_Other": "ops.xlogy",
    "xlogy.Scalar_Self": "ops.xlogy",
    "special_xlogy.default": "ops.xlogy",
    "special_xlogy.other_scalar": "ops.xlogy",
    "special_xlogy.self_scalar": "ops.xlogy",
    "special_xlog1py.default": "ops.xlog1py",
    "special_xlog1py.other_scalar": "ops.xlog1py",
    "special_xlog1py.self_scalar": "ops.xlog1py",
    "copysign.Tensor": "ops.copysign",
    "copysign.Scalar": "ops.copysign",
    "gcd.default": "jnp.gcd",
    "lcm.default": "jnp.lcm",
    "nextafter.default": "ops.nextafter",
    "special_zeta.default": "jax.scipy.special.zeta",
    "special_zeta.other_scalar": "jax.scipy.special.zeta",
    "special_zeta.self_scalar": "jax.scipy.special.zeta",
    "igamma.default": "jax.scipy.special.gammainc",
    "special_gammainc.default": "jax.scipy.special.gammainc",
    "igammac.default": "jax.scipy.special.gammaincc",
    "special_gammaincc.default": "jax.scipy.special.gammaincc",
    **{
        f"{name}.{overload}": symbol
        for operation, dunder, number, symbol in (
            ("and", "and", "Scalar", "&"),
            ("or", "or", "Scalar", "|"),
            ("xor", "xor", "Scalar", "^"),
            ("left_shift", "lshift", "Tensor_Scalar", "jnp.left_shift"),
            ("right_shift", "rshift", "Tensor_Scalar", "jnp.right_shift"),
        )
        for name, overloads in (
            (f"bitwise_{operation}", ("Tensor", number, "Scalar_Tensor")),
            (f"__{dunder}__", ("Tensor", "Scalar")),
        )
        for overload in overloads
    },
}
"""Functions of two arrays, or of an array and a number, computed in the dtype of the result."""

COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "not_equal": "!=",
    "lt": "<",
    "less": "<",
    "le": "<=",
    "less_equal": "<=",
    "gt": ">",
    "greater": ">",
    "ge": ">=",
    "greater_equal": ">=",
}
"""Comparisons of two arrays, or of an array and a number."""


def _unary(target: str) -> Callable[[Builder, Value], Value]:
    return lambda b, x: apply(b, CUT.get(target, target) if b.dtype.is_complex else target, x)


def _question(target: str) -> Callable[[Builder, Value], Value]:
    return lambda b, x: apply_predicate(b, target, x)


def _binary(target: str) -> Callable[[Builder, Operand, Operand], Value]:
    return lambda b, x, y: apply(b, target, x, y)


def _comparison(target: str) -> Callable[[Builder, Operand, Operand], Value]:
    return lambda b, x, y: apply_predicate(b, target, x, y)


for _name, _target in UNARY.items():
    register(f"aten.{_name}.default")(_unary(_target))
for _name, _target in QUESTIONS.items():
    register(f"aten.{_name}.default")(_question(_target))
for _name, _target in BINARY.items():
    register(f"aten.{_name}")(_binary(_target))
for _name, _target in COMPARISONS.items():
    register(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_comparison(_target))


# Arithmetic


def scale_operand(b: Builder, x: Operand, factor: Any) -> Any:
    """`factor * x` in the dtype of the result. A factor of one is left out."""
    if factor == 1:
        return x
    return apply(b, "*", x, factor) if is_array(x) else as_number(x) * factor


@register("aten.add.Tensor", "aten.add.Scalar")
def add(b: Builder, x: Operand, y: Operand, alpha: complex = 1) -> Value:
    return apply(b, "+", x, scale_operand(b, y, alpha))


@register("aten.sub.Tensor", "aten.sub.Scalar", "aten.subtract.Tensor", "aten.subtract.Scalar")
def sub(b: Builder, x: Operand, y: Operand, alpha: complex = 1) -> Value:
    return apply(b, "-", x, scale_operand(b, y, alpha))


@register("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(b: Builder, x: Operand, y: Operand, alpha: complex = 1) -> Value:
    return apply(b, "-", y, scale_operand(b, x, alpha))


@register(
    "aten.div.Tensor_mode",
    "aten.div.Scalar_mode",
    "aten.divide.Tensor_mode",
    "aten.divide.Scalar_mode",
)
def rounded_division(b: Builder, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return apply(b, "/", x, y)
    return apply(b, "//" if rounding_mode == "floor" else "ops.truncated_divide", x, y)


@register("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(b: Builder, x: Operand, exponent: Any) -> Value:
    """A power. A whole exponent is written as an integer: JAX then multiplies, as PyTorch does."""
    if not is_array(exponent):
        exponent = _as_whole(as_number(exponent))
        if exponent == 1:
            return cast(b, x, b.dtype)
        if isinstance(exponent, complex):
            return apply(b, "ops.power", x, exponent)
    elif isinstance(exponent, Value) and is_array(x):
        return apply(b, "ops.power", x, exponent)
    return apply(b, "**", x, exponent)


def _as_whole(exponent: Any) -> Any:
    return int(exponent) if isinstance(exponent, float) and exponent.is_integer() else exponent


@register("aten.float_power.Tensor_Scalar", "aten.float_power.Tensor_Tensor", "aten.float_power.Scalar")
def float_power(b: Builder, x: Operand, exponent: Any) -> Value:
    return power(b, cast(b, x, b.dtype), cast(b, exponent, b.dtype))


@register("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(b: Builder, x: Value, end: Operand, weight: Operand) -> Value:
    return apply(b, "ops.lerp", x, end, weight)


@register("aten.addcmul.default")
def addcmul(b: Builder, x: Operand, first: Operand, second: Operand, value: complex = 1) -> Value:
    return apply(b, "+", x, apply(b, "*", scale_operand(b, first, value), second))


@register("aten.addcdiv.default")
def addcdiv(b: Builder, x: Operand, first: Operand, second: Operand, value: complex = 1) -> Value:
    return apply(b, "+", x, apply(b, "/", scale_operand(b, first, value), second))


@register("aten.ldexp.Tensor")
def ldexp(b: Builder, x: Operand, exponent: Any) -> Value:
    power_of_two = apply(b, "jnp.exp2", exponent) if is_array(exponent) else 2.0 ** as_number(exponent)
    return apply(b, "*", x, power_of_two)


@register("aten.polygamma.default", "aten.special_polygamma.default")
def polygamma(b: Builder, n: int, x: Value) -> Value:
    return b.elementwise("ops.polygamma", cast(b, x, b.dtype), order=n)


# Absolute value and rounding


@register("aten.abs.default", "aten.absolute.default")
def absolute(b: Builder, x: Value) -> Value:
    if x.dtype.is_complex:
        return b.elementwise("jnp.abs", x)
    return apply(b, "ops.abs" if x.dtype.is_floating_point else "jnp.abs", x)


ROUNDING = {
    "ceil": "jnp.ceil",
    "floor": "jnp.floor",
    "trunc": "jnp.trunc",
    "fix": "jnp.trunc",
    "round": "jnp.round",
}
"""Functions that leave integers as they are."""


def _rounding(target: str) -> Callable[[Builder, Value], Value]:
    return lambda b, x: apply(b, target, x) if x.dtype.is_floating_point else x


for _name, _target in ROUNDING.items():
    register(f"aten.{_name}.default")(_rounding(_target))


@register("aten.round.decimals", "aten.special_round.default")
def round_decimals(b: Builder, x: Value, decimals: int = 0) -> Value:
    if decimals == 0 or not x.dtype.is_floating_point:
        return _rounding("jnp.round")(b, x)
    scale = float(10 ** abs(decimals))
    there, back = ("*", "/") if decimals > 0 else ("/", "*")
    return apply(b, back, apply(b, "jnp.round", apply(b, there, x, scale)), scale)


@register("aten.frac.default")
def frac(b: Builder, x: Value) -> Value:
    return apply(b, "-", x, apply(b, "jnp.trunc", x))


# Bounds and choices


@register(
    "aten.clamp.default",
    "aten.clamp.Tensor",
    "aten.clip.default",
    "aten.clip.Tensor",
)
def clamp(b: Builder, x: Value, min: Operand | None = None, max: Operand | None = None) -> Value:
    target = "ops.clamp"
    if b.dtype.is_floating_point and ties_share_gradients():
        target = "ops.clamp_shared" if is_array(min) or is_array(max) else "ops.clamp_open"
    return apply(b, target, x, *([min] if max is None else [min, max]))


@register("aten.fmax.default")
def fmax(b: Builder, x: Value, y: Value) -> Value:
    return apply(b, _target_for_ties(b, "ops.fmax"), x, y)


@register("aten.fmin.default")
def fmin(b: Builder, x: Value, y: Value) -> Value:
    return apply(b, _target_for_ties(b, "ops.fmin"), x, y)


def _target_for_ties(b: Builder, target: str) -> str:
    """The name of the function that treats equal numbers as this PyTorch does."""
    return f"{target}_shared" if b.dtype.is_floating_point and ties_share_gradients() else target


@register("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(b: Builder, x: Value, min: Operand) -> Value:
    return clamp(b, x, min)


@register("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(b: Builder, x: Value, max: Operand) -> Value:
    return clamp(b, x, None, max)


@register("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(b: Builder, condition: Operand, x: Operand, y: Operand) -> Value:
    condition = cast(b, condition, torch.bool)
    if not is_array(x) and not is_array(y):
        chosen = b.elementwise("jnp.where", condition, x, y, dtype=None)
        return (
            cast(b, dataclasses.replace(chosen, dtype=torch.float64), b.dtype) if b.dtype.is_floating_point else chosen
        )
    return b.elementwise("jnp.where", condition, *promote_operands(b, (x, y), b.dtype))


@register("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(b: Builder, x: Operand, mask: Operand, value: Any) -> Value:
    value = cast(b, value, b.dtype) if is_array(value) else as_number(value)
    return b.elementwise("jnp.where", mask, value, x)


@register("aten.nan_to_num.default")
def nan_to_num(b: Builder, x: Value, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Value:
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        return x
    given = {"nan": nan or None, "posinf": posinf, "neginf": neginf}
    return b.elementwise("jnp.nan_to_num", x, **{name: value for name, value in given.items() if value is not None})


@register("aten.logit.default", "aten.special_logit.default")
def logit(b: Builder, x: Value, eps: float | None = None) -> Value:
    if eps is not None:
        x = apply(b, "ops.clamp", x, eps, 1 - eps)
    return apply(b, "jnp.log", apply(b, "/", x, apply(b, "-", 1, x)))


@register("aten.isclose.default")
def isclose(
    b: Builder, x: Operand, y: Operand, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Value:
    options: dict[str, Any] = {"rtol": rtol, "atol": atol, "equal_nan": equal_nan}
    defaults = {"rtol": 1e-5, "atol": 1e-8, "equal_nan": False}
    changed = {name: value for name, value in options.items() if value != defaults[name]}
    return b.elementwise("jnp.isclose", *promote_operands(b, (x, y), common_dtype(x, y)), **changed)


# Logic


@register("aten.logical_and.default")
def logical_and(b: Builder, x: Operand, y: Operand) -> Value:
    return b.elementwise("jnp.logical_and", x, y)


@register("aten.logical_or.default")
def logical_or(b: Builder, x: Operand, y: Operand) -> Value:
    return b.elementwise("jnp.logical_or", x, y)


@register("aten.logical_xor.default")
def logical_xor(b: Builder, x: Operand, y: Operand) -> Value:
    return b.elementwise("jnp.logical_xor", x, y)


# Dtypes


@register(
    "aten._to_copy.default",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten.to.other",
    "aten.type_as.default",
)
def to(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    """A cast. Devices, memory formats and layouts have no meaning in JAX."""
    return cast(b, x, b.dtype)


@register("aten.fill.Scalar", "aten.fill.Tensor")
def fill(b: Builder, x: Value, value: Any) -> Value:
    if is_array(value):
        return b.elementwise("jnp.full_like", x, cast(b, value, b.dtype))
    return b.elementwise("jnp.full_like", x, as_number(value))


@register("aten.zero.default")
def zero(b: Builder, x: Value) -> Value:
    return b.elementwise("jnp.zeros_like", x)
