"""Steps of a method as loops, as nested expressions and as statements.

A value that is used once is written where it is used, as long as the line stays readable. Steps change their order
only where the order makes no difference.
"""

import ast
import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

from jaxensemble.network.vocabulary import is_identifier
from jaxensemble.source.plan.definitions import RESIDUAL
from jaxensemble.source.plan.loops import CARRIED, Loop, Rounds, StepResult, find_rounds
from jaxensemble.source.read.frames import comparison_key
from jaxensemble.source.read.modules import Path
from jaxensemble.source.read.steps import (
    Cut,
    Length,
    Local,
    Many,
    Operand,
    Slot,
    Step,
    ToFunction,
    ToLayer,
    ToModule,
    ToName,
    leaves,
    returned_uses,
    variables_read,
)
from jaxensemble.source.write.expressions import Expressions, called_child, is_operator, name
from jaxensemble.source.write.layout import INDENT, flat_text

READABLE = 88
"""The most characters of a line with nested calls."""

DEEPEST = 3.5
"""The most calls that are nested in one line; an operator counts half."""

LIGHT = ("Dropout", "Norm")
"""Endings of the types of layers that are written around other calls. All other layers start a new line."""

Use = Local | Slot

Arm: TypeAlias = tuple[Path, bool]
"""The flag of a mode, by its path, and whether the step is taken in training (true) or in evaluation."""


@dataclasses.dataclass
class Entry:
    """Step and its results.

    - `loop`: the loop that the entry stands for. The step is then the last one of the first round, with `CARRIED` for
      the value that goes from round to round.
    - `is_optional`: whether the step calls a child that may be absent.
    - `is_residual`: whether the step is a last step that may be left out.
    - `segment`: the steps together with which the step is taken or left out.
    - `is_segment_end`: whether the step is the last step of its segment.
    - `is_choice`: whether the step chooses between two values by the mode.
    - `arm`: the mode in which alone the step is needed; None for both.
    """

    step: Step
    outs: tuple[Local, ...]
    loop: Loop | None = None
    is_optional: bool = False
    is_residual: bool = False
    segment: tuple[int, int] | None = None
    is_segment_end: bool = False
    is_choice: bool = False
    arm: Arm | None = None

    @property
    def is_statement(self) -> bool:
        """Returns whether the entry is a statement of several lines, not nested and without nested entries."""
        return self.is_optional or self.is_residual or self.is_choice or self.loop is not None

    @property
    def place(self) -> tuple[tuple[int, int] | None, Arm | None]:
        """Segment and arm, which together say whether the entry is taken."""
        return self.segment, self.arm


