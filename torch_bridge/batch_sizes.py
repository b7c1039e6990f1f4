"""Where a forward decides by the size of its batch, of which `torch.export` sees one."""

import contextlib
import dataclasses
import linecache
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from torch_bridge.compat import guards_told, pytree
from torch_bridge.examples import Arguments
from torch_bridge.export_errors import is_the_users
from torch_bridge.modes import has_tensors


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The lines of a forward that decide by the size of the batch, in order.

    - `fixing`: what bounds the size or fixes it, and the line of the forward that has PyTorch do so.
    - `own`: those lines among them that compare sizes themselves, and do not assert what they find.
    - `of_one`: those that take another way for a batch of one than for more.
    """

    fixing: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    own: list[str] = dataclasses.field(default_factory=list)
    of_one: list[str] = dataclasses.field(default_factory=list)

    @property
    def last(self) -> str:
        """The line that fixed the size last; empty if none did."""
        return next((place for place, _ in reversed(self.fixing) if place), "")

    def factor(self, size: int) -> int | None:
        """The number of whose multiples all is true that was found for an example of a size; None if there is none."""
        if self.own or not self.fixing:
            return None
        guards = [guard for _, guard in self.fixing]
        return next((k for k in range(2, size + 1) if size % k == 0 and _are_about_multiples(guards, k)), None)


SIZES = (*range(2, 40), 97, 1000, 12345)
"""Sizes of a batch for which conditions are tried; the exporter assumes that there are two rows at least."""


@contextlib.contextmanager
def decisions() -> Iterator[Decisions]:
    """The decisions by the size of the batch that are made within it, while `torch.export` runs a forward.

    What is true for all sizes is none, although the exporter cannot always tell.
    """
    found = Decisions()
    evaluated = torch.SymBool.__bool__

    def decide(guard: Any) -> None:
        if not _holds(guard, SIZES):
            found.fixing.append((_users_line(sys._getframe(2)), guard))

    def evaluate(condition: torch.SymBool) -> bool:
        caller, fixed = sys._getframe(1), len(found.fixing)
        result = evaluated(condition)
        if is_the_users(caller.f_code.co_filename):
            if len(found.fixing) > fixed and not _described(caller).partition(": ")[2].startswith("assert "):
                found.own.append(_described(caller))
            if result != _for_one(condition, result):
                found.of_one.append(_described(caller))
        return result

    torch.SymBool.__bool__ = evaluate  # type: ignore[method-assign]
    try:
        with guards_told(decide, lambda guard: _holds(guard, SIZES)):
            yield found
    finally:
        torch.SymBool.__bool__ = evaluated  # type: ignore[method-assign]


def _holds(guard: Any, sizes: Iterable[int]) -> bool:
    """Whether a condition on one size is true for all these."""
    symbols = list(guard.free_symbols)
    try:
        return len(symbols) == 1 and all(guard.subs(symbols[0], size) == True for size in sizes)  # noqa: E712
    except ZeroDivisionError:  # as of `batch % (batch // 2)` for a batch of one
        return False


def _are_about_multiples(guards: Sequence[Any], factor: int) -> bool:
    """Whether all conditions hold for the multiples of a number, and for no other size."""
    if not all(_holds(guard, [factor * size for size in SIZES]) for guard in guards):
        return False
    others = (size for size in SIZES if size % factor)
    return not any(all(_holds(guard, [size]) for guard in guards) for size in others)


def _for_one(condition: torch.SymBool, otherwise: bool) -> bool:
    """What a condition is for a batch of one, if it is about that."""
    expression = condition.node.expr
    symbols = getattr(expression, "free_symbols", ())
    value = expression.subs(dict.fromkeys(symbols, 1)) if len(symbols) == 1 else None
    return bool(value) if value in (True, False) else otherwise


def _users_line(frame: FrameType | None) -> str:
    """The innermost line of the forward around a frame of PyTorch's; empty where there is none."""
    while frame is not None and frame.f_globals.get("__name__") != "torch_bridge.capture":
        if is_the_users(frame.f_code.co_filename):
            return _described(frame)
        frame = frame.f_back
    return ""


def _described(frame: FrameType) -> str:
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"


def in_multiples(dynamic: Any, factor: int) -> Any:
    """The open dimensions of batches that are a multiple of a number, as those of `x.view(batch // 2, 2)`."""
    size = factor * Dim("_batch")
    return pytree.tree_map(lambda leaf: None if leaf is None else size, dynamic)


def with_rows(inputs: Arguments, dynamic: Arguments, count: int) -> Arguments:
    """The inputs with the first of their rows only."""
    leaves, spec = pytree.tree_flatten(inputs)
    pairs = zip(leaves, axes_of(inputs, dynamic), strict=True)
    return pytree.tree_unflatten([x if axis is None else x.narrow(axis, 0, count) for x, axis in pairs], spec)


def axes_of(inputs: Arguments, dynamic: Arguments) -> list[int | None]:
    """The open axis of every input, in the order of the leaves; None for one that has none."""
    return [next(iter(axis or ()), None) for axis in pytree.tree_structure(inputs).flatten_up_to(dynamic)]


def open_size(inputs: Arguments, dynamic: Arguments) -> int:
    """The size of the example's batch; 1 if no input has any."""
    pairs = zip(pytree.tree_leaves(inputs), axes_of(inputs, dynamic), strict=True)
    return next((leaf.shape[axis] for leaf, axis in pairs if axis is not None), 1)


def is_same(program: ExportedProgram, of_one: ExportedProgram) -> bool:
    """Whether a program for an open batch does to a batch of one what the other, made for that alone, does."""
    ours, theirs = ([node for node in each.graph.nodes if has_tensors(node)] for each in (program, of_one))
    if len(ours) != len(theirs):
        return False
    twins = dict(zip(ours, theirs, strict=True))
    return all(node.target == twin.target and _alike(node, twin, twins) for node, twin in twins.items())


def _alike(node: fx.Node, twin: fx.Node, twins: dict[fx.Node, fx.Node]) -> bool:
    """Whether two nodes have the same arguments, computed sizes left out."""
    if node.op == "placeholder":
        return True
    ours, theirs = (pytree.tree_leaves((each.args, each.kwargs)) for each in (node, twin))
    return len(ours) == len(theirs) and all(
        twins[a] is b if a in twins else isinstance(a, fx.Node) or a == b for a, b in zip(ours, theirs, strict=True)
    )
