"""Assignments to attributes in the methods of a class, read from its source."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import textwrap
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

_NAMING = {"register_buffer", "setattr"}


@dataclasses.dataclass
class Assignments:
    """The assignments to one attribute: all constants, and whether `__init__` or later methods assign other values."""

    constants: list[Any] = dataclasses.field(default_factory=list)
    made_at_first: bool = False
    made_later: bool = False


_known: "weakref.WeakKeyDictionary[type, dict[str, Assignments]]" = weakref.WeakKeyDictionary()


def read_assignments(kind: type) -> dict[str, Assignments]:
    """Returns the attributes that a class and its bases assign to `self`. Empty if there is no source.

    >>> read_assignments(nn.LazyLinear)["weight"]
    Assignments(constants=[], made_at_first=True, made_later=False)
    """
    if kind not in _known:
        _known[kind] = _read(kind)
    return _known[kind]


def _read(kind: type) -> dict[str, Assignments]:
    found: dict[str, Assignments] = defaultdict(Assignments)
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        with contextlib.suppress(OSError, TypeError, SyntaxError):  # for example, classes made by exec
            for function in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(function, ast.FunctionDef) and function.args.args:
                    for name, value in _assigned_names(function, function.args.args[0].arg):
                        _record(found[name], value, function.name == "__init__")
    return dict(found)


def is_cached_property(kind: type, name: str) -> bool:
    """Returns whether an attribute is a `functools.cached_property`."""
    return isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)


def _record(assigned: Assignments, value: ast.expr | None, at_first: bool) -> None:
    try:
        constant = ast.literal_eval(value) if value is not None else ...
    except ValueError:
        constant = ...
    if constant is ...:
        assigned.made_at_first |= at_first
        assigned.made_later |= not at_first
    elif constant not in assigned.constants:
        assigned.constants.append(constant)


def _assigned_names(function: ast.FunctionDef, me: str) -> Iterator[tuple[str, ast.expr | None]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Tuple):
                    yield from ((name, None) for part in target.elts if (name := _name(part, me)))
                elif name := _name(target, me):
                    yield name, node.value
        elif isinstance(node, ast.AugAssign) and (name := _name(node.target, me)):
            yield name, None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            own = [arg for arg in node.args if not (isinstance(arg, ast.Name) and arg.id == me)]
            if called in _NAMING and len(own) >= 2 and isinstance(own[0], ast.Constant):
                yield str(own[0].value), own[1]


def _name(target: ast.expr, me: str) -> str | None:
    own = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == me
    return target.attr if own else None  # type: ignore[union-attr]
