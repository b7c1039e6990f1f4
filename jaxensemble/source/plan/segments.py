"""Modules of one class, some of which take steps that others skip: the shift of a window and its mask.

They share a class if these steps are consecutive, take one value and give one value. A module that skips the steps
uses the value unchanged.
"""

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

from jaxensemble.source.plan.definitions import MISSING
from jaxensemble.source.read.steps import (
    Body,
    Cut,
    Hole,
    Length,
    Local,
    Many,
    Slot,
    Step,
    ToLayer,
    VariableRead,
    leaves,
)

Span: TypeAlias = tuple[int, int]
"""The start and the end of consecutive steps of a body."""

MOST_SPANS = 16
"""The most spans that one body may skip of another body."""

LONGEST_SPAN = 8
"""The most steps of a span."""

MOST_TRIES = 200
"""The most spans that are tried before two bodies count as different, so that the comparison takes linear time."""


@dataclasses.dataclass(frozen=True)
class AlignedBody:
    """Body in the form of a longer body, and the spans of the longer body that it skips."""

    body: Body
    spans: frozenset[Span]


def align_bodies(short: Body, full: Body, results: Collection[int]) -> AlignedBody | None:
    """Returns `short` in the form of `full`, some of whose steps it skips; None if the steps differ otherwise.

    `results` are the values of `full` that are used after its steps.
    """
    if any(isinstance(step.target, ToLayer) and step.target.path[-1].rstrip("_") == "training" for step in full.steps):
        return None  # a choice by the mode is written as statements, whose places are their own
    removed = len(full.steps) - len(short.steps)
    if not 0 < removed <= len(short.steps) or not _is_in_order(short.steps, full.steps):
        return None
    return _Alignment(short, full, results).find()


class Flow:
    """Values that the steps of a body make and read. `results` are the values that are used after the steps."""

    def __init__(self, body: Body, results: Collection[int]):
        self.body = body
        self.outs = _outs(body.steps)
        self.reads = [{value_of(body, leaf) for leaf in leaves(step)} for step in body.steps]
        self.last_read = {value: k for k, reads in enumerate(self.reads) for value in reads}
        self.last_read |= {Local(k): len(body.steps) for k in results}

    def carried_value(self, span: Span) -> Hashable | None:
        """Returns the one value that a span takes, if the span gives only one value, which replaces it afterwards."""
        start, end = span
        if end > len(self.body.steps) or len(self.outs[end - 1]) != 1:
            return None
        made = [out for outs in self.outs[start:end] for out in outs]
        taken = {value for reads in self.reads[start:end] for value in reads} - set(made)
        if len(taken) != 1 or any(self.last_read.get(out, -1) >= end for out in made[:-1]):
            return None
        carried = taken.pop()
        return carried if self.last_read[carried] < end <= self.last_read.get(made[-1], -1) else None


def merge_spans(flow: Flow, skipped: Sequence[frozenset[Span]]) -> list[frozenset[Span]]:
    """Returns the spans that each module skips. Consecutive spans that the same modules skip become one span."""
    spans = sorted({span for own in skipped for span in own})
    whole: list[list[Span]] = []
    for span in spans:
        before = whole[-1] if whole else []
        together = [before[-1] in own for own in skipped] == [span in own for own in skipped] if before else False
        if together and before[-1][1] == span[0] and flow.carried_value((before[0][0], span[1])) is not None:
            before.append(span)
        else:
            whole.append([span])
    return [frozenset((parts[0][0], parts[-1][1]) for parts in whole if parts[0] in own) for own in skipped]


@dataclasses.dataclass
class _State:
    """State of the comparison of two bodies.

    `values` maps values of the full body to values of the short body, `carried` the result of a skipped span to the
    value that the span takes.
    """

    values: dict[Hashable, Hashable]
    carried: dict[Hashable, Hashable]
    spans: tuple[Span, ...]

    def resolve_skipped(self, value: Hashable) -> Hashable:
        """Returns a value, or the value that replaces it because spans are skipped."""
        while value in self.carried:
            value = self.carried[value]
        return value


