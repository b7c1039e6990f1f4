"""Elementary functions in their forms for CPUs, compared with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxensemble.programs.cpu.tanh import tanh


def test_tanh_is_right_to_the_last_bits() -> None:
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.uniform(-side, side, 10_000) for side in (12, 0.7, 1e-3)]).astype(np.float32)
    truth = np.tanh(x.astype(np.float64))
    error = np.abs(np.asarray(jax.jit(tanh)(x), np.float64) - truth) / np.spacing(np.abs(truth).astype(np.float32))
    assert error.max() < 1.5
    assert np.sqrt(np.mean(error**2)) < 0.35


def test_ends_signs_and_slopes_of_tanh() -> None:
    x = jnp.array([-jnp.inf, -100, -0.0, 0.0, 1e-30, 100, jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(tanh(x), lax.tanh(x))
    np.testing.assert_array_equal(jnp.signbit(tanh(x)), jnp.signbit(lax.tanh(x)))
    for at in (-200.0, -1.0, 0.0, 0.625, 3.0):
        assert jax.grad(tanh)(jnp.float32(at)) == pytest.approx(1 - np.tanh(at) ** 2, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_precisions_are_left_to_xla(dtype: str, x64: None) -> None:
    x = jnp.linspace(-3, 3, 50).astype(dtype)
    np.testing.assert_array_equal(tanh(x), lax.tanh(x))
