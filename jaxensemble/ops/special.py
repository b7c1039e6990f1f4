"""Derivatives of the logarithm of the gamma function, as PyTorch computes them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxensemble.ops.annotations import AnyArray


@jax.custom_jvp
def digamma(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """The derivative of the logarithm of the gamma function; its own derivative is `polygamma(x, 1)`.

    >>> round(digamma(jnp.array(1.0)).item(), 4)
    -0.5772
    """
    return lax.digamma(x)


@digamma.defjvp
def _digamma_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return digamma(primals[0]), polygamma(primals[0], 1) * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def polygamma(x: Float[AnyArray, "*shape"], order: int) -> Float[Array, "*shape"]:
    """The derivative of `digamma` of this order.

    Source: `trigamma` and `calc_polygamma` in aten/src/ATen/native/Math.h, which is exact to 1e-9 for order 1.

    >>> round(polygamma(jnp.array(1.0), 1).item(), 4)
    1.6449
    """
    if order == 0:
        return digamma(x)
    if order == 1:
        return _trigamma(x)
    factor = jnp.exp(lax.lgamma(jnp.asarray(order + 1, x.dtype)))
    return (1 if order % 2 else -1) * factor * _zeta(order + 1, x)


@polygamma.defjvp
def _polygamma_jvp(order: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return polygamma(primals[0], order), polygamma(primals[0], order + 1) * tangents[0]


def _zeta(power: int, x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """The sum of `(x + k) ** -power`, the terms that are not positive one by one; NaN where these are too many."""

    def step(state: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        count, total, x = state
        low = x <= 0
        return count + 1, total + jnp.where(low, x**-power, 0), jnp.where(low, x + 1, x)

    start = (0, jnp.zeros_like(x), x)
    _, total, x = lax.while_loop(lambda state: jnp.any(state[2] <= 0) & (state[0] < 4096), step, start)
    rest = lax.zeta(jnp.full_like(x, power), jnp.where(x > 0, x, 1))
    return jnp.where(x > 0, total + rest, jnp.nan)


def _trigamma(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    mirrored = x < 0.5
    start = jnp.where(mirrored, -((math.pi / jnp.sin(math.pi * x)) ** 2), 0)
    x = jnp.where(mirrored, 1 - x, x)
    for _ in range(6):
        start, x = start + 1 / (x * x), x + 1
    square = 1 / (x * x)
    total = start + (1 + 1 / (2 * x) + square * (1 / 6 - square * (1 / 30 - square * (1 / 42)))) / x
    return jnp.where(mirrored, -total, total)
