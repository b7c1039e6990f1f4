"""Loops over a list, or over children with numbered names, for steps that repeat from child to child."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from jaxensemble.source.read.steps import Cut, Hole, Length, Local, Many, Slot, Step, ToLayer, ToModule, leaves

FEWEST_CHILDREN = 4
"""The fewest children with numbered names that make a loop. For lists, two items are enough."""

LONGEST_ROUND = 3
"""The most steps of one round of a loop."""

CARRIED = Local(-1)
"""The value that goes from round to round, within the steps of the first round."""

_NUMBERED = re.compile(r"([A-Za-z_](?:[\w-]*[A-Za-z_-])?)(0|[1-9]\d{0,3})", re.ASCII)


def split_number(name: str) -> tuple[str, int] | None:
    """Returns the stem and the number of a child's name, or None.

    >>> split_number("encoder_layer_11"), split_number("conv"), split_number("0")
    (('encoder_layer_', 11), None, None)
    """
    found = _NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else None


@dataclasses.dataclass(frozen=True)
class Loop:
    """Loop of `count` rounds, each with the next child at `path`: the next item of a list, or `stem` and a number.

    `given` is the value that goes into the first round, `first` the path of the child in this round.
    """

    path: tuple[str, ...]
    stem: str | None
    start: int
    count: int
    given: Hashable
    first: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Equal consecutive rounds: the steps and the results of the first round, and the result of the last round."""

    loop: Loop
    steps: tuple[Step, ...]
    outs: tuple[Local, ...]
    last: Local
    size: int


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Step and its one result."""

    step: Step
    out: Local


def find_rounds(
    stated: Sequence[StepResult],
    value: Callable[[Local | Slot], Hashable],
    constant: Callable[[int], object],
    counts: Mapping[Hashable, int],
    list_length: Callable[[Sequence[str]], int],
    run_length: Callable[[Sequence[str]], int | None],
) -> Rounds | None:
    """Finds the longest loop that begins with the first of the steps.

    **Arguments:**

    - `value`: returns the value that a use reads.
    - `constant`: returns the content of a hole.
    - `counts`: how often each value is read in all.
    - `list_length`: returns the number of items of the list at a path, 0 if there is no list.
    - `run_length`: returns how many children with numbered names, from the child at a path on, have to be called in a
      loop: 0 for no child, None for any number.
    """
    finder = _Finder(stated, value, constant, counts)
    found = [finder.find(size, list_length, run_length) for size in range(1, LONGEST_ROUND + 1)]
    return max((rounds for rounds in found if rounds), key=lambda rounds: rounds.loop.count, default=None)


class _Finder:
    def __init__(
        self,
        stated: Sequence[StepResult],
        value: Callable[[Local | Slot], Hashable],
        constant: Callable[[int], object],
        counts: Mapping[Hashable, int],
    ):
        self.stated = stated
        self.value = value
        self.constant = constant
        self.counts = counts

    def find(
        self,
        size: int,
        list_length: Callable[[Sequence[str]], int],
        run_length: Callable[[Sequence[str]], int | None],
    ) -> Rounds | None:
        first = self.stated[:size]
        children = [path for path in map(_child, first) if path]
        if len(first) < size or len(children) != 1:
            return None
        path = children[0]
        name = split_number(path[-1])
        wanted = run_length(path) if name else list_length(path[:-1]) if path[-1] == "0" else 0
        if wanted is not None and wanted < 2:
            return None
        stem, start = name if name else (None, 0)
        count = self._count(size, path[:-1], stem or "", start)
        if count < 2 or wanted not in (None, count):
            return None
        carried = self._carried_uses(first, self.stated[size : 2 * size])
        given = self._uses(first)[carried[0]]
        loop = Loop(path[:-1], stem, start, count, given, path)
        marked = _mark_carried([item.step for item in first], set(carried))
        last = self.stated[size * count - 1].out
        return Rounds(loop, marked, tuple(item.out for item in first), last, size * count)

    def _count(self, size: int, path: tuple[str, ...], stem: str, start: int) -> int:
        """Returns the number of equal consecutive rounds; at least one."""
        rounds = [self.stated[k : k + size] for k in range(0, len(self.stated), size)]
        shape = self._shape(rounds[0])
        if len(rounds) < 2 or self._shape(rounds[1]) != shape:
            return 1
        carried, uses = self._carried_uses(*rounds[:2]), self._uses(rounds[0])
        if len({uses[k] for k in carried}) != 1:
            return 1
        count = 1
        for before, now in itertools.pairwise(rounds):
            out, own = before[-1].out, self._uses(now)
            expected = [out if k in carried else use for k, use in enumerate(uses)]
            wanted = [(*path, f"{stem}{start + count}")]
            if own != expected or self._shape(now) != shape or [p for p in map(_child, now) if p] != wanted:
                break
            if self.counts[out] != len(carried):
                break
            count += 1
        return count if self._is_closed(rounds[0]) and all(map(self._is_closed, rounds[:count])) else 1

    def _is_closed(self, now: Sequence[StepResult]) -> bool:
        """Returns whether all results of a round except the last are used once, within the round."""
        uses = [self.value(use) for item in now for use in leaves(item.step)]
        return all(self.counts[item.out] == 1 and item.out in uses for item in now[:-1])

    def _carried_uses(self, first: Sequence[StepResult], second: Sequence[StepResult]) -> list[int]:
        """Returns the numbers of the uses in the second round that read the result of the first round."""
        return [k for k, use in enumerate(self._uses(second)) if use == first[-1].out]

    def _uses(self, now: Sequence[StepResult]) -> list[Hashable]:
        """Returns the values that a round reads, in order; its own values by number."""
        own = {item.out: ("own", k) for k, item in enumerate(now)}
        values = [self.value(use) for item in now for use in leaves(item.step)]
        return [own.get(value, value) if isinstance(value, Local) else value for value in values]

    def _shape(self, now: Sequence[StepResult]) -> object:
        """Returns the form of a round, independent of the values that it reads and of the child that it calls."""
        return [("child" if _child(item) else item.step.target, self._form(item.step)) for item in now]

    def _form(self, operand: Any) -> object:
        match operand:
            case Local() | Slot():
                return "use"
            case Hole(number):
                return "hole", self.constant(number)
            case Length(of, axis):
                return "length", self._form(of), axis
            case Many(is_tuple, items):
                return "many", is_tuple, self._form(items)
            case Cut(start, stop, step):
                return "cut", self._form((start, stop, step))
            case Step(_, args, kwargs, outs):
                return outs, self._form(args), [(key, self._form(item)) for key, item in kwargs]
            case tuple():
                return [self._form(item) for item in operand]
        return operand


def _child(item: StepResult) -> tuple[str, ...]:
    return item.step.target.path if isinstance(item.step.target, ToLayer | ToModule) else ()


def _mark_carried(steps: Sequence[Step], carried: set[int]) -> tuple[Step, ...]:
    """Returns the steps with `CARRIED` for the uses with these numbers."""
    count = -1

    def mark(operand: Any) -> Any:
        nonlocal count
        match operand:
            case Local() | Slot():
                count += 1
                return CARRIED if count in carried else operand
            case Length(of, axis):
                return Length(mark(of), axis)
            case Many(is_tuple, items):
                return Many(is_tuple, tuple(map(mark, items)))
            case Cut(start, stop, step):
                return Cut(mark(start), mark(stop), mark(step))
        return operand

    return tuple(
        Step(step.target, tuple(map(mark, step.args)), tuple((key, mark(arg)) for key, arg in step.kwargs), step.outs)
        for step in steps
    )
