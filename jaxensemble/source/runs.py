"""Children with numbered names that are made alike, one after the other."""

import ast
import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from jaxensemble.source.expressions import name
from jaxensemble.source.loops import FEWEST, numbered
from jaxensemble.source.pretty import flat

VARIABLE = "i"
"""What counts the children of a run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """`count` children from the one named `first` on, named by a stem and a number; `node` makes each of them.

    Numbers that grow by equal steps are written in terms of `VARIABLE`: `Block(64 + 32 * i)`.
    """

    first: str
    stem: str
    start: int
    count: int
    node: ast.expr


def numbered_runs(nodes: Mapping[str, ast.expr]) -> dict[str, Run]:
    """The runs among children that are made like this, each under the names of all its children."""
    runs: dict[str, Run] = {}
    keys = list(nodes)
    k = 0
    while k < len(keys):
        run = _run([(key, nodes[key]) for key in keys[k:]])
        for key in keys[k : k + (run.count if run else 0)]:
            assert run is not None
            runs[key] = run
        k += run.count if run else 1
    return runs


def _run(items: Sequence[tuple[str, ast.expr]]) -> Run | None:
    """The longest run that begins with the first item."""
    (first, node), *_ = items
    found = numbered(first)
    if found is None or not isinstance(node, ast.Call):
        return None
    stem, start = found
    count = 1
    while count < len(items) and items[count][0] == f"{stem}{start + count}":
        count += 1
    while count >= FEWEST:
        made = alike([node for _, node in items[:count]], start)
        if made is not None:
            return Run(first, stem, start, count, made)
        count -= 1
    return None


def alike(nodes: Sequence[ast.expr], start: int) -> ast.expr | None:
    """One expression for all: the same, or with whole numbers that grow by equal steps in terms of `VARIABLE`.

    >>> flat(alike([ast.parse(f"f({n}, a=b)", mode="eval").body for n in (64, 96, 128, 160)], 1))
    'f(32 + 32 * i, a=b)'
    """
    texts = {flat(node) for node in nodes}
    if len(texts) == 1:
        return nodes[0]
    if not all(isinstance(node, ast.Call) for node in nodes):
        return None
    made, columns = copy.deepcopy(nodes[0]), list(zip(*map(_slots, nodes), strict=False))
    if len({len(_slots(node)) for node in nodes}) > 1:
        return None
    for k, column in enumerate(columns):
        if len({flat(item) for item in column}) > 1:
            grown = _growing(column, start)
            if grown is None:
                return None
            assert isinstance(made, ast.Call)
            _put(made, k, grown)
    blank = [copy.deepcopy(node) for node in nodes]
    for node in blank:
        for k in range(len(_slots(node))):
            assert isinstance(node, ast.Call)
            _put(node, k, ast.Constant(0))
    return made if len({flat(node) for node in blank}) == 1 else None


def _slots(node: ast.expr) -> list[ast.expr]:
    """The arguments of a call."""
    return [*node.args, *(keyword.value for keyword in node.keywords)] if isinstance(node, ast.Call) else []


def _put(node: ast.Call, k: int, value: ast.expr) -> None:
    if k < len(node.args):
        node.args[k] = value
    else:
        node.keywords[k - len(node.args)].value = value


def _growing(column: Sequence[ast.expr], start: int) -> ast.expr | None:
    """Whole numbers with equal differences, in terms of `VARIABLE`, which begins at `start`."""
    values = [item.value for item in column if isinstance(item, ast.Constant) and type(item.value) is int]
    if len(values) < len(column) or len(values) < FEWEST:
        return None
    step = values[1] - values[0]
    offset = values[0] - step * start
    if step <= 0 or offset < 0 or any(b - a != step for a, b in itertools.pairwise(values)):
        return None
    times: ast.expr = name(VARIABLE)
    if step != 1:
        times = ast.BinOp(ast.Constant(step), ast.Mult(), times)
    return ast.BinOp(ast.Constant(offset), ast.Add(), times) if offset else times
