"""Modules of one class, some of which have what others lack: a child, as a residual block its downsampling, or a sum.

They share a class where the child is called once, on one value: those without it use that value as it is. So do those
that add what they were given to what came out in the end, and those that do not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxensemble.source.plan.definitions import Make
from jaxensemble.source.read.steps import (
    Body,
    Cut,
    Hole,
    Length,
    Local,
    Many,
    Operand,
    Slot,
    Step,
    ToLayer,
    ToModule,
    ToName,
)


@dataclasses.dataclass
class ShortenedSteps:
    """A body's steps without some of its children, and where in the full body each number comes from."""

    steps: tuple[Step, ...]
    slots: list[int]
    holes: list[int]
    locals: list[int]


def missing_children(full: Make, part: Make) -> set[str] | None:
    """The children that the larger of two classes has beyond the smaller; None if they differ in more than that."""
    if full.kind != "dict" or part.kind != "dict":
        return None
    items = dict(zip(full.keys, full.items, strict=True))
    same = all(items.get(key) == item for key, item in zip(part.keys, part.items, strict=True))
    return set(full.keys) - set(part.keys) if same else None


def remove_children(steps: Sequence[Step], children: set[str]) -> ShortenedSteps | None:
    """The steps without the calls of `children`; None where such a call is more than one value in, one out."""
    result = ShortenedSteps((), [], [], [])
    moved: dict[Local, Operand] = {}
    count = 0
    seen: list[str] = []

    def renumbered(operand: Any) -> Any:
        match operand:
            case Local():
                return renumbered_slot(moved[operand])
            case Slot():
                return renumbered_slot(operand)
            case Hole(number):
                result.holes.append(number)
                return Hole(len(result.holes) - 1)
            case Length(of, axis):
                return Length(renumbered(of), axis)
            case Many(is_tuple, items):
                return Many(is_tuple, tuple(map(renumbered, items)))
            case Cut(start, stop, step):
                return Cut(renumbered(start), renumbered(stop), renumbered(step))
        return operand

    def renumbered_slot(operand: Operand) -> Operand:
        if not isinstance(operand, Slot):
            return operand
        result.slots.append(operand.index)
        return Slot(len(result.slots) - 1)

    for step in steps:
        outs = [Local(count + k) for k in range(step.outs)]
        count += step.outs
        path = step.target.path if isinstance(step.target, ToLayer | ToModule) else ()
        if children.intersection(path[:1]):
            argument = step.args[0] if len(step.args) == 1 else None
            if len(path) > 1 or step.kwargs or step.outs != 1 or not isinstance(argument, Local | Slot):
                return None
            seen += path[:1]
            moved[outs[0]] = moved[argument] if isinstance(argument, Local) else argument
        else:
            args = tuple(map(renumbered, step.args))
            kwargs = tuple((key, renumbered(value)) for key, value in step.kwargs)
            for out in outs:
                moved[out] = Local(len(result.locals))
                result.locals.append(out.index)
            result.steps += (Step(step.target, args, kwargs, step.outs),)
    return result if sorted(seen) == sorted(children) else None


def has_residual(full: Body, short: Body) -> bool:
    """Whether one body is another, and then adds the value that it was given to the last result."""
    *steps, last = full.steps or (None,)
    if last is None or not steps or tuple(steps) != short.steps or last.target != ToName("+") or last.kwargs:
        return False
    before = Local(len(full.names) - 2)
    given = [arg for arg in last.args if isinstance(arg, Slot)]
    return before in last.args and len(given) == 1 and bool(short.slots) and full.slots[given[0].index] == full.slots[0]


def add_residual(body: Body, full: Body) -> Body:
    """A body without the last addition of `full`, written as one with it; its result is that of the addition."""
    return Body(
        full.steps,
        [*body.slots, body.slots[0]],
        body.constants,
        full.hints,
        [*body.names[:-1], "", body.names[-1]],
    )


def lengthen_body(body: Body, full: Body, children: set[str]) -> Body | None:
    """A body that lacks calls of `children`, written as one with the steps of `full`; None where it is not that."""
    short = remove_children(full.steps, children)
    if short is None or short.steps != body.steps:
        return None
    slots: dict[int, str] = {}
    for index, value in zip(short.slots, body.slots, strict=True):
        if slots.setdefault(index, value) != value:
            return None
    if set(slots) != set(range(len(full.slots))) or len(short.holes) != len(full.constants):
        return None
    names = [""] * len(full.names)
    for index, value in zip(short.locals, body.names, strict=True):
        names[index] = value
    constants = dict(zip(short.holes, body.constants, strict=True))
    return Body(
        full.steps,
        [slots[k] for k in range(len(full.slots))],
        [constants[k] for k in range(len(full.constants))],
        full.hints,
        names,
    )
