"""The range of 64-bit integers in a forward, which may exceed the 32-bit integers that JAX has while x64 is off."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from torch_bridge.graph.nodes import source_line

Bounds = tuple[float, float]

_LIMITS: Bounds = (-(2.0**31), 2.0**31 - 1)
"""The assumed range of inputs and of everything unknown. Inputs beyond it are refused when they arrive."""


_BY_PLACE = {"slice", "slice_scatter", "select", "select_scatter", "narrow"}
"""Operations whose numbers are positions, not values: the end of `x[:, 1:]` is the largest integer there is."""


def wide_products(graph: fx.Graph, constants: dict[str, Tensor]) -> list[str]:
    """Finds the operations on int64 tensors whose results may not fit into int32.

    Products, powers, shifts and sums are followed, from the range of the inputs. A small constant in a sum is not
    counted: otherwise every offset of an index would be.

    **Returns:** the names of the operations, with their source lines.
    """
    bounds: dict[fx.Node, Bounds] = {}
    found = []
    for node in graph.nodes:
        val = node.meta.get("val")
        if not isinstance(val, Tensor) or val.dtype.is_floating_point or val.dtype.is_complex:
            continue
        low, high = _bounds(node, val, bounds, constants)
        if val.dtype == torch.int64 and (low < _LIMITS[0] or high > _LIMITS[1]):
            where = source_line(node)
            found.append(f"{node.target}" + (f" ({where})" if where else ""))
            low, high = _LIMITS  # reported once, where it begins
        bounds[node] = (low, high)
    return list(dict.fromkeys(found))


def _bounds(node: fx.Node, val: Tensor, known: dict[fx.Node, Bounds], constants: dict[str, Tensor]) -> Bounds:
    """The least and the greatest value that a node may have."""
    if val.dtype != torch.int64:
        return (0, 1) if val.dtype == torch.bool else (torch.iinfo(val.dtype).min, torch.iinfo(val.dtype).max)
    if node.name in constants:
        return (float(constants[node.name].min()), float(constants[node.name].max())) if val.numel() else (0, 0)
    operands = list(_operands(node, known))
    rule = _RULES.get(_name(node)) if node.op == "call_function" else None
    if rule is not None and operands:
        return rule(operands, node)
    return (min(low for low, _ in operands), max(high for _, high in operands)) if operands else _LIMITS


def _operands(node: fx.Node, known: dict[fx.Node, Bounds]) -> Iterator[Bounds]:
    """The bounds of a node's operands."""
    numbers_are_places = _name(node) in _BY_PLACE
    for arg in node.args:
        if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor):
            yield known.get(arg, _LIMITS)
        elif isinstance(arg, int) and not isinstance(arg, bool) and not numbers_are_places:
            yield arg, arg


def _name(node: fx.Node) -> str:
    """The operation's name without its overload: `mul` of `aten.mul.Tensor`."""
    return [*str(node.target).split("."), ""][1]


def _product(operands: list[Bounds], node: fx.Node) -> Bounds:
    low, high = operands[0]
    for other in operands[1:2]:
        ends = [a * b for a in (low, high) for b in other]
        low, high = min(ends), max(ends)
    return low, high


def _sum(operands: list[Bounds], node: fx.Node) -> Bounds:
    small = [(a, b) for a, b in operands[:2] if max(abs(a), abs(b)) >= 2**20] or operands[:2]
    if len(small) == 1:
        return small[0]
    signs = (1, -1) if str(node.target).startswith("aten.sub") else (1, 1)
    ends = [sorted((sign * a, sign * b)) for sign, (a, b) in zip(signs, small, strict=True)]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


def _power(operands: list[Bounds], node: fx.Node) -> Bounds:
    base = max(abs(end) for end in operands[0])
    exponent = max((abs(end) for bounds in operands[1:2] for end in bounds), default=1)
    size = math.inf if base > 1 and exponent > 64 else base**exponent
    return -size, size


def _shift(operands: list[Bounds], node: fx.Node) -> Bounds:
    return _product([operands[0], (0, 2.0 ** min(operands[1][1], 64))] if len(operands) > 1 else operands, node)


def _running_sum(operands: list[Bounds], node: fx.Node) -> Bounds:
    source: Any = node.args[0]
    count = math.prod(size if isinstance(size, int) else 1 for size in source.meta["val"].shape)
    largest = max(abs(end) for end in operands[0])
    return (-largest * count, largest * count) if largest < 2**20 else operands[0]


def _remainder(operands: list[Bounds], node: fx.Node) -> Bounds:
    size = max(abs(end) for end in operands[-1])
    return (-size, size)


_RULES: dict[str, Callable[[list[Bounds], fx.Node], Bounds]] = {
    "mul": _product,
    "multiply": _product,
    "add": _sum,
    "sub": _sum,
    "pow": _power,
    "square": lambda operands, node: _product([operands[0], operands[0]], node),
    "__lshift__": _shift,
    "bitwise_left_shift": _shift,
    "prod": lambda operands, node: (-math.inf, math.inf),
    "cumprod": lambda operands, node: (-math.inf, math.inf),
    "sum": _running_sum,
    "cumsum": _running_sum,
    "remainder": _remainder,
    "fmod": _remainder,
    "argmax": lambda operands, node: (0, _LIMITS[1]),
    "argmin": lambda operands, node: (0, _LIMITS[1]),
}
