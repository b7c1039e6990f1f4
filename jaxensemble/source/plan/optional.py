"""Modules of one class, some of which lack a child (the downsampling of a residual block) or a last addition.

They share a class if the child is called once, on one value: modules without the child use this value unchanged.
Modules that add their argument to their last result share a class with modules that do not add it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxensemble.source.plan.definitions import Recipe
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
    """Steps of a body without some children, and for each number its origin in the full body."""

    steps: tuple[Step, ...]
    slots: list[int]
    holes: list[int]
    locals: list[int]


def missing_children(full: Recipe, part: Recipe) -> set[str] | None:
    """Returns the children that the larger of two classes has in addition; None if the classes differ otherwise."""
    if full.kind != "dict" or part.kind != "dict":
        return None
    items = dict(zip(full.keys, full.items, strict=True))
    same = all(items.get(key) == item for key, item in zip(part.keys, part.items, strict=True))
    return set(full.keys) - set(part.keys) if same else None


def remove_children(steps: Sequence[Step], children: set[str]) -> ShortenedSteps | None:
    """Returns the steps without the calls of `children`; None if such a call has not one input and one output."""
    result = ShortenedSteps((), [], [], [])
    moved: dict[Local, Operand] = {}
    count = 0
    seen: list[str] = []

    def renumber(operand: Any) -> Any:
        match operand:
            case Local():
                return renumber_slot(moved[operand])
            case Slot():
                return renumber_slot(operand)
            case Hole(number):
                result.holes.append(number)
                return Hole(len(result.holes) - 1)
            case Length(of, axis):
                return Length(renumber(of), axis)
            case Many(is_tuple, items):
                return Many(is_tuple, tuple(map(renumber, items)))
            case Cut(start, stop, step):
                return Cut(renumber(start), renumber(stop), renumber(step))
        return operand

    def renumber_slot(operand: Operand) -> Operand:
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
            args = tuple(map(renumber, step.args))
            kwargs = tuple((key, renumber(value)) for key, value in step.kwargs)
            for out in outs:
                moved[out] = Local(len(result.locals))
                result.locals.append(out.index)
            result.steps += (Step(step.target, args, kwargs, step.outs),)
    return result if sorted(seen) == sorted(children) else None


def has_residual(full: Body, short: Body) -> bool:
    """Returns whether `full` is `short` and a last step that adds the first argument to the result."""
    *steps, last = full.steps or (None,)
    if last is None or not steps or tuple(steps) != short.steps or last.target != ToName("+") or last.kwargs:
        return False
    before = Local(len(full.names) - 2)
    given = [arg for arg in last.args if isinstance(arg, Slot)]
    return before in last.args and len(given) == 1 and bool(short.slots) and full.slots[given[0].index] == full.slots[0]


def add_residual(body: Body, full: Body) -> Body:
    """Returns a body without the last addition of `full` in the form of `full`; its result is the addition's."""
    return Body(
        full.steps,
        [*body.slots, body.slots[0]],
        body.constants,
        full.hints,
        [*body.names[:-1], "", body.names[-1]],
    )


def lengthen_body(body: Body, full: Body, children: set[str]) -> Body | None:
    """Returns a body that lacks calls of `children` in the form of `full`; None if the steps differ otherwise."""
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
