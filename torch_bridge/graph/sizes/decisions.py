"""Decisions of a forward by open sizes, of which `torch.export` sees one value."""

import contextlib
import dataclasses
import functools
import linecache
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
from torch import nn

from jaxensemble.network.network import Sizes
from torch_bridge.compat import pytree, watch_guards
from torch_bridge.graph.sizes.conditions import (
    FEW,
    MOST,
    SIZES,
    find_end,
    has_only_multiples,
    is_true,
    round_limits,
    sizes_to_try,
    turning_points,
    value_for_one,
)
from torch_bridge.graph.sizes.open_axes import BATCH, Example, Limits
from torch_bridge.graph.sizes.values import value_of
from torch_bridge.graph.user_lines import is_user_file


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The lines of a forward that decide by an open size, in order.

    - `names`: the open sizes, by the exporter's symbols; `units`: the factor from a symbol's value to the size.
    - `fixing`: conditions that bound or fix the size of the batch, each after the line of the forward behind it.
    - `own`: lines among them that compare sizes themselves, without an assertion.
    - `of_one`: lines that decide differently for a batch of one.
    - `named`: like `fixing`, for the other sizes, which may be bounded.
    - `known`: whether conditions are true for sizes, as far as they have been tried.
    """

    names: dict[Any, str] = dataclasses.field(default_factory=dict)
    units: dict[Any, Any] = dataclasses.field(default_factory=dict)
    fixing: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    own: list[str] = dataclasses.field(default_factory=list)
    of_one: list[str] = dataclasses.field(default_factory=list)
    named: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    known: dict[Any, bool] = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> str:
        """The last line that fixed the size of the batch; empty if none did."""
        return next((place for place, _ in reversed(self.fixing) if place), "")

    def learn(self, size: Any, name: str, times: int = 1) -> None:
        """Records an expression that equals an open size divided by `times`."""
        symbols = size.free_symbols
        if len(symbols) == 1:
            (symbol,) = symbols
            self.names[symbol], self.units[symbol] = name, int(size.coeff(symbol)) * times

    def of(self, guard: Any) -> set[str]:
        """Returns the names of the open sizes in a condition, except the batch's."""
        known = [symbol for symbol in guard.free_symbols if symbol in self.names]
        if len(known) == 1 and len(guard.free_symbols) == 2 and isinstance(guard, sympy.Eq) and guard.lhs == known[0]:
            self.learn(guard.rhs, self.names[known[0]], self.units[known[0]])  # for example, `height == 2 * _height`
        return {self.names[symbol] for symbol in known} - {BATCH}

    def limits(self, example: Example) -> Limits:
        """Returns limits of sizes within which all conditions hold that were found for an example.

        **Raises:** `FixedSize` if there are no such limits.
        """
        if not self.fixing:
            return self.named_limits(example)
        factor = None if BATCH in example.limits else self._find_factor(example.sizes.get(BATCH, 1))
        if factor is None:
            raise FixedSize(BATCH, self.last)
        return self.named_limits(example._replace(limits={**example.limits, BATCH: Sizes(multiple=factor)}))

    def named_limits(self, example: Example) -> dict[str, Sizes]:
        """Returns the limits for conditions on sizes other than the batch's."""
        found = dict(example.limits)
        about = [(self.of(guard), place, guard) for place, guard in self.named]
        for name, given in example.sizes.items():
            guards = [(place, guard) for names, place, guard in about if names == {name} and not self._has_batch(guard)]
            if not guards:
                continue
            sizes = self._narrow([guard for _, guard in guards], name, found.get(name, Sizes()), given)
            if sizes is None or sizes.least == sizes.most:
                raise FixedSize(name, next((place for place, _ in reversed(guards) if place), ""))
            found[name] = sizes
        for names, place, guard in about:
            if len(names) > 1 or self._has_batch(guard):
                found = self._limit_together(guard, names, place, found, example.sizes)
        return found

    def _limit_together(
        self, guard: Any, names: set[str], place: str, limits: dict[str, Sizes], given: Mapping[str, int]
    ) -> dict[str, Sizes]:
        """Returns limits within which a condition on several sizes holds, perhaps for multiples of a small number only.

        For example, a forward may pad images to even sizes: images of even sizes stay as they are.
        """
        for factor in range(1, 33):
            found = limits | {name: round_limits(limits.get(name, Sizes()), factor) for name in names}
            if all(given[name] in found[name] for name in names) and self.holds(guard, found):
                return found
        raise FixedSize(" and ".join(sorted(names)), place)

    def _has_batch(self, guard: Any) -> bool:
        return any(self.names.get(symbol, BATCH) == BATCH for symbol in guard.free_symbols)

    def holds(self, guard: Any, limits: Limits) -> bool:
        """Returns whether a condition is true for all sizes within limits."""
        names = list(dict.fromkeys(self.names.get(symbol, BATCH) for symbol in guard.free_symbols))
        few = {1: SIZES, 2: FEW}.get(len(names), FEW[:3])

        def hold(sizes: Mapping[str, int]) -> bool:
            if len(sizes) == len(names):
                return self._is_true(guard, sizes)
            name = names[len(sizes)]
            tried = sizes_to_try(limits.get(name, Sizes()), few, self._critical(guard, sizes))
            return all(hold({**sizes, name: size}) for size in tried)

        return bool(names) and hold({})

    def value(self, expression: Any, sizes: Mapping[str, int]) -> int | float:
        """Returns the value of an expression in open sizes."""
        return value_of(expression, self._values(expression, sizes))

    def _is_true(self, guard: Any, sizes: Mapping[str, int]) -> bool:
        values = self._values(guard, sizes)
        key = guard, frozenset(values.items())
        if key not in self.known:
            self.known[key] = is_true(guard, values)
        return self.known[key]

    def _values(self, guard: Any, sizes: Mapping[str, int]) -> dict[Any, int]:
        """Returns the values of a condition's symbols, as far as their sizes are given."""
        names = {symbol: self.names.get(symbol, BATCH) for symbol in guard.free_symbols}
        return {symbol: sizes[name] // self.units.get(symbol, 1) for symbol, name in names.items() if name in sizes}

    def _critical(self, guard: Any, sizes: Mapping[str, int]) -> set[int]:
        """Returns sizes at which a condition may change.

        In a condition on several sizes, `sizes` are the known ones. There, only equalities in the last size matter.
        """
        known = self._values(guard, sizes)
        if len(guard.free_symbols) > 1:
            if not isinstance(guard, sympy.Eq | sympy.Ne) or len(known) + 1 < len(guard.free_symbols):
                return set()
            with contextlib.suppress(ZeroDivisionError):
                guard = guard.subs(known)
        if len(guard.free_symbols) != 1:
            return set()
        (symbol,) = guard.free_symbols
        unit = self.units.get(symbol, 1)
        around = (unit * (size + step) for size in turning_points(guard, symbol) for step in (-1, 0, 1))
        return {int(size) for size in around if 2 <= size <= MOST}

    def _narrow(self, guards: Sequence[Any], name: str, before: Sizes, given: int) -> Sizes | None:
        """Returns the sizes for which all conditions on one size hold, or as many of them as `Sizes` can express."""

        @functools.cache
        def hold(size: int) -> bool:
            return size in before and all(self._is_true(guard, {name: size}) for guard in guards)

        unit = before.multiple
        critical = set[int]().union(*(self._critical(guard, {}) for guard in guards))
        candidates: dict[int, Sizes] = {}
        for factor in (k for k in range(unit, given + 1, unit) if given % k == 0):
            least, most = find_end(hold, given, -factor), find_end(hold, given, factor)
            found = Sizes(factor if least is None or least < 2 * factor or least <= 2 else least, most, factor)
            ends = (size + sign * unit for size in (found.least, most or unit) for sign in (-1, 1))
            tried = (*(unit * size for size in (*SIZES, *range(40, 130))), *ends, *critical)
            tried = sorted({size for size in tried if size >= max(2, found.least)})
            if all(hold(size) == (size in found) for size in tried):
                return found
            wrong = [size for size in tried if size in found and not hold(size)]
            if wrong and wrong[-1] < given:
                found = dataclasses.replace(found, least=wrong[-1] + factor)
            elif wrong and wrong[0] > given:
                found = dataclasses.replace(found, most=wrong[0] - factor)
            if not wrong or not wrong[0] < given < wrong[-1]:
                candidates.setdefault(sum(size in found for size in tried), found)
        return candidates[max(candidates)] if candidates else None

    def _find_factor(self, size: int) -> int | None:
        """Returns the number for whose multiples all conditions on the batch hold, or None if there is none."""
        if self.own:
            return None
        guards = [guard for _, guard in self.fixing]
        return next((k for k in range(2, size + 1) if size % k == 0 and has_only_multiples(guards, k)), None)


class FixedSize(Exception):
    """A size that a forward fixes: its name, and the line."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__(name, place)
        self.name, self.place = name, place


@contextlib.contextmanager
def watch_decisions(model: nn.Module, example: Example) -> Iterator[Decisions]:
    """Yields the decisions by open sizes that a model's forward makes while `torch.export` runs it.

    A condition that is true for all sizes is no decision, although the exporter may take it for one.
    """
    found = Decisions()
    evaluated = torch.SymBool.__bool__

    def decide(guard: Any) -> None:
        if found.of(guard):
            if all(other != guard for _, other in found.named):
                found.named.append((_users_line(sys._getframe(2)), guard))
        elif not found.holds(guard, {}):
            found.fixing.append((_users_line(sys._getframe(2)), guard))

    def evaluate(condition: torch.SymBool) -> bool:
        caller, fixed = sys._getframe(1), len(found.fixing)
        result = evaluated(condition)
        if is_user_file(caller.f_code.co_filename):
            if len(found.fixing) > fixed and not _describe_frame(caller).partition(": ")[2].startswith("assert "):
                found.own.append(_describe_frame(caller))
            if result != value_for_one(condition, result) and not found.of(condition.node.expr):
                found.of_one.append(_describe_frame(caller))
        return result

    def name(module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor, axes in zip(pytree.tree_leaves((args, kwargs)), example.axes, strict=True):
            for axis, size in (axes or {}).items():
                if isinstance(tensor.shape[axis], torch.SymInt):
                    found.learn(tensor.shape[axis].node.expr, size)

    hook = model.register_forward_pre_hook(name, with_kwargs=True) if example.named else None
    torch.SymBool.__bool__ = evaluate  # type: ignore[method-assign]
    try:
        with watch_guards(decide, lambda guard: found.holds(guard, example.limits if found.of(guard) else {})):
            yield found
    finally:
        torch.SymBool.__bool__ = evaluated  # type: ignore[method-assign]
        if hook is not None:
            hook.remove()


def _users_line(frame: FrameType | None) -> str:
    """Returns the innermost line of the forward around a frame of PyTorch; empty if there is none."""
    while frame is not None and frame.f_globals.get("__name__") != "torch_bridge.graph.export":
        if is_user_file(frame.f_code.co_filename):
            return _describe_frame(frame)
        frame = frame.f_back
    return ""


def _describe_frame(frame: FrameType) -> str:
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"
