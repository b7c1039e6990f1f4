"""ConvNeXt as a Flax module."""

import jax.numpy as jnp
from flax import nnx


def identity(x):
    return x


class Sequential(nnx.List):
    """Layers that are called one after the other."""

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


def gelu(x):
    return nnx.gelu(x, approximate=False)


class CNBlock(nnx.Module):
    def __init__(self, features, *, rngs: nnx.Rngs):
        self.block = Sequential(
            [
                nnx.Conv(features, features, (7, 7), padding=3, feature_group_count=features, rngs=rngs),
                identity,
                nnx.LayerNorm(features, use_fast_variance=False, rngs=rngs),
                nnx.Linear(features, 4 * features, rngs=rngs),
                gelu,
                nnx.Linear(4 * features, features, rngs=rngs),
            ]
        )
        self.layer_scale = nnx.Param(jnp.zeros((features,)))

    def __call__(self, x):
        return self.layer_scale * self.block(x) + x


class ConvNeXt(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.features = Sequential(
            [
                Sequential(
                    [
                        nnx.Conv(3, 96, (4, 4), strides=4, padding="VALID", rngs=rngs),
                        nnx.LayerNorm(96, use_fast_variance=False, rngs=rngs),
                    ]
                ),
                Sequential([CNBlock(96, rngs=rngs) for _ in range(3)]),
                Sequential(
                    [
                        nnx.LayerNorm(96, use_fast_variance=False, rngs=rngs),
                        nnx.Conv(96, 192, (2, 2), strides=2, padding="VALID", rngs=rngs),
                    ]
                ),
                Sequential([CNBlock(192, rngs=rngs) for _ in range(3)]),
                Sequential(
                    [
                        nnx.LayerNorm(192, use_fast_variance=False, rngs=rngs),
                        nnx.Conv(192, 384, (2, 2), strides=2, padding="VALID", rngs=rngs),
                    ]
                ),
                Sequential([CNBlock(384, rngs=rngs) for _ in range(9)]),
                Sequential(
                    [
                        nnx.LayerNorm(384, use_fast_variance=False, rngs=rngs),
                        nnx.Conv(384, 768, (2, 2), strides=2, padding="VALID", rngs=rngs),
                    ]
                ),
                Sequential([CNBlock(768, rngs=rngs) for _ in range(3)]),
            ]
        )
        self.classifier = Sequential(
            [nnx.LayerNorm(768, use_fast_variance=False, rngs=rngs), identity, nnx.Linear(768, 1000, rngs=rngs)]
        )

    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 3, 1))
        x = jnp.mean(self.features(x), (1, 2))
        return self.classifier(x)
