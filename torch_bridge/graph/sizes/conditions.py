"""Conditions on sizes, and the sizes for which they hold."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch

from jaxensemble.network.network import Sizes
from torch_bridge.graph.sizes.values import value_of

SIZES = (*range(2, 40), 97, 1000, 12345)
"""Sizes for which conditions are tried. The exporter assumes at least 2."""


FEW = (2, 3, 10, 7, 31, 1000)
"""Sizes for which conditions on several sizes are tried."""


MOST = 2**24
"""The largest size for which conditions are tried."""


def turning_points(guard: Any, symbol: Any) -> set[int]:
    """Returns values at which a condition on one symbol may change: by its numbers, and where its two sides meet."""
    numbers = {abs(int(number)) for number in guard.atoms(sympy.Integer)}
    found = numbers | {a * b for a, b in itertools.combinations_with_replacement(numbers, 2)}
    if not isinstance(guard, sympy.Eq | sympy.Ne):
        return found
    sides: Any = guard.args
    difference, (low, high) = sides[0] - sides[1], (1, MOST)
    with contextlib.suppress(ZeroDivisionError):
        before = value_of(difference, {symbol: 2}) < 0
        while high - low > 1:
            middle = (low + high) // 2
            is_before = (value_of(difference, {symbol: middle}) < 0) == before
            low, high = (middle, high) if is_before else (low, middle)
    return found | {high}


def sizes_to_try(sizes: Sizes, tried: Sequence[int], critical: set[int]) -> list[int]:
    """Returns some sizes within limits, including the ends."""
    k, most = sizes.multiple, sizes.most
    least = -(-max(sizes.least, 2) // k) * k
    ends = [least, least + k] if most is None else [least, most // k * k]
    return sorted(
        {size for size in (*(k * size for size in tried), *ends, *critical) if size >= least and size in sizes}
    )


def find_end(hold: Callable[[int], bool], start: int, step: int) -> int | None:
    """Returns the last size, by steps from `start`, for which `hold` is true; None if there is no end."""
    inside, outside = 0, MOST // step if step > 0 else (start - 2) // -step
    if hold(start + outside * step):
        return None if step > 0 else start + outside * step
    while outside - inside > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if hold(start + middle * step) else (inside, middle)
    return start + inside * step


def is_true(guard: Any, sizes: Mapping[Any, int]) -> bool:
    """Returns whether a condition is true for sizes by symbol."""
    try:
        return value_of(guard, sizes)
    except ZeroDivisionError:  # for example, `batch % (batch // 2)` for a batch of one
        return False


def _is_true_for_all(guard: Any, sizes: Iterable[int]) -> bool:
    """Returns whether a condition on one size is true for all specified sizes."""
    symbols = list(guard.free_symbols)
    return len(symbols) == 1 and all(is_true(guard, {symbols[0]: size}) for size in sizes)


def has_only_multiples(guards: Sequence[Any], factor: int) -> bool:
    """Returns whether all conditions hold for the multiples of a number only."""
    if not all(_is_true_for_all(guard, [factor * size for size in SIZES]) for guard in guards):
        return False
    others = (size for size in SIZES if size % factor)
    return not any(all(_is_true_for_all(guard, [size]) for guard in guards) for size in others)


def round_limits(sizes: Sizes, factor: int) -> Sizes:
    """Returns the limits of the multiples of a factor within limits."""
    multiple = math.lcm(sizes.multiple, factor)
    return Sizes(-(-sizes.least // multiple) * multiple, sizes.most, multiple)


def value_for_one(condition: torch.SymBool, otherwise: bool) -> bool:
    """Returns the value of a condition for a batch of one; `otherwise` if it has no single symbol."""
    expression = condition.node.expr
    symbols = getattr(expression, "free_symbols", ())
    value = expression.subs(dict.fromkeys(symbols, 1)) if len(symbols) == 1 else None
    return bool(value) if value in (True, False) else otherwise
