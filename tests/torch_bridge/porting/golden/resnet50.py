"""ResNet as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jaxensemble import layers


class Sequential(nnx.List):
    """Layers that are called one after the other."""

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


class Bottleneck(nnx.Module):
    def __init__(self, in_features, out_features, strides=1, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(in_features, out_features, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(out_features, rngs=rngs)
        self.conv2 = nnx.Conv(out_features, out_features, (3, 3), strides=strides, padding=1, use_bias=False, rngs=rngs)
        self.bn2 = layers.BatchNorm(out_features, rngs=rngs)
        self.conv3 = nnx.Conv(out_features, 4 * out_features, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = layers.BatchNorm(4 * out_features, rngs=rngs)
        if in_features != 4 * out_features:
            self.downsample = Sequential(
                [
                    nnx.Conv(in_features, 4 * out_features, (1, 1), strides=strides, use_bias=False, rngs=rngs),
                    layers.BatchNorm(4 * out_features, rngs=rngs),
                ]
            )
        else:
            self.downsample = None

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return nnx.relu(y + x)


class ResNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(64, rngs=rngs)
        self.layer1 = Sequential(
            [Bottleneck(64, 64, rngs=rngs), Bottleneck(256, 64, rngs=rngs), Bottleneck(256, 64, rngs=rngs)]
        )
        self.layer2 = Sequential(
            [Bottleneck(256, 128, strides=2, rngs=rngs), *[Bottleneck(512, 128, rngs=rngs) for _ in range(3)]]
        )
        self.layer3 = Sequential(
            [Bottleneck(512, 256, strides=2, rngs=rngs), *[Bottleneck(1024, 256, rngs=rngs) for _ in range(5)]]
        )
        self.layer4 = Sequential(
            [
                Bottleneck(1024, 512, strides=2, rngs=rngs),
                Bottleneck(2048, 512, rngs=rngs),
                Bottleneck(2048, 512, rngs=rngs),
            ]
        )
        self.fc = nnx.Linear(2048, 1000, rngs=rngs)

    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 3, 1))
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = jnp.mean(self.layer4(x), (1, 2))
        return self.fc(x)
