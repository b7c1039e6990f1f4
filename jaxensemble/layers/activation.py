"""Activations that hold weights or draw random numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxensemble.layers.dropout import draw_key
from jaxensemble.ops.activations import leaky_relu
from jaxensemble.ops.annotations import AnyArray


class PReLU(nnx.Module):
    """`x` where positive, else `negative_slope * x`, with a trained slope for each feature, or one for all.

    `nnx.PReLU` has one slope only. The slopes are along `axis`.

    >>> layer = PReLU(2)
    >>> layer(jnp.array([[-4.0, 4.0]])).tolist()
    [[-1.0, 4.0]]
    """

    def __init__(
        self,
        num_parameters: int = 1,
        *,
        axis: int = -1,
        negative_slope_init: float = 0.25,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.negative_slope = nnx.Param(jnp.full((num_parameters,), negative_slope_init, param_dtype))
        self.num_parameters = num_parameters
        self.axis = axis

    def __call__(self, x: Num[AnyArray, "*shape"]) -> Num[Array, "*shape"]:
        slope = self.negative_slope[...]
        if self.num_parameters == 1:
            return leaky_relu(x, slope[0])
        shape = [1] * x.ndim
        shape[self.axis] = self.num_parameters
        return leaky_relu(x, slope.reshape(shape))


class RReLU(nnx.Module):
    """`x` where positive, else `slope * x`, with a slope drawn for each element from `[lower, upper)`.

    With `deterministic`, which `nnx.Module.eval` sets, the slope is the middle of the two.

    >>> layer = RReLU(0.0, 0.5, deterministic=True)
    >>> layer(jnp.array([-4.0, 4.0])).tolist()
    [-1.0, 4.0]
    """

    def __init__(
        self,
        lower: float = 1 / 8,
        upper: float = 1 / 3,
        *,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | None = None,
    ):
        self.lower = lower
        self.upper = upper
        self.deterministic = deterministic
        self.rngs = nnx.data(None) if rngs is None else rngs[rng_collection].fork()

    def __call__(self, x: Float[AnyArray, "*shape"], *, deterministic: bool | None = None) -> Float[Array, "*shape"]:
        if self.deterministic if deterministic is None else deterministic:
            return leaky_relu(x, (self.lower + self.upper) / 2)
        slope = jax.random.uniform(draw_key(self.rngs), x.shape, x.dtype, self.lower, self.upper)
        return leaky_relu(x, slope)
