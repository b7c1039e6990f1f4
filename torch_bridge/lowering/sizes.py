"""Sizes and numbers that a forward computes from the size of its batch, as calls of the network."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy

from jaxensemble.network.network import Arg, Ref, Var
from torch_bridge.lowering.layouts.layout import Size

Known: TypeAlias = Sequence[tuple[Ref | Var, Sequence[Size]]]
"""Arrays that sizes can be read from, and their stored shapes."""

Emit: TypeAlias = Callable[..., Ref]

_OPERATORS = {
    "FloorDiv": "//",
    "CleanDiv": "//",
    "Mod": "%",
    "PythonMod": "%",
    "IntTrueDiv": "/",
    "FloatTrueDiv": "/",
    "PowByNatural": "**",
    "FloatPow": "**",
}
"""PyTorch's own functions of two sizes."""


def emit_size(emit: Emit, wanted: Any, known: Known) -> Arg | None:
    """Emits the calls that compute a number from sizes of known arrays.

    **Arguments:** `emit` appends a call to the network.

    **Returns:** the result as an argument, or None where the number is another function of the batch size.
    """
    if wanted.is_Integer:
        return int(wanted)
    if wanted.is_Number:
        return float(wanted)
    for expr, shape in known:
        if wanted in shape:
            return emit(".shape", expr, list(shape).index(wanted))
    if isinstance(wanted, sympy.Symbol):
        return _solve_size(emit, wanted, known)
    name, parts = type(wanted).__name__, wanted.args
    if name == "ToFloat":
        return emit_size(emit, parts[0], known)
    if name == "OpaqueUnaryFn_sqrt":
        return _emit_chain(emit, "**", [parts[0], sympy.Float(0.5)], known)
    if name == "CeilToInt" and type(parts[0]).__name__ == "IntTrueDiv":  # as `-(-size // number)`
        above, below = (emit_size(emit, part, known) for part in parts[0].args)
        return None if above is None or below is None else emit("neg", emit("//", emit("neg", above), below))
    if name in ("TruncToInt", "FloorToInt"):
        return _emit_multiple(emit, parts[0], known)
    if name in _OPERATORS:
        return _emit_chain(emit, _OPERATORS[name], parts, known)
    if isinstance(wanted, sympy.Add):
        ahead = sorted(parts, key=lambda part: (part.could_extract_minus_sign(), not part.free_symbols))
        return _emit_sum(emit, ahead, known)
    if isinstance(wanted, sympy.Mul):
        return _emit_chain(emit, "*", sorted(parts, key=lambda part: not part.free_symbols), known)
    if isinstance(wanted, sympy.Pow):
        return _emit_chain(emit, "**", parts, known)
    return None


def _emit_multiple(emit: Emit, product: Any, known: Known) -> Arg | None:
    """Emits the whole part of a size times a number that computers hold exactly, such as 0.5 or 1.5."""
    number, size = product.as_coeff_Mul()
    above, below = float(number).as_integer_ratio()
    whole = emit_size(emit, size, known) if type(size).__name__ == "ToFloat" and below <= 1024 and above > 0 else None
    if whole is None:
        return None
    whole = whole if above == 1 else emit("*", whole, above)
    return whole if below == 1 else emit("//", whole, below)


def _emit_chain(emit: Emit, operator: str, parts: Sequence[Any], known: Known) -> Arg | None:
    """Emits an operator between all parts, from left to right."""
    total = emit_size(emit, parts[0], known)
    for part in parts[1:]:
        other = emit_size(emit, part, known)
        if total is None or other is None:
            return None
        total = emit(operator, total, other)
    return total


def _emit_sum(emit: Emit, parts: Sequence[Any], known: Known) -> Arg | None:
    """Emits a sum in which subtracted parts come last."""
    total = emit_size(emit, parts[0], known)
    for part in parts[1:]:
        less = part.could_extract_minus_sign()
        other = emit_size(emit, -part if less else part, known)
        if total is None or other is None:
            return None
        total = emit("-" if less else "+", total, other)
    return total


def _solve_size(emit: Emit, symbol: sympy.Symbol, known: Known) -> Arg | None:
    """Emits a size that is known only within an array's size: as a multiple, or in a sum with a number."""
    for expr, shape in known:
        for axis, size in enumerate(shape):
            if isinstance(size, int) or size.free_symbols != {symbol}:
                continue
            factor, rest = sympy.diff(size, symbol), size.subs(symbol, 0)
            if isinstance(factor, sympy.Integer) and isinstance(rest, sympy.Integer):
                found = emit(".shape", expr, axis)
                found = found if rest == 0 else emit("-", found, int(rest))
                return found if factor == 1 else emit("//", found, int(factor))
    return None


def is_never_negative(number: sympy.Expr) -> bool:
    """Returns whether a number is at least 0 for all open sizes that it is computed from."""
    symbols = sorted(number.free_symbols, key=str)
    tried = itertools.product(_TRIED, repeat=len(symbols))
    return all(number.subs(dict(zip(symbols, sizes, strict=True))) >= 0 for sizes in tried)


_TRIED = (1, 2, 3, 6, 7, 16, 31, 100)
