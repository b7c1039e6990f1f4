"""Modules with their calls, and their groups that can share a class."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence

from jaxensemble.source.plan.definitions import IDENTITY, MISSING, RESIDUAL, ConstantValue, Place, Unit
from jaxensemble.source.plan.optional import add_residual, has_residual, lengthen_body, missing_children
from jaxensemble.source.plan.segments import Flow, align_bodies, child_names, merge_spans
from jaxensemble.source.read.frames import Frame
from jaxensemble.source.read.modules import Module
from jaxensemble.source.read.steps import Body, Local, Slot, Step, ToFunction, ToLayer, ToModule, ToName, leaves


@dataclasses.dataclass
class Candidate:
    """Module, its calls, and their equal bodies; there are no calls if the module cannot have a method of its own."""

    module: Module
    frames: list[Frame]
    bodies: list[Body]


Members = list[tuple[Candidate, Unit]]
Results = Callable[[Members], Collection[int]]
"""Function that returns the values used after any call of some modules with equal steps."""


def join_by_optional_parts(groups: Sequence[Members], results: Results) -> list[Members]:
    """Joins groups of modules with equal steps that differ only by children or steps that some modules lack."""
    joined: list[Members] = []
    for group in sorted(groups, key=_size, reverse=True):
        for larger in joined:
            found = [_extend_member(larger[0], member) for member in group]
            found = found if all(found) else [_align_member(larger[0], member, results(larger)) for member in group]
            members = [member for member in found if member]
            if len(members) == len(group) and _can_share_class([*larger, *members], results):
                larger += members
                break
        else:
            joined.append(list(group))
    order = {id(found): k for k, (found, _) in enumerate(member for group in groups for member in group)}
    ordered = sorted(joined, key=lambda members: order.get(id(members[0][0]), 0))
    return [_merge_member_spans(members, results) for members in ordered]


def _merge_member_spans(members: Members, results: Results) -> Members:
    """Returns the modules of a class with skipped spans that are as long as possible."""
    if not any(unit.skipped for _, unit in members):
        return members
    full = members[0][0]
    spans = merge_spans(Flow(full.bodies[0], results(members)), [unit.skipped for _, unit in members])
    return [(found, dataclasses.replace(unit, skipped=own)) for (found, unit), own in zip(members, spans, strict=True)]


def join_by_last_functions(groups: Sequence[Members]) -> list[Members]:
    """Joins groups of chains of equal layers if some end in functions that others lack, for example an activation."""
    joined: dict[int, Members] = {}
    longest: dict[object, tuple[int, Unit]] = {}
    for k in sorted(range(len(groups)), key=lambda k: -len(groups[k][0][1].recipe.keys)):
        found, unit = groups[k][0]
        recipe = unit.recipe
        last = max((n for n, item in enumerate(recipe.items, 1) if item.kind != "function"), default=0)
        core = (found.module.class_name, recipe.keys[:last], recipe.items[:last])
        first, full = longest.setdefault(core if recipe.kind == "chain" else k, (k, unit))
        if full.recipe.keys[: len(recipe.keys)] != recipe.keys:
            first, full = k, unit
        joined.setdefault(first, []).extend((one, _lengthen_chain(own, full)) for one, own in groups[k])
    return [joined[k] for k in sorted(joined)]


def _lengthen_chain(unit: Unit, full: Unit) -> Unit:
    """Returns a chain with functions that do nothing at its end, so that it is made like a longer chain."""
    added = {(key, "function"): IDENTITY for key in full.recipe.keys[len(unit.recipe.keys) :]}
    return dataclasses.replace(unit, recipe=full.recipe, constants=unit.constants | added)


def _size(members: Members) -> tuple[int, int]:
    found, unit = members[0]
    return len(unit.recipe.keys), len(found.bodies[0].steps) if found.bodies else 0


def _extend_member(larger: tuple[Candidate, Unit], member: tuple[Candidate, Unit]) -> tuple[Candidate, Unit] | None:
    """Returns a module and its calls as a member of a class with more children; None if this is impossible."""
    (full, full_unit), (found, unit) = larger, member
    if full.module.class_name != found.module.class_name or not full.bodies or not found.bodies:
        return None
    missing = missing_children(full_unit.recipe, unit.recipe)
    if missing == set() and not full_unit.absent and all(has_residual(full.bodies[0], own) for own in found.bodies):
        extended = [add_residual(body, full.bodies[0]) for body in found.bodies]
        return Candidate(found.module, found.frames, extended), dataclasses.replace(unit, absent={RESIDUAL})
    if not missing:
        return None
    bodies = [lengthen_body(body, full.bodies[0], missing) for body in found.bodies]
    if not all(bodies):
        return None
    made = dataclasses.replace(unit, recipe=full_unit.recipe, absent=missing)
    return Candidate(found.module, found.frames, [body for body in bodies if body]), made


def _align_member(
    larger: tuple[Candidate, Unit], member: tuple[Candidate, Unit], used: Collection[int]
) -> tuple[Candidate, Unit] | None:
    """Returns a module and its calls as a member of a class with more steps; None if this is impossible."""
    (full, full_unit), (found, unit) = larger, member
    if full.module.class_name != found.module.class_name or not full.bodies or not found.bodies:
        return None
    missing = missing_children(full_unit.recipe, unit.recipe)
    if missing is None:
        return None
    bodies = [align_bodies(body, full.bodies[0], used) for body in found.bodies]
    spans = {body.spans if body else None for body in bodies}
    if None in spans or len(spans) > 1:
        return None
    made = dataclasses.replace(unit, recipe=full_unit.recipe, absent=missing, skipped=spans.pop())
    return Candidate(found.module, found.frames, [body.body for body in bodies if body]), made


def _can_share_class(members: Members, results: Results) -> bool:
    """Returns whether some modules with equal steps can share a class.

    The skipped spans must not overlap, and must contain no child that another module lacks alone. Slots that are one
    value in one call must be one value in all calls. No result of a module may be lost by a span, or be missing in
    another module. A last addition that may be left out must be the only result.
    """
    bodies, used = members[0][0].bodies, results(members)
    if any(RESIDUAL in unit.absent for _, unit in members) and set(used) != {len(bodies[0].names) - 1}:
        return False
    if not all(body.names[k] for found, _ in members for body in found.bodies for k in used):
        return False
    spans = {span for _, unit in members for span in unit.skipped}
    if not spans:
        return True
    flow = Flow(bodies[0], used)
    if any(flow.carried_value(span) is None for span in spans):
        return False
    if len({tuple(map(body.slots.index, body.slots)) for found, _ in members for body in found.bodies}) > 1:
        return False
    ordered, steps = sorted(spans), bodies[0].steps
    if any(before[1] > after[0] for before, after in itertools.pairwise(ordered)):
        return False
    held = {span: child_names(steps[slice(*span)]) for span in spans}
    held |= {span: names | {RESIDUAL} for span, names in held.items() if span[1] == len(steps)}
    optional = {name for _, unit in members for name in unit.absent.difference(*(held[s] for s in unit.skipped))}
    return optional.isdisjoint(name for names in held.values() for name in names)


def chain_children(module: Module, body: Body, results: Sequence[int] | None = None) -> set[str] | None:
    """Returns the children that the body of a numbered module calls one after the other.

    None if the body does anything else, leaves out a child with content, or has results other than the last one.
    """
    names = children_in_turn(body)
    numbers = list(map(int, names))
    held = {name for name, child in module.children.items() if child.has_content}
    if not names or numbers != sorted(set(numbers)) or not held <= set(names):
        return None
    return set(names) if results is None or list(results) == [len(names) - 1] else None


def children_in_turn(body: Body) -> list[str]:
    """Returns the children that a body calls one after the other; none if the body does anything else."""
    names: list[str] = []
    for k, step in enumerate(body.steps):
        one_path = isinstance(step.target, ToLayer | ToModule | ToFunction) and len(step.target.path) == 1
        if not one_path or step.outs != 1 or step.kwargs or step.args != ((Local(k - 1) if k else Slot(0)),):
            return []
        names.append(step.target.path[0])  # type: ignore[union-attr]
    return names


def chain_run(module: Module, body: Body, returned_uses: Sequence[Local | Slot]) -> tuple[int, int] | None:
    """Returns the start and the end of a run of calls of all children, one after the other, in a module's body.

    None if there is no run: a child is called elsewhere, or its result is used by a step that is not the next one.
    """
    calls = [k for k, step in enumerate(body.steps) if not isinstance(step.target, ToName)]
    if not calls or any(step.outs != 1 for step in body.steps):
        return None
    start, end = calls[0], calls[-1] + 1
    first = body.steps[start].args
    if len(first) != 1 or not isinstance(first[0], Local | Slot):
        return None
    used_later = {leaf for step in body.steps[end:] for leaf in leaves(step)} | set(returned_uses)
    if used_later & {Local(k) for k in range(start, end - 1)}:
        return None
    run = (start, end)
    return run if chain_children(module, Body(chain_steps(body, run))) else None


def chain_steps(body: Body, run: tuple[int, int]) -> tuple[Step, ...]:
    """Returns the steps of a run, counted from its start; the first step takes the value from outside."""
    steps = []
    for step in body.steps[slice(*run)]:
        args = tuple(Local(arg.index - run[0]) if isinstance(arg, Local) else arg for arg in step.args)
        steps.append(dataclasses.replace(step, args=args if steps else (Slot(0),)))
    return tuple(steps)


def function_label(module: Module, body: Body) -> str:
    """Returns the name of the function that replaces a module: the function called within, or the module's class."""
    names = [step.target.name for step in body.steps if isinstance(step.target, ToName)]
    if module.is_filler and names == [".reshape"]:
        return "flatten" if body.constants == [-1] else "reshape"
    return names[0].rpartition(".")[2] if len(names) == 1 and "." in names[0][1:] else module.class_name


def hole_constants(body: Body) -> dict[Place, ConstantValue]:
    """Returns the constants of a body by place."""
    return {("", str(k)): constant for k, constant in enumerate(body.constants) if constant is not MISSING}
