"""Activations that `jax.nn` lacks, or whose gradient at a kink is not PyTorch's there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num


def leaky_relu(x: Num[ArrayLike, "*#shape"], negative_slope: Num[ArrayLike, "*#shape"] = 0.01) -> Num[Array, "*shape"]:
    """`x` where positive, else `negative_slope * x`; the gradient at 0 is `negative_slope`.

    `negative_slope` may be an array that broadcasts against `x`, which makes this a PReLU.

    >>> leaky_relu(jnp.array([-1.0, 2.0]), 0.1).tolist()
    [-0.10000000149011612, 2.0]
    """
    x = jnp.asarray(x)
    return jnp.where(x > 0, x, negative_slope * x)


def hard_tanh(x: Num[ArrayLike, "*shape"], min_value: float = -1.0, max_value: float = 1.0) -> Num[Array, "*shape"]:
    """`x` kept within bounds; the gradient at the bounds is 0.

    >>> hard_tanh(jnp.array([-3.0, 0.5, 3.0])).tolist()
    [-1.0, 0.5, 1.0]
    """
    x = jnp.asarray(x)
    return jnp.where(x <= min_value, min_value, jnp.where(x >= max_value, max_value, x))


def softplus(x: Num[ArrayLike, "*shape"], beta: float = 1.0, threshold: float = 20.0) -> Float[Array, "*shape"]:
    """`log(1 + exp(beta * x)) / beta`, and `x` itself where `beta * x` is above `threshold`.

    >>> softplus(jnp.array([0.0, 30.0])).tolist()
    [0.6931471824645996, 30.0]
    """
    x = jnp.asarray(x)
    linear = x * beta > threshold
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, 0, x) * beta)) / beta)


@jax.custom_jvp
def hard_sigmoid(x: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """`relu6(x + 3) / 6`, with the slope that PyTorch has in every dtype: a sixth, rounded to float32.

    >>> hard_sigmoid(jnp.array([-4.0, 0.0, 4.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return jax.nn.relu6(jnp.asarray(x) + 3) / 6


@hard_sigmoid.defjvp
def _hard_sigmoid_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    slope = float(np.float32(1) / np.float32(6))
    return hard_sigmoid(x), jnp.where((x > -3) & (x < 3), slope * tangent, jnp.zeros_like(tangent))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def celu(x: Num[ArrayLike, "*shape"], alpha: float = 1.0) -> Float[Array, "*shape"]:
    """`max(x, 0) + alpha * (exp(min(x, 0) / alpha) - 1)`, with PyTorch's gradient: there, `alpha` is a float32.

    `jax.nn.celu` is the same function wherever float32 holds `alpha` exactly.

    >>> celu(jnp.array([-1.0, 2.0]), 0.5).tolist()
    [-0.4323323667049408, 2.0]
    """
    return jax.nn.celu(x, alpha)


@celu.defjvp
def _celu_jvp(alpha: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    inverse = 1.0 / float(np.float32(alpha))
    slope = jnp.where(x > 0, 1, alpha * inverse * jnp.exp(jnp.minimum(x, 0) * inverse))
    return celu(x, alpha), slope * tangent