class _Alignment:
    """Search for the spans that a body skips, with a limit on its tries."""

    def __init__(self, short: Body, full: Body, results: Collection[int]):
        self.short = short
        self.full = full
        self.results = results
        self.tries = MOST_TRIES
        self.flow = Flow(full, results)
        self.outs = self.flow.outs
        self.own_outs = _outs(short.steps)

    def find(self) -> AlignedBody | None:
        state = self._align(0, 0, _State({}, {}, ()))
        return self._align_values(state) if state else None

    def _align(self, i: int, j: int, state: "_State") -> "_State | None":
        """Matches equal steps from two places on as far as possible, then skips a span after which steps match."""
        self.tries -= 1
        start = i
        while i < len(self.full.steps) and j < len(self.short.steps) and self._match_steps(i, j, state):
            i, j = i + 1, j + 1
        if i == len(self.full.steps) and j == len(self.short.steps):
            return state
        if len(state.spans) == MOST_SPANS:
            return None
        for back in range(min(i - start, 3) + 1):
            for length in range(1, LONGEST_SPAN + 1):
                span = (i - back, i - back + length)
                carried = self.flow.carried_value(span)
                if carried is None or self.tries <= 0:
                    continue
                found = self._align(span[1], j - back, self._skip_span(state, span, carried))
                if found:
                    return found
        return None

    def _skip_span(self, state: "_State", span: Span, carried: Hashable) -> "_State":
        """Returns the state before a span, with the value that the span takes instead of its result."""
        later = {out for outs in self.outs[span[0] :] for out in outs}
        values = {value: own for value, own in state.values.items() if value not in later}
        given = {self.outs[span[1] - 1][0]: carried}
        return _State(values, state.carried | given, (*state.spans, span))

    def _match_steps(self, i: int, j: int, state: "_State") -> bool:
        """Returns whether two steps are equal; if so, notes which values are equal."""
        step, own = self.full.steps[i], self.short.steps[j]
        pairs: list[tuple[Any, Any]] = []
        parts = ((step.args, step.kwargs), (own.args, own.kwargs))
        if step.target != own.target or step.outs != own.outs or not _are_alike(*parts, pairs):
            return False
        found: dict[Hashable, Hashable] = {}
        for leaf, other in pairs:
            if isinstance(leaf, Hole):
                continue
            value, theirs = state.resolve_skipped(value_of(self.full, leaf)), value_of(self.short, other)
            if value not in state.values and (isinstance(value, Local) or isinstance(theirs, Local)):
                return False
            if state.values.get(value, theirs) != theirs or found.setdefault(value, theirs) != theirs:
                return False
        state.values.update(found)
        state.values.update(zip(self.outs[i], self.own_outs[j], strict=True))
        return True

    def _align_values(self, state: "_State") -> AlignedBody | None:
        if any(slot not in state.values for slot in self.full.slots):
            return None
        latest: dict[Hashable, int] = {}
        for out in (out for outs in self.outs for out in outs):
            if state.resolve_skipped(out) in state.values:
                latest[state.values[state.resolve_skipped(out)]] = out.index
        names = [""] * len(self.full.names)
        for own, index in latest.items():
            if isinstance(own, Local):
                names[index] = self.short.names[own.index]
        if not all(names[k] for k in self.results):
            return None
        slots = [str(state.values[slot]) for slot in self.full.slots]
        body = Body(self.full.steps, slots, self._constants(state.spans), self.full.hints, names)
        return AlignedBody(body, frozenset(state.spans))

    def _constants(self, spans: tuple[Span, ...]) -> list[Any]:
        """Returns the constants of the short body in the order of the full body's constants."""
        kept = [step for k, step in enumerate(self.full.steps) if not any(a <= k < b for a, b in spans)]
        constants: list[Any] = [MISSING] * len(self.full.constants)
        for hole, own in zip(hole_numbers(kept), hole_numbers(self.short.steps), strict=True):
            constants[hole] = self.short.constants[own]
        return constants


def _is_in_order(some: Sequence[Step], steps: Sequence[Step]) -> bool:
    """Returns whether the targets of `some` steps occur in order in `steps`: a quick test that excludes most bodies."""
    rest = iter(steps)
    return all(any(step.target == own.target for step in rest) for own in some)


def value_of(body: Body, leaf: Local | Slot) -> Hashable:
    """Returns the value that a use reads; a value from outside is a name."""
    return body.slots[leaf.index] if isinstance(leaf, Slot) else leaf


def _outs(steps: Sequence[Step]) -> list[tuple[Local, ...]]:
    outs, count = [], 0
    for step in steps:
        outs.append(tuple(Local(count + k) for k in range(step.outs)))
        count += step.outs
    return outs


def _are_alike(one: Any, other: Any, pairs: list[tuple[Any, Any]]) -> bool:
    """Returns whether two operands differ only in values and constants; adds these to `pairs`."""
    match one, other:
        case (Local() | Slot(), Local() | Slot()) | (Hole(), Hole()):
            pairs.append((one, other))
            return True
        case Length(of, axis), Length(own, other_axis):
            return axis == other_axis and _are_alike(of, own, pairs)
        case Many(is_tuple, items), Many(other_is_tuple, other_items):
            return is_tuple == other_is_tuple and _are_alike(items, other_items, pairs)
        case Cut(), Cut():
            return _are_alike((one.start, one.stop, one.step), (other.start, other.stop, other.step), pairs)
        case tuple(), tuple():
            return len(one) == len(other) and all(_are_alike(a, b, pairs) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


def hole_numbers(operand: Any) -> Iterator[int]:
    """Yields the number of every hole within steps or operands, in order."""
    match operand:
        case Hole(number):
            yield number
        case Step(_, args, kwargs):
            yield from hole_numbers((args, kwargs))
        case Length(of):
            yield from hole_numbers(of)
        case Many(_, items):
            yield from hole_numbers(items)
        case Cut(start, stop, step):
            yield from hole_numbers((start, stop, step))
        case tuple() | list():
            for item in operand:
                yield from hole_numbers(item)


def child_names(steps: Any) -> set[str]:
    """Returns the names of the children that steps call or read."""
    found: set[str] = set()
    match steps:
        case VariableRead(path):
            found.update(path[:1])
        case Step(target, args, kwargs):
            found |= set(getattr(target, "path", ())[:1]) | child_names((args, kwargs))
        case Length(of):
            found |= child_names(of)
        case Many(_, items):
            found |= child_names(items)
        case Cut(start, stop, step):
            found |= child_names((start, stop, step))
        case tuple() | list():
            for item in steps:
                found |= child_names(item)
    return found
