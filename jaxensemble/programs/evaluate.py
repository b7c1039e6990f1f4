"""Traced programs, run step by step: with nested programs written out, or with other steps in place of some."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxensemble.compat import JaxprEqn, Literal, Program, constants, is_program, run_step

Run = Callable[[JaxprEqn, Sequence[Any]], Sequence[Any]]
"""A function that runs a step with its operands, and returns the results."""

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Steps that do nothing but call a program, and the parameter that holds it."""


def write_out(program: Program) -> Program:
    """Returns the program with the programs that it calls written out in their places. Loops and branches stay.

    Rules of differentiation are lost with the calls that carry them.

    >>> program = jax.make_jaxpr(lambda x: jax.nn.relu(x) + 1)(1.0)
    >>> [step.primitive.name for step in write_out(program).eqns]
    ['max', 'add']
    """

    return jax.make_jaxpr(functools.partial(_call, program))(*(var.aval for var in program.invars))


def _call(program: Program, *operands: Any) -> list[Any]:
    return run_program(program, operands, _run_or_write_out)


def _run_or_write_out(step: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    inner: Any = step.params.get(_CALLS.get(step.primitive.name, ""))
    return _call(inner, *operands) if is_program(inner) else run_step(step, operands)


def run_program(program: Program, operands: Sequence[Any], run: Run = run_step) -> list[Any]:
    """Returns the results of a program; `run` runs every step.

    >>> run_program(jax.make_jaxpr(lambda x: 2 * x + 1)(1.0), [3.0])
    [Array(7., dtype=float32, weak_type=True)]
    """
    values = [*constants(program), *operands]
    found = dict(zip([*program.constvars, *program.invars], values, strict=True))
    return run_steps(program.eqns, found, program.outvars, run)


def run_steps(
    steps: Iterable[JaxprEqn], found: dict[Any, Any], wanted: Iterable[Any], run: Run = run_step
) -> list[Any]:
    """Runs steps of a program in order, adding their results to those `found`; returns the wanted ones."""
    read = lambda atom: atom.val if isinstance(atom, Literal) else found[atom]  # noqa: E731
    for step in steps:
        found.update(zip(step.outvars, run(step, [*map(read, step.invars)]), strict=True))
    return [*map(read, wanted)]
