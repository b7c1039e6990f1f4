"""Runs: consecutive children with numbered names and the same form."""

import ast
import copy
import dataclasses
from collections.abc import Mapping, Sequence

from jaxensemble.source.plan.loops import FEWEST_CHILDREN, split_number
from jaxensemble.source.write.expressions import name
from jaxensemble.source.write.layout import flat_text

VARIABLE = "i"
"""The variable that counts the children of a run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Run of `count` children from `first` on, named by a stem and a number; `node` makes each child.

    Numbers that grow by equal steps are written in terms of `VARIABLE`: `Block(64 + 32 * i)`.
    """

    first: str
    stem: str
    start: int
    count: int
    node: ast.expr


def numbered_runs(nodes: Mapping[str, ast.expr]) -> dict[str, Run]:
    """Returns the runs among children, each under the names of all its children; `nodes` make the children.

    >>> nodes = {f"fc{k}": ast.parse(f"f({32 + 32 * k}, a=b)", mode="eval").body for k in range(1, 5)}
    >>> flat_text(numbered_runs(nodes)["fc1"].node)
    'f(32 + 32 * i, a=b)'
    """
    runs: dict[str, Run] = {}
    items = [(key, _form(node)) for key, node in nodes.items()]
    k = 0
    while k < len(items):
        run = _run(items, k)
        for key, _ in items[k : k + (run.count if run else 0)]:
            assert run is not None
            runs[key] = run
        k += run.count if run else 1
    return runs


@dataclasses.dataclass(frozen=True, eq=False)
class _Form:
    """Node as text: `head` is a call without its arguments, `slots` are the arguments."""

    node: ast.expr
    head: tuple[object, ...]
    slots: tuple[str, ...]


def _form(node: ast.expr) -> _Form:
    if not isinstance(node, ast.Call):
        return _Form(node, (flat_text(node),), ())
    head = (flat_text(node.func), len(node.args), *(keyword.arg for keyword in node.keywords))
    return _Form(node, head, tuple(map(flat_text, _slots(node))))


def _run(items: Sequence[tuple[str, _Form]], first: int) -> Run | None:
    """Returns the longest run that begins with the item with this number."""
    key, form = items[first]
    found = split_number(key)
    if found is None or not isinstance(form.node, ast.Call):
        return None
    stem, start = found
    count, steps = 1, None
    while first + count < len(items) and items[first + count][0] == f"{stem}{start + count}":
        between = _steps(items[first + count - 1][1], items[first + count][1])
        if between is None or steps not in (None, between):
            break
        count, steps = count + 1, between
    if count < FEWEST_CHILDREN or steps is None:
        return None
    made = _in_terms_of_variable(form.node, steps, start)
    return Run(key, stem, start, count, made) if made else None


def _steps(before: _Form, now: _Form) -> list[int] | None:
    """Returns the growth of each argument from one call to the next; None if the calls differ in anything else."""
    if before.head != now.head or len(before.slots) != len(now.slots):
        return None
    steps = []
    for k, (a, b) in enumerate(zip(before.slots, now.slots, strict=True)):
        step = 0 if a == b else _step(_slots(before.node)[k], _slots(now.node)[k])
        if step is None:
            return None
        steps.append(step)
    return steps


def _step(before: ast.expr, now: ast.expr) -> int | None:
    """Returns the growth of a whole number; None for other values, and for numbers that shrink."""
    match before, now:
        case ast.Constant(int(a)), ast.Constant(int(b)) if type(a) is type(b) is int and b > a:
            return b - a
    return None


def _in_terms_of_variable(node: ast.Call, steps: Sequence[int], start: int) -> ast.expr | None:
    """Returns the call in terms of `VARIABLE`, which begins at `start`; None if a number would be negative."""
    if not any(steps):
        return node
    made = copy.deepcopy(node)
    for k, (item, step) in enumerate(zip(_slots(node), steps, strict=True)):
        if step:
            assert isinstance(item, ast.Constant) and isinstance(item.value, int)
            offset = item.value - step * start
            if offset < 0:
                return None
            _set_slot(made, k, _growing_number(offset, step))
    return made


def _slots(node: ast.expr) -> list[ast.expr]:
    """Returns the arguments of a call."""
    return [*node.args, *(keyword.value for keyword in node.keywords)] if isinstance(node, ast.Call) else []


def _set_slot(node: ast.Call, k: int, value: ast.expr) -> None:
    if k < len(node.args):
        node.args[k] = value
    else:
        node.keywords[k - len(node.args)].value = value


def _growing_number(offset: int, step: int) -> ast.expr:
    times: ast.expr = name(VARIABLE)
    if step != 1:
        times = ast.BinOp(ast.Constant(step), ast.Mult(), times)
    return ast.BinOp(ast.Constant(offset), ast.Add(), times) if offset else times
