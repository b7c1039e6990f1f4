"""Scales and shifts folded into the kernels before them: the same numbers, and only where that is so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxensemble.programs.folding import fold_scales
from jaxensemble.programs.rewrite import primitives

N, IN, OUT = 2, 4, 6


def convolve(**options: Any) -> Callable[..., Any]:
    arguments = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lambda x, kernel: lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **arguments
    )


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def normalize(y: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    return (y - 0.5 * shift) * (scale / jnp.sqrt(scale**2 + 1e-5)) + shift


IMAGE, ROWS = (N, 5, 4, IN), (N, IN)
PRODUCTS = {
    "convolution": (convolve(), IMAGE, (3, 3, IN, OUT)),
    "groups": (convolve(feature_group_count=2), IMAGE, (3, 3, IN // 2, OUT)),
    "dilation": (convolve(rhs_dilation=(2, 1)), IMAGE, (3, 3, IN, OUT)),
    "transposed": (convolve(lhs_dilation=(2, 2), padding=((2, 1), (2, 1))), IMAGE, (3, 3, IN, OUT)),
    "product": (multiply, ROWS, (IN, OUT)),
}
STEPS: dict[str, Callable[..., Any]] = {
    "normalisation": normalize,
    "scalar": lambda y, scale, shift: y * 3.0 - 1.0,
    "scalar weight": lambda y, scale, shift: shift[0] + y * scale[0],
    "division": lambda y, scale, shift: y / jnp.sqrt(scale**2 + 1e-5),
    "division by a number": lambda y, scale, shift: y / -2.0,
    "power": lambda y, scale, shift: y * (scale**2 + 0.1) ** -1,
    "shift alone": lambda y, scale, shift: y - shift,
}
UNBOUNDED: dict[str, Callable[..., Any]] = {
    "no epsilon": lambda y, scale, shift: (y - shift) * (lax.rsqrt(scale**2 + 0.0) * 2.0) + shift,
    "division by a weight": lambda y, scale, shift: (y - shift) / scale,
    "reciprocal": lambda y, scale, shift: y * scale**-1,
    "power of a weight": lambda y, scale, shift: y * (scale**2) ** -0.5,
}
LEFT: dict[str, Callable[..., Any]] = UNBOUNDED | {
    "read twice": lambda y, scale, shift: y * scale + y,
    "times itself": lambda y, scale, shift: y * y,
    "wrong axis": lambda y, scale, shift: y * scale[:N].reshape(N, *[1] * (y.ndim - 1)),
    "depends on the input": lambda y, scale, shift: y * (1 + lax.stop_gradient(y).mean()),
}


def draw(shapes: Any, dtype: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape) + 0.1, dtype) for shape in shapes]


def with_steps(product: Callable[..., Any], steps: Callable[..., Any]) -> Callable[..., Any]:
    return lambda kernel, scale, shift, x: steps(product(x, kernel), scale, shift)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_folding_changes_rounding_alone(kind: str) -> None:
    product, x, kernel = PRODUCTS[kind]
    for name, steps in (STEPS | LEFT).items():
        function = with_steps(product, steps)
        folded = fold_scales(function, (0, 1, 2))
        with jax.enable_x64(True):
            arrays = draw((kernel, (OUT,), (OUT,), x), jnp.float64)
            exact, got = function(*arrays), folded(*arrays)
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-12 * np.abs(exact).max(), err_msg=name)
        narrow = [array.astype(np.float32) for array in map(np.asarray, arrays)]
        with jax.enable_x64(True):
            exact = np.asarray(function(*[jnp.asarray(array, jnp.float64) for array in narrow]))
        own, error = (np.abs(np.asarray(call(*narrow), np.float64) - exact).max() for call in (function, folded))
        assert error <= 2 * own + 1e-7 * np.abs(exact).max(), name


def test_what_is_folded() -> None:
    product, x, kernel = PRODUCTS["convolution"]
    shapes = (kernel, (OUT,), (OUT,), x)
    arithmetic = lambda function, arrays: {  # noqa: E731
        str(step.primitive): step.outvars[0].aval.shape
        for step in jax.make_jaxpr(function)(*arrays).eqns
        if step.outvars[0].aval.shape == (N, 5, 4, OUT)
    }
    for name, steps in STEPS.items():
        kept = arithmetic(fold_scales(with_steps(product, steps), (0, 1, 2)), draw(shapes, jnp.float32))
        assert not kept.keys() & {"mul", "div", "sub"}, name
    for name, steps in LEFT.items():
        function = with_steps(product, steps)
        arrays = draw(shapes, jnp.float32)
        assert arithmetic(fold_scales(function, (0, 1, 2)), arrays).keys() & {"mul", "div"}, name
    function = with_steps(product, normalize)
    assert "mul" in arithmetic(fold_scales(function, (1, 2)), draw(shapes, jnp.float32))  # a kernel that is no weight
    for dtype in (jnp.bfloat16, jnp.float16):
        arrays = draw(shapes, dtype)
        folded = fold_scales(function, (0, 1, 2))
        assert primitives(folded, *arrays)["mul"] == primitives(function, *arrays)["mul"]
        np.testing.assert_array_equal(folded(*arrays), function(*arrays))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_special_numbers_are_in_the_same_places(place: int, value: float) -> None:
    for kind in ("convolution", "product"):
        product, x, kernel = PRODUCTS[kind]
        function = with_steps(product, lambda y, scale, shift: (y - shift) * lax.rsqrt(scale**2 + 1e-5) + shift)
        arrays = draw((kernel, (OUT,), (OUT,), x), jnp.float32)
        arrays[place] = arrays[place].at[(0,) * arrays[place].ndim].set(value)
        expected, got = function(*arrays), fold_scales(function, (0, 1, 2))(*arrays)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_infinite_factors_make_no_nan(name: str) -> None:
    """The plain program gives infinity, although some inputs are zero, which an infinite kernel would make NaN."""
    for kind in ("convolution", "product"):
        product, x, kernel = PRODUCTS[kind]
        function = with_steps(product, UNBOUNDED[name])
        arrays = draw((kernel, (OUT,), (OUT,), x), jnp.float32)
        arrays[1] = arrays[1].at[2].set(0)
        arrays[3] = arrays[3].at[..., 0].set(0)
        expected, got = function(*arrays), fold_scales(function, (0, 1, 2))(*arrays)
        assert np.isinf(expected[..., 2]).all()
        np.testing.assert_allclose(got, expected, rtol=1e-5)
