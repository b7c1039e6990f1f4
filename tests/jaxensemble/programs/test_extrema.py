"""Maxima, minima and long sums in their rewritten forms: values and gradients compared with JAX's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxensemble.programs.cpu.sums import total
from jaxensemble.programs.extrema import EXTREMES
from jaxensemble.programs.forms import use_forms
from jaxensemble.programs.rewrite import primitives, rewrite_steps

CASES: dict[str, Callable[[Any], Any]] = {
    "max": lambda x: jnp.max(x),
    "max of two axes": lambda x: jnp.max(x, (0, 2)),
    "max keeping its axis": lambda x: jnp.max(jnp.maximum(x, 0), 1, keepdims=True),
    "min": lambda x: jnp.min(x, -1),
    "max of one value": lambda x: jnp.max(x[:1], 0),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "maximum of rows": lambda x: jnp.maximum(x, x[:1]),
    "minimum of a number": lambda x: jnp.minimum(0.0, x),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_jax(case: str) -> None:
    """Rounded to one digit, so that there are equal values."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)).round(1), jnp.float32)
    theirs, ours = CASES[case], rewrite_steps(CASES[case], EXTREMES)
    assert primitives(ours, x)["custom_jvp_call"] > 0
    np.testing.assert_array_equal(ours(x), theirs(x))
    weights = jnp.cos(jnp.arange(theirs(x).size)).reshape(theirs(x).shape)
    slopes = [jax.grad(lambda x, f=f: jnp.sum(weights * f(x))) for f in (ours, theirs)]
    np.testing.assert_allclose(slopes[0](x), slopes[1](x), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(slopes[0])(x[None])[0], slopes[1](x), atol=1e-6)
    np.testing.assert_allclose(*(jax.jvp(f, (x,), (x,))[1] for f in (ours, theirs)), atol=1e-6)


def test_integers_have_no_gradients_and_stay() -> None:
    x = jnp.array([[1, 5, 5], [2, 0, 1]])
    assert rewrite_steps(lambda x: jnp.max(jnp.maximum(x, 1), 1), EXTREMES)(x).tolist() == [5, 2]


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_gradients_are_found_however_often_a_compiler_computes_the_operand(name: str, axis: Any) -> None:
    """JAX's own were infinite in most of these, under the compiler's options that tests run with."""
    reduce = getattr(jnp, name)

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        return reduce((jnp.tanh(x * weights[0] + weights[1]) * weights[2] - 0.1) * weights[3] + weights[0], axis).sum()

    for seed in range(5):
        generator = np.random.default_rng(seed)
        x = jnp.asarray(generator.normal(size=(5, 38, 7)), jnp.float32)
        weights = [jnp.asarray(generator.normal(size=7) + 1, jnp.float32) for _ in range(4)]
        found = jax.jit(jax.grad(rewrite_steps(loss, EXTREMES)))(weights, x)
        with jax.disable_jit():  # computes every step once
            expected = jax.grad(loss)(weights, x)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# Long sums


SHAPES = {
    "one axis": ((1001,), (0,)),
    "the last axes": ((2, 3, 24, 14, 3), (2, 3, 4)),
    "axes apart": ((3, 7, 11, 5, 3), (1, 2, 4)),
    "many columns": ((300, 80), (0,)),
    "a small feature map": ((2, 10, 10, 4), (1, 2)),
    "all of a small feature map": ((2, 12, 3, 3), (1, 2, 3)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", SHAPES)
def test_long_sums_are_right(case: str) -> None:
    shape, axes = SHAPES[case]
    x = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    ours = total(jnp.asarray(x), axes=axes)
    assert primitives(lambda x: total(x, axes=axes), x)["add"] >= 4
    np.testing.assert_allclose(ours, x.sum(axes, dtype=np.float64), rtol=3e-7)
    slope = jax.grad(lambda x: total(x, axes=axes).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(slope, jnp.ones_like(x))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((31, 9), "float32"), ((100,), "float32"), ((300,), "int32"), ((), "float32")]
)
def test_other_sums_are_left_to_xla(shape: tuple[int, ...], dtype: str) -> None:
    x = jnp.ones(shape, dtype)
    axes = tuple(range(x.ndim))[:1]
    assert primitives(lambda x: total(x, axes=axes), x)["add"] == 0
    np.testing.assert_array_equal(total(x, axes=axes), jnp.sum(x, axes))


def test_a_small_feature_map_adds_up_to_no_less_than_it_holds() -> None:
    """Equal numbers that XLA adds one by one round the same way each time, for example at the edge of a convolution."""
    squares = jnp.full((10, 10, 4), 0.1488**2, jnp.float32)
    exact = 100 * float(squares[0, 0, 0])
    one_by_one = jax.jit(lambda x: lax.reduce_sum(x, (0, 1)))(squares)
    ours = jax.jit(lambda x: total(x, axes=(0, 1)))(squares)
    assert abs(ours / exact - 1).max() < 1e-7 < 3e-7 < abs(one_by_one / exact - 1).max()


# At the edges


def test_there_are_gradients_of_nothing_and_of_nan() -> None:
    largest = rewrite_steps(lambda x: jnp.max(x, 1), EXTREMES)
    assert jax.grad(lambda x: largest(x).sum())(jnp.zeros((0, 4))).shape == (0, 4)
    slopes = jax.grad(lambda x: largest(x).sum())(jnp.array([[1.0, jnp.nan, 2.0], [1.0, 0.0, 2.0]]))
    assert np.isnan(slopes[0]).all()
    assert slopes[1].tolist() == [0, 0, 1]


def test_second_derivatives_are_jaxs() -> None:
    x = jnp.array([[0.3, -0.2, 0.5], [0.1, 0.1, -0.4]])
    both = lambda x: (jnp.max(x**3, 1) * jnp.maximum(x[:, 0] ** 2, x[:, 1])).sum()  # noqa: E731
    np.testing.assert_allclose(jax.hessian(rewrite_steps(both, EXTREMES))(x), jax.hessian(both)(x), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(dtype: str) -> None:
    x = jnp.array([[1.0, 3.0, 3.0]], dtype)
    slope = jax.grad(lambda x: rewrite_steps(lambda x: jnp.max(jnp.clip(x, 0, 4), 1), EXTREMES)(x).sum())(x)
    assert slope.dtype == dtype
    assert slope.tolist() == [[0, 0.5, 0.5]]


def test_a_variance_of_few_rows_rounds_no_further_than_pytorchs() -> None:
    """XLA adds these squares one by one, which is off by 7e-7; so a LayerNorm of a feature map failed the proof."""
    x = np.repeat(np.random.default_rng(0).normal(size=(3, 252)), 4, axis=1).astype(np.float32)
    variance = lambda x: jnp.mean((x - jnp.mean(x, 1, keepdims=True)) ** 2, 1)  # noqa: E731
    ours = np.asarray(jax.jit(use_forms(variance, "cpu", "all members"))(x), np.float64)
    np.testing.assert_allclose(ours, x.astype(np.float64).var(1), rtol=2.5e-7)
