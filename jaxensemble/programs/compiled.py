"""The instructions of a compiled program, read off XLA's text of it, and the work that a program has to do."""

import collections
import math
import re
from typing import NamedTuple

from jaxensemble.compat import Program
from jaxensemble.programs.rewrite import CONVOLUTION, PRODUCT, equations

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", re.MULTILINE)
_PART = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")

_FREE = frozenset({"bitcast", "constant", "get-tuple-element", "iota", "parameter", "tuple"})
"""Instructions that run nothing, or nearly nothing."""


class Instructions(NamedTuple):
    """The instructions of a compiled program that run, by kind, and the arrays that some of them only move.

    - `counts`: the number of each kind of instruction. A fusion is one instruction.
    - `moves`, `moved_bytes`: the number of copies and transpositions, and the bytes that they write.
    """

    counts: collections.Counter[str]
    moves: int
    moved_bytes: int

    @property
    def total(self) -> int:
        """The number of instructions, those within a loop once."""
        return sum(self.counts.values())


def read_instructions(text: str) -> Instructions:
    """Reads the text of a compiled program (`as_text()`).

    >>> import jax, jax.numpy as jnp
    >>> compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(3)).compile()
    >>> dict(read_instructions(compiled.as_text()).counts)
    {'fusion': 1}
    """
    starts = list(_COMPUTATION.finditer(text))
    ends = [*(start.start() for start in starts[1:]), len(text)]
    parts = {name for line in text.splitlines() if " call(" not in line for name in _PART.findall(line)}
    counts: collections.Counter[str] = collections.Counter()
    moves = moved = 0
    for start, end in zip(starts, ends, strict=True):
        if start[1] in parts:  # of a fusion or a reduction
            continue
        for name, shape, kind in _INSTRUCTION.findall(text, start.end(), end):
            if kind in _FREE:
                continue
            counts[kind] += 1
            if kind in ("copy", "transpose") or (kind == "fusion" and name.startswith(("copy", "transpose"))):
                moves, moved = moves + 1, moved + _bytes(shape)
    return Instructions(counts, moves, moved)


def _bytes(shape: str) -> int:
    sizes = [
        math.prod(map(int, filter(None, axes.split(",")))) * (int(bits or 8) // 8)
        for _, bits, axes in _SHAPE.findall(shape)
    ]
    return sum(sizes)


def count_flops(program: Program) -> int:
    """The floating-point operations of a program's products and convolutions: a multiplication and an addition each.

    >>> import jax, jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))
    48
    """
    total = 0
    for step in equations(program):
        out = math.prod(step.outvars[0].aval.shape) if step.outvars else 0  # type: ignore[attr-defined]
        if step.primitive.name == PRODUCT:
            (over, _), _ = step.params["dimension_numbers"]
            total += 2 * out * math.prod(step.invars[0].aval.shape[axis] for axis in over)  # type: ignore[attr-defined]
        elif step.primitive.name == CONVOLUTION:
            kernel = step.invars[1].aval.shape  # type: ignore[attr-defined]
            total += 2 * out * math.prod(kernel) // kernel[step.params["dimension_numbers"].rhs_spec[0]]
    return total
