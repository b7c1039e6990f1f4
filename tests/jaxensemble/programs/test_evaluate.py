"""Traced programs run step by step: the same numbers, whether calls are written out or steps replaced."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxensemble.compat import JaxprEqn, run_step
from jaxensemble.programs.evaluate import run_program, run_steps, write_out

X = jnp.linspace(-1, 1, 5)


@jax.custom_vjp
def double(x: jax.Array) -> jax.Array:
    return 2 * x


double.defvjp(lambda x: (double(x), None), lambda _, g: (g,))

CALLS = {
    "jit": jax.jit(lambda x: jnp.sin(x) + 1),
    "jit within jit": jax.jit(lambda x: jax.jit(jnp.cos)(x) * 2),
    "custom_jvp": jax.nn.relu,
    "custom_vjp": double,
    "constants": jax.jit(lambda x: x + np.arange(5, dtype=np.float32)),
    "results": jax.jit(lambda x: (x, 3.0, x * 2, x)),
}


def names(program: Any) -> list[str]:
    return [step.primitive.name for step in program.eqns]


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_written_out(name: str) -> None:
    program = jax.make_jaxpr(lambda x: CALLS[name](x + 1))(X)
    written = write_out(program)
    assert len(names(program)) == 2 and names(program)[1] in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call")
    assert not set(names(written)) & {"jit", "pjit", "custom_jvp_call", "custom_vjp_call"}
    expected = jax.tree.leaves(CALLS[name](X + 1))
    for got in (run_program(program, [X]), run_program(written, [X])):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_loops_and_branches_stay() -> None:
    def function(x: jax.Array) -> Any:
        looped = lax.fori_loop(0, 3, lambda _, y: jax.nn.relu(y) + 1, x)
        return lax.cond(x[0] > 0, jnp.sin, jnp.cos, looped)

    program = write_out(jax.make_jaxpr(function)(X))
    assert {"scan", "while"} & set(names(program)) and "cond" in names(program)
    np.testing.assert_allclose(run_program(program, [X])[0], function(X), rtol=1e-6)


def test_every_step_is_run_by_the_function_given() -> None:
    seen: list[str] = []

    def run(step: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
        seen.append(step.primitive.name)
        return [operands[0] - operands[1]] if step.primitive.name == "add" else run_step(step, operands)

    program = jax.make_jaxpr(lambda x: jnp.sin(x) * 3 + 2)(X)
    np.testing.assert_allclose(run_program(program, [X], run)[0], jnp.sin(X) * 3 - 2, rtol=1e-6)
    assert seen == ["sin", "mul", "add"]


def test_steps_add_their_results_to_those_found() -> None:
    program = jax.make_jaxpr(lambda x, y: (x + 1) * y)(X, X)
    (x, y), (add, multiply) = program.jaxpr.invars, program.eqns
    found: dict[Any, Any] = {x: X}
    run_steps([add], found, [])
    assert set(found) == {x, *add.outvars}
    with pytest.raises(KeyError):
        run_steps([multiply], found, [])
    found[y] = 2 * X
    (got,) = run_steps([multiply], found, program.jaxpr.outvars)
    np.testing.assert_allclose(got, (X + 1) * 2 * X)


def test_operands_are_counted() -> None:
    program = jax.make_jaxpr(lambda x: x + 1)(X)
    for operands in ([], [X, X]):
        with pytest.raises(ValueError, match="zip"):
            run_program(program, operands)
