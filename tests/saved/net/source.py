"""Net as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jaxensemble import layers


class Linear(nnx.Module):
    def __init__(self):
        self.bias = nnx.Param(jnp.zeros((4,)))


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 3, (2, 2), padding="VALID", rngs=rngs)
        self.bn = layers.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(12, 4, use_bias=False, rngs=rngs)
        self.tied = Linear()
        self.mask = layers.Buffer(jnp.zeros((4,)))
        self.shift = layers.Buffer(jnp.zeros((4,)))
        self.constant = layers.Constant(jnp.zeros((4,)))

    def __call__(self, x):
        x = x.reshape(-1, 3, 3, 1)
        x = nnx.relu(self.bn(self.conv(x)))
        x = self.drop(x)
        x = x.reshape(x.shape[0], -1)
        x = self.fc(x) + (x @ self.fc.kernel + self.tied.bias) * self.constant
        return nnx.softmax(x + self.shift + self.mask)
