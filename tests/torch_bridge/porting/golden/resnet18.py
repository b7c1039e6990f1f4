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


class BasicBlock(nnx.Module):
    def __init__(self, in_features, out_features, strides=1, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(in_features, out_features, (3, 3), strides=strides, padding=1, use_bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(out_features, rngs=rngs)
        self.conv2 = nnx.Conv(out_features, out_features, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn2 = layers.BatchNorm(out_features, rngs=rngs)
        if in_features != out_features:
            self.downsample = Sequential(
                [
                    nnx.Conv(in_features, out_features, (1, 1), strides=strides, use_bias=False, rngs=rngs),
                    layers.BatchNorm(out_features, rngs=rngs),
                ]
            )
        else:
            self.downsample = None

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return nnx.relu(y + x)


class ResNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(64, rngs=rngs)
        self.layer1 = Sequential([BasicBlock(64, 64, rngs=rngs) for _ in range(2)])
        self.layer2 = Sequential([BasicBlock(64, 128, strides=2, rngs=rngs), BasicBlock(128, 128, rngs=rngs)])
        self.layer3 = Sequential([BasicBlock(128, 256, strides=2, rngs=rngs), BasicBlock(256, 256, rngs=rngs)])
        self.layer4 = Sequential([BasicBlock(256, 512, strides=2, rngs=rngs), BasicBlock(512, 512, rngs=rngs)])
        self.fc = nnx.Linear(512, 1000, rngs=rngs)

    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 3, 1))
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = jnp.mean(self.layer4(x), (1, 2))
        return self.fc(x)
