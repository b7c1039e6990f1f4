"""The part of a program that depends on weights alone: the same results, and no array twice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxensemble.programs.evaluate import run_program, write_out
from jaxensemble.programs.weights import Division

KEY = jax.random.key(3)
W, X = jnp.arange(6.0).reshape(2, 3) - 2, jnp.linspace(-1, 1, 12).reshape(4, 3)
IDS = jnp.array([2, 0, 1])


def loop(w: Any, x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda k, total: total + k * (x @ w.T), jnp.zeros((4, 2)))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "transposed": lambda w, x: x @ w.T,
    "as it is": lambda w, x: x @ jnp.reshape(w, (3, 2)) + w[0, 0],
    "weights alone": lambda w, x: w * 2,
    "inputs alone": lambda w, x: x * 2,
    "scan": lambda w, x: lax.scan(lambda total, row: (total + row @ w.T, total), jnp.zeros(2), x),
    "scan of weights": lambda w, x: x * lax.scan(lambda total, row: (total + row, total), jnp.zeros(3), w)[0],
    "loop": loop,
    "while": lambda w, x: lax.while_loop(lambda y: y.sum() < 50, lambda y: y + jnp.abs(w).sum(), x),
    "branch": lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w.T, lambda: x @ w.T + 1),
    "branch of weights": lambda w, x: x * lax.cond(w.sum() > 0, lambda: w[0], lambda: w[1]),
    "custom rule": lambda w, x: jax.nn.relu(x) * jax.nn.silu(w[0]),
    "random": lambda w, x: x * jax.random.normal(jax.random.fold_in(KEY, 1), (3,)) + w[0],
    "integers": lambda w, x: x[:, IDS] + w[0][IDS.at[0].add(-1)],
    "constants": lambda w, x: x * np.zeros(3, np.float32) + np.zeros(3, np.int32) + w[0] * np.arange(3.0, dtype="f"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_divided_programs_give_the_same_results(name: str) -> None:
    function = FUNCTIONS[name]
    program, expected = jax.make_jaxpr(function)(W, X), jax.tree.leaves(function(W, X))
    division = Division(program, [True, False])
    arrays = division.prepare([W])
    assert [(array.shape, array.dtype) for array in arrays] == [(s.shape, s.dtype) for s in division.shapes]
    for got in (division.call(arrays, [X]), run_program(write_out(program), [W, X])):
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert len(set(division.names)) == len(division.names)
    assert division.names == Division(jax.make_jaxpr(function)(W, X), [True, False]).names


def test_what_is_made_of_weights_is_not_made_again() -> None:
    function = lambda w, b, x: x @ jnp.sin(w).T + b  # noqa: E731
    arrays = W, jnp.ones(2), jnp.ones((500, 3))
    division = Division(jax.make_jaxpr(function)(*arrays), [True, True, False])
    after = jax.make_jaxpr(division.call)(division.shapes, [arrays[2]])
    assert not {"sin", "transpose"} & {step.primitive.name for step in after.eqns}
    assert sum(shape.size for shape in division.shapes) == 8  # the bias is not spread over the rows


def test_names_tell_constants_apart() -> None:
    names = []
    for constant in (np.zeros(8, np.int32), np.zeros(8, np.float32), np.zeros((2, 4), np.int32), np.arange(8)):
        function = lambda w, x, constant=constant: x + jnp.sum(constant * w)  # noqa: E731
        names += Division(jax.make_jaxpr(function)(jnp.float32(2), jnp.ones(8)), [True, False]).names
    made = [name for name in names if not name.startswith("weight")]
    assert made and len(set(made)) == len(made)


def test_steps_without_results_stay() -> None:
    seen: list[float] = []

    def function(w: Any, x: Any) -> Any:
        jax.debug.callback(lambda value: seen.append(float(value)), w)
        return w * x

    division = Division(jax.make_jaxpr(function)(1.0, 2.0), [True, False])
    division.call(division.prepare([jnp.float32(3)]), [jnp.float32(2)])
    jax.effects_barrier()
    assert seen == [3.0]