class Folding:
    """Steps of one method, ready to be written.

    `values` are the values that the slots read, by number.
    """

    def __init__(self, expressions: Expressions, steps: Sequence[Step], returns: Any, values: Sequence[Hashable]):
        self.expressions = expressions
        self.returns = returns
        self._values = values
        self.entries = _entries(steps)
        self._mark_segments()
        for entry in self.entries:
            own = called_child(entry.step)[:1] in {(child,) for child in expressions.definition.optional}
            entry.is_optional = own and entry.segment is None
            entry.is_residual = entry is self.entries[-1] and RESIDUAL in expressions.definition.optional
        self.entries = self._order_by_arms()
        self._counts = Counter(self.value(use) for use in [*self._all_uses(), *returned_uses(returns)])
        self.inside: dict[Local, Entry] = {}
        self.entries = self._find_loops()
        self.by_local = {out: entry for entry in self.entries for out in entry.outs} | self.inside
        self.folded: set[Local] = set()

    def value(self, use: Use) -> Hashable:
        """Returns the value that a use reads: uses of one value are equal."""
        return self._values[use.index] if isinstance(use, Slot) else use

    def _all_uses(self) -> list[Use]:
        return [use for entry in self.entries for use in leaves(entry.step)]

    # Steps that may be left out

    def _mark_segments(self) -> None:
        for start, end in self.expressions.definition.segments:
            for entry in self.entries[start:end]:
                entry.segment = (start, end)
            self.entries[end - 1].is_segment_end = True

    def carried_value(self, segment: tuple[int, int]) -> Hashable:
        """Returns the value that goes into a segment, and that replaces its result if the segment is left out."""
        own = [entry for entry in self.by_local.values() if entry.segment == segment]
        made = {out for entry in own for out in entry.outs}
        return next(v for entry in own for use in leaves(entry.step) if (v := self.value(use)) not in made)

    # Steps that depend on the mode

    def _order_by_arms(self) -> list[Entry]:
        """Returns the entries in order. An entry that only one mode needs is right before the choice that needs it."""
        for entry in self.entries:
            recipe = (
                self.expressions.recipe_at(entry.step.target.path) if isinstance(entry.step.target, ToLayer) else None
            )
            entry.is_choice = recipe is not None and recipe.name == "layers.Training"
            if _is_write(entry):
                entry.arm = (variables_read(entry.step.args[2])[0], True)
        if not any(entry.is_choice or _is_write(entry) for entry in self.entries):
            return self.entries
        makers = {out: entry for entry in self.entries for out in entry.outs}
        self._mark_arms(makers)
        order: list[Entry] = []
        position = {id(entry): k for k, entry in enumerate(self.entries)}
        for entry in self.entries:
            for arm, operand in _operands_by_arm(entry) if entry.is_choice or _is_write(entry) else []:
                if arm is not None:
                    needed = [one for use in leaves(operand) for one in _needed_entries(use, arm, makers, order)]
                    order += sorted({id(one): one for one in needed}.values(), key=lambda one: position[id(one)])
            if entry.arm is None or _is_write(entry):
                order.append(entry)
        return order

    def _mark_arms(self, makers: dict[Local, Entry]) -> None:
        given: dict[Local, set[Arm | None]] = {
            use: {None} for use in returned_uses(self.returns) if isinstance(use, Local)
        }
        last: dict[Local, int] = {}
        position = {id(entry): k for k, entry in enumerate(self.entries)}
        for entry in reversed(self.entries):
            arms = set().union(*(given.get(out, set()) for out in entry.outs))
            own = arms.pop() if len(arms) == 1 else None
            plain = not (entry.is_choice or entry.is_statement or entry.is_segment_end)
            end = max((last[out] for out in entry.outs if out in last), default=0)
            if not _is_write(entry) and own is not None and plain:
                if not self._is_overwritten(entry, position[id(entry)], end):
                    entry.arm = own
            at = end if entry.arm is not None and not _is_write(entry) else position[id(entry)]
            for arm, operand in _operands_by_arm(entry):
                for use in leaves(operand):
                    if isinstance(use, Local):
                        given.setdefault(use, set()).add(arm if makers[use].segment == entry.segment else None)
                        last[use] = max(last.get(use, 0), at)

    def _is_overwritten(self, entry: Entry, start: int, end: int) -> bool:
        """Returns whether a child or a step between two positions may write a variable that an entry touches."""
        own = self._variables(entry)
        others = [path for one in self.entries[start + 1 : end] if one.arm is None for path in self._variables(one)]
        others += [
            path for one in self.entries[start:end] if _is_write(one) for path in variables_read(one.step.args[0])
        ]
        return any(a[: len(b)] == b or b[: len(a)] == a for a in own for b in others)

    def _variables(self, entry: Entry) -> list[Path]:
        """Returns the variables that an entry reads, and the child that it calls, unless the child has no variables."""
        recipe = self.expressions.recipe_at(entry.step.target.path) if isinstance(entry.step.target, ToLayer) else None
        stateless = recipe is not None and recipe.name in ("layers.Keys", "layers.Training", "nnx.Dropout")
        return [
            *variables_read(entry.step),
            *([called_child(entry.step)] if called_child(entry.step) and not stateless else []),
        ]

    # Loops

    def _find_loops(self) -> list[Entry]:
        entries, k = [], 0
        while k < len(self.entries):
            rounds = self._rounds_at(k)
            if rounds:
                *inner, entry = [Entry(step, (out,)) for step, out in zip(rounds.steps, rounds.outs, strict=True)]
                self.inside |= {one.outs[0]: one for one in inner}
                entries.append(Entry(entry.step, (rounds.last,), rounds.loop))
            else:
                entries.append(self.entries[k])
            k += rounds.size if rounds else 1
        return entries

    def _rounds_at(self, start: int) -> Rounds | None:
        """Returns the loop that begins with an entry, or None."""
        run = self.expressions.definition.run
        if run is not None and run[0] == start:
            return self._list_rounds(*run)
        end = start
        while end < len(self.entries) and self._can_repeat(self.entries[end]):
            end += 1
        stated = [StepResult(entry.step, entry.outs[0]) for entry in self.entries[start:end]]
        return find_rounds(stated, self.value, self._constant, self._counts, self._list_length, self._run_length)

    def _can_repeat(self, entry: Entry) -> bool:
        return len(entry.outs) == 1 and not entry.is_statement and entry.place == (None, None)

    def _list_rounds(self, start: int, end: int) -> Rounds:
        """Returns the loop over the list that the class itself is."""
        first, last = self.entries[start], self.entries[end - 1]
        given = self.value(first.step.args[0])  # type: ignore[arg-type]
        target = first.step.target
        assert isinstance(target, ToLayer | ToModule | ToFunction)
        child = ToLayer(target.path)  # for a child of any kind: the loop has one name for all of them
        loop = Loop((), None, 0, end - start, given, target.path)
        return Rounds(loop, (Step(child, (CARRIED,)),), first.outs, last.outs[0], end - start)

    def _constant(self, number: int) -> object:
        """Returns a key by which the contents of holes are compared."""
        definition, place = self.expressions.definition, ("", str(number))
        own = definition.formulas.get(place)
        return comparison_key(definition.constants[place]) if own is None else repr(own)

    def _run_length(self, path: Sequence[str]) -> int | None:
        """Returns how many children have to be called in a loop: the children made in one loop.

        None, any number, for children whose names no attribute can have.
        """
        return self.expressions.runs.get(tuple(path), 0) if is_identifier(path[-1]) else None

    def _list_length(self, path: Sequence[str]) -> int:
        recipe = self.expressions.recipe_at(path)
        if recipe is None or recipe.kind not in ("list", "chain"):
            return 0
        return len(recipe.items) if all(item.kind in ("layer", "class", "chain") for item in recipe.items) else 0

    # Nesting

    def fold_values(self, banned: set[Local]) -> list[Entry]:
        """Decides which values, except `banned` ones, are nested; returns the entries that become statements."""
        self.folded = set(self.inside)
        pending: list[Entry] = []
        order: list[Entry] = []
        for entry in self.entries:
            if pending and pending[-1].place != entry.place:
                order += pending
                pending.clear()
            for inner in self._nestable_entries(entry, pending):
                self.folded.add(inner.outs[0])
                pending.remove(inner)
            once = len(entry.outs) == 1 and self._counts[entry.outs[0]] == 1
            if once and not entry.is_statement and not entry.is_segment_end and entry.outs[0] not in banned:
                pending.append(entry)
            else:
                order += [*pending, entry]
                pending.clear()
        if pending and self.returns == pending[-1].outs[0]:
            self.folded.add(pending.pop().outs[0])
        return order + pending

    def _nestable_entries(self, entry: Entry, pending: Sequence[Entry]) -> list[Entry]:
        """Returns the last pending entries, as far as they can be nested into this entry."""
        direct = [] if entry.is_statement else _direct_uses(entry.step)
        nested: list[Entry] = []
        for inner in reversed(pending):
            if inner.outs[0] not in direct or not self._can_hold(entry, [*nested, inner]):
                break
            nested.append(inner)
        written = [use for use in reversed(direct) if any(inner.outs[0] == use for inner in nested)]
        if written != [inner.outs[0] for inner in nested] and _has_conflict(
            [self._touched_paths(inner) for inner in nested]
        ):
            return []
        return nested

    def _can_hold(self, outer: Entry, inner: Sequence[Entry]) -> bool:
        heavy = isinstance(outer.step.target, ToLayer | ToModule) and not self._is_light(outer)
        if heavy and not all(self._is_light(within) for one in inner for within in self._with_nested(one)):
            return False
        if _weight(outer) + max(map(self._depth, inner)) > DEEPEST:
            return False
        node = self.node(outer, self.folded | {one.outs[0] for one in inner}, lambda use: name("x"))
        return len(f"{INDENT}{INDENT}x = {flat_text(node)}") <= READABLE

    def _is_light(self, entry: Entry) -> bool:
        recipe = self.expressions.recipe_at(entry.step.target.path) if isinstance(entry.step.target, ToLayer) else None
        return recipe is not None and recipe.name.endswith(LIGHT)

    def _with_nested(self, entry: Entry) -> list[Entry]:
        """Returns an entry and all entries that are nested in it."""
        inner = [self.by_local[use] for use in leaves(entry.step) if isinstance(use, Local) and use in self.folded]
        return [entry, *(deeper for one in inner for deeper in self._with_nested(one))]

    def _depth(self, entry: Entry) -> float:
        inner = [self.by_local[use] for use in leaves(entry.step) if isinstance(use, Local) and use in self.folded]
        return _weight(entry) + max(map(self._depth, inner), default=0)

    def _touched_paths(self, entry: Entry) -> list[tuple[str, ...]]:
        within = self._with_nested(entry)
        return [path for inner in within for path in (called_child(inner.step), *variables_read(inner.step)) if path]

    def node(self, entry: Entry, folded: set[Local], named: Callable[[Use], ast.expr]) -> ast.expr:
        """Returns an entry as an expression, with all entries that are nested in it."""

        def value(use: Use) -> ast.expr:
            if isinstance(use, Local) and use in folded:
                return self.node(self.by_local[use], folded, named)
            return named(use)

        return self.expressions.step(entry.step, value)

    def values_read(self, entry: Entry) -> list[Hashable]:
        """Returns the values with names that an entry reads, in order."""
        found: list[Hashable] = [entry.loop.given] if entry.loop else []
        for use in leaves(entry.step):
            if use == CARRIED:
                continue
            inner = isinstance(use, Local) and use in self.folded
            found += self.values_read(self.by_local[use]) if inner else [self.value(use)]  # type: ignore[index]
        return found

    @property
    def returned_entry(self) -> Entry | None:
        """Entry that is written into the `return` itself, or None."""
        return self.by_local[self.returns] if isinstance(self.returns, Local) and self.returns in self.folded else None


