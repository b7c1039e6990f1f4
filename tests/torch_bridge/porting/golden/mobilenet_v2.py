"""MobileNetV2 as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jaxensemble import layers


class Sequential(nnx.List):
    """Layers that are called one after the other."""

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


class Conv2dNormActivation(nnx.List):
    def __init__(self, in_features, out_features, kernel_size, strides=1, feature_group_count=1, *, rngs: nnx.Rngs):
        super().__init__(
            [
                nnx.Conv(
                    in_features,
                    out_features,
                    kernel_size,
                    strides=strides,
                    padding=kernel_size[0] // 2,
                    feature_group_count=feature_group_count,
                    use_bias=False,
                    rngs=rngs,
                ),
                layers.BatchNorm(out_features, rngs=rngs),
                nnx.relu6,
            ]
        )

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


class InvertedResidual2(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = Sequential(
            [
                Conv2dNormActivation(32, 32, (3, 3), feature_group_count=32, rngs=rngs),
                nnx.Conv(32, 16, (1, 1), use_bias=False, rngs=rngs),
                layers.BatchNorm(16, rngs=rngs),
            ]
        )

    def __call__(self, x):
        return self.conv(x)


class InvertedResidual(nnx.Module):
    def __init__(self, in_features, out_features, strides=1, *, rngs: nnx.Rngs):
        self.conv = Sequential(
            [
                Conv2dNormActivation(in_features, 6 * in_features, (1, 1), rngs=rngs),
                Conv2dNormActivation(
                    6 * in_features,
                    6 * in_features,
                    (3, 3),
                    strides=strides,
                    feature_group_count=6 * in_features,
                    rngs=rngs,
                ),
                nnx.Conv(6 * in_features, out_features, (1, 1), use_bias=False, rngs=rngs),
                layers.BatchNorm(out_features, rngs=rngs),
            ]
        )
        self.residual = in_features == out_features

    def __call__(self, x):
        conv = self.conv(x)
        return x + conv if self.residual else conv


class MobileNetV2(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.features = Sequential(
            [
                Conv2dNormActivation(3, 32, (3, 3), strides=2, rngs=rngs),
                InvertedResidual2(rngs=rngs),
                InvertedResidual(16, 24, strides=2, rngs=rngs),
                InvertedResidual(24, 24, rngs=rngs),
                InvertedResidual(24, 32, strides=2, rngs=rngs),
                InvertedResidual(32, 32, rngs=rngs),
                InvertedResidual(32, 32, rngs=rngs),
                InvertedResidual(32, 64, strides=2, rngs=rngs),
                *[InvertedResidual(64, 64, rngs=rngs) for _ in range(3)],
                InvertedResidual(64, 96, rngs=rngs),
                InvertedResidual(96, 96, rngs=rngs),
                InvertedResidual(96, 96, rngs=rngs),
                InvertedResidual(96, 160, strides=2, rngs=rngs),
                InvertedResidual(160, 160, rngs=rngs),
                InvertedResidual(160, 160, rngs=rngs),
                InvertedResidual(160, 320, rngs=rngs),
                Conv2dNormActivation(320, 1280, (1, 1), rngs=rngs),
            ]
        )
        self.classifier = Sequential([nnx.Dropout(0.2, rngs=rngs), nnx.Linear(1280, 1000, rngs=rngs)])

    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 3, 1))
        x = jnp.mean(self.features(x), axis=(1, 2))
        return self.classifier(x)
