"""Two as a Flax module."""

import jax.numpy as jnp
from flax import nnx


class Two(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.zeros(()))

    def __call__(self, inputs):
        pair_0 = inputs[0]
        pair_1 = inputs[1]
        pair_1 = pair_0 + pair_1 * self.scale
        pair_0 = pair_0.astype(jnp.bfloat16)
        return {"sum": pair_1, "half": pair_0}