def _entries(steps: Sequence[Step]) -> list[Entry]:
    entries, count = [], 0
    for step in steps:
        entries.append(Entry(step, tuple(Local(count + k) for k in range(step.outs))))
        count += step.outs
    return entries


def _direct_uses(step: Step) -> list[Use]:
    """Returns the uses that an expression can replace: all uses except those of which only the shape is read."""

    def within(operand: Operand | tuple[Operand, ...]) -> list[Use]:
        match operand:
            case Length():
                return []
            case Many(_, items):
                return [use for item in items for use in within(item)]
            case Cut(start, stop, step):
                return within((start, stop, step))
            case tuple():
                return [use for item in operand for use in within(item)]
        return leaves(operand)

    return within((*step.args, *(value for _, value in step.kwargs)))


def _operands_by_arm(entry: Entry) -> list[tuple[Arm | None, Step | Operand]]:
    """Returns the operands of an entry, and the mode in which each operand is needed."""
    if _is_write(entry):
        return [(entry.arm, entry.step.args[1])]
    if not entry.is_choice:
        return [(entry.arm, entry.step)]
    return [
        ((called_child(entry.step), training), arg)
        for arg, training in zip(entry.step.args, (True, False), strict=True)
    ]


def _is_write(entry: Entry) -> bool:
    """Returns whether an entry writes a variable, which happens only in training."""
    return entry.step.target == ToName("=")


def _needed_entries(use: Use, arm: Arm, makers: dict[Local, Entry], there: Sequence[Entry]) -> list[Entry]:
    """Returns the entries of an arm that a value needs, in order, without the entries that are `there` already."""
    entry = makers[use] if isinstance(use, Local) else None
    if entry is None or entry.arm != arm or any(entry is one for one in there):
        return []
    found: list[Entry] = []
    for inner in leaves(entry.step):
        found += _needed_entries(inner, arm, makers, [*there, *found])
    return [*found, entry]


def _weight(entry: Entry) -> float:
    return 0.5 if is_operator(entry.step) else 1


def _has_conflict(touched: Sequence[Sequence[tuple[str, ...]]]) -> bool:
    """Returns whether two expressions call the same layer, or one calls a layer within a module that another calls."""
    pairs = [
        (one, other)
        for k, first in enumerate(touched)
        for second in touched[k + 1 :]
        for one in first
        for other in second
    ]
    return any(one[: len(other)] == other or other[: len(one)] == one for one, other in pairs)
