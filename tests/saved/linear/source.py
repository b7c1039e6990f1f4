"""Linear as a Flax module."""

import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jnp.zeros((3, 2)))
        self.bias = nnx.Param(jnp.zeros((2,)))

    def __call__(self, input):
        return input @ self.weight + self.bias
