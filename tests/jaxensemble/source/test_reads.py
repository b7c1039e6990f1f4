"""The source of a network: it reads as written by hand."""

import pytest

from jaxensemble.source import print_source
from tests.helpers.networks.cases import CASES
from tests.helpers.networks.plain import recurrent, variables
from tests.helpers.sketch import Sketch, X

LENET = '''\
"""LeNet as a Flax module."""

from flax import nnx


class LeNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(4, 8, (3, 3), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(32, 16, rngs=rngs)
        self.fc2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv1(x))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.fc1(x))
        return self.fc2(x)
'''


BASIC_BLOCK = """\
class BasicBlock(nnx.Module):
    def __init__(self, in_features, out_features, strides=1, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(in_features, out_features, (3, 3), strides=strides, padding=1, use_bias=False, rngs=rngs)
        self.bn1 = nnx.LayerNorm(out_features, rngs=rngs)
        self.conv2 = nnx.Conv(out_features, out_features, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn2 = nnx.LayerNorm(out_features, rngs=rngs)
        if in_features != out_features:
            self.downsample = Sequential(
                [
                    nnx.Conv(in_features, out_features, (1, 1), strides=strides, use_bias=False, rngs=rngs),
                    nnx.LayerNorm(out_features, rngs=rngs),
                ]
            )
        else:
            self.downsample = None
"""


BASIC_BLOCK_CALL = """\
    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return nnx.relu(y + x)
"""


RESNET_LAYERS = """\
        self.layer1 = Sequential([BasicBlock(4, 4, rngs=rngs) for _ in range(3)])
        self.layer2 = Sequential(
            [BasicBlock(4, 8, strides=2, rngs=rngs), BasicBlock(8, 8, rngs=rngs), BasicBlock(8, 8, rngs=rngs)]
        )
"""


BLOCK_LIST = """\
def gate(x):
    return jnp.tanh(nnx.sigmoid(x) * x)


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, mask):
        return gate(self.fc(x) * mask) + x


class Blocks(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(3)])

    def __call__(self, x, mask):
        y = x
        for block in self.blocks:
            y = block(y, mask)
        return y + x
"""


SEQUENTIAL = """\
class Sequential(nnx.List):
    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(
            [
                nnx.Linear(4, 5, rngs=rngs),
                nnx.relu,
                Chain([nnx.Linear(5, 6, rngs=rngs), identity, leaky_relu, nnx.Linear(6, 3, rngs=rngs)]),
            ]
        )

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x
"""


CONVOLUTIONAL_SEQUENTIAL = """\
def flatten(x):
    return x.reshape(x.shape[0], -1)


class Sequential(nnx.List):
    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(
            [
                nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs),
                nnx.relu,
                flatten,
                nnx.Linear(36, 6, rngs=rngs),
"""


WIDE = """\
class Block(nnx.Module):
    def __init__(self, out_features, axis, flip, *, rngs: nnx.Rngs):
        self.grow = nnx.Linear(4, out_features, rngs=rngs)
        self.shrink = nnx.Linear(out_features, 4, rngs=rngs)
        self.axis = axis
        self.flip = flip

    def __call__(self, x):
        x = self.grow(x)
        return jnp.flip(jnp.cumsum(self.shrink(x), axis=self.axis), self.flip)
"""


INVERTED = """\
class Inverted(nnx.Module):
    def __init__(self, in_features, out_features, strides=1, *, rngs: nnx.Rngs):
        self.conv = ConvNorm(in_features, strides=strides, rngs=rngs)
        self.project = nnx.Conv(2 * in_features, out_features, (1, 1), rngs=rngs)
        self.residual = in_features == out_features

    def __call__(self, x):
        conv = self.conv(x)
        conv = self.project(conv)
        return x + conv if self.residual else conv
"""


INVERTED_CALLS = """\
            [
                Inverted(4, 8, strides=2, rngs=rngs),
                Inverted(8, 8, rngs=rngs),
"""


KERNELS = """\
        self.conv = nnx.Conv(in_features, out_features, kernel_size, padding=kernel_size[0] // 2, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros((1, out_features)))
"""


DENSE = """\
        for i in range(1, 6):
            setattr(self, f"layer{i}", DenseLayer(1 + 3 * i, rngs=rngs))

    def __call__(self, x):
        for i in range(1, 6):
            x = jnp.concatenate([x, getattr(self, f"layer{i}")(x)], axis=-1)
        return x
"""


NUMBERED = """\
        self.layers = nnx.Dict({f"block_{i}": Block(rngs=rngs) for i in range(4)})
        for i in range(1, 5):
            setattr(self, f"block_{i}", Block(rngs=rngs))

    def __call__(self, x):
        for i in range(4):
            x = self.layers[f"block_{i}"](x)
        for i in range(1, 5):
            x = getattr(self, f"block_{i}")(x)
        return x
"""


NAMED_ALIKE = """\
        self.fc4 = nnx.Linear(4, 4, rngs=rngs)
        self.out1 = nnx.Linear(4, 4, rngs=rngs)
        self.out2 = nnx.Linear(4, 4, rngs=rngs)
        self.out3 = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.fc1(x))
"""


PARTS = """\
        q, k, v = jnp.unstack(self.qkv(x).reshape(-1, 3, 3, 4), axis=2)
        q = q.reshape(-1, 3, 2, 2)
        x = ops.attention(q, k.reshape(-1, 3, 2, 2), v.reshape(-1, 3, 2, 2))
        x, y = jnp.split(x.reshape(-1, 3, 4), 2, axis=-1)
        x = jnp.transpose(self.gate(x).reshape(-1, 3, 2, 2), (2, 0, 1, 3))
        x, z = jnp.unstack(x)
        return x * z + y
"""


PARTS_LEFT_OVER = """\
        y = jnp.split(x, 4, axis=-1)
        y = y[0] + y[2]
        z = x.reshape(2, 2, 2)
        z = z[0] + z[1] * jnp.sum(z)
"""


ARRANGED = """\
    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 1))
        x = self.first(x)
        x = jnp.transpose(self.second(x), (1, 0, 2)).reshape(-1, 4)
        return self.third(x) + x
"""


BRANCHES = """\
        branch3x3dbl = self.branch3x3dbl_1(x)
        branch3x3dbl = self.branch3x3dbl_2(branch3x3dbl)
        branch3x3dbl = self.branch3x3dbl_3(branch3x3dbl)
"""


BOTTLENECKS = """\
        self.grow = nnx.Linear(in_features, 4 * in_features, rngs=rngs)
        self.gate = nnx.Linear(4 * in_features, in_features // 2, rngs=rngs)
        self.out = nnx.Linear(in_features // 2, 8, rngs=rngs)
        self.in_features = in_features
        self.size = size
"""


ACTIVATIONS = """\
class LinearActivation(nnx.List):
    def __init__(self, activation=identity, activation2=identity, *, rngs: nnx.Rngs):
        super().__init__([nnx.Linear(4, 4, rngs=rngs), activation, nnx.Linear(4, 4, rngs=rngs), activation2])
"""


WINDOW = """\
class Window(nnx.Module):
    def __init__(self, roll=None, size=None, size2=None, roll2=None, *, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(4, 4, rngs=rngs)
        self.proj = nnx.Linear(4, 4, rngs=rngs)
        self.grow = nnx.Linear(4, 8, rngs=rngs)
        self.shrink = nnx.Linear(8, 4, rngs=rngs)
        self.mask = layers.Constant(jnp.zeros((8, 1))) if roll is not None else None
        self.transpose = size is not None
        self.roll = roll
        self.size = size
        self.size2 = size2
        self.roll2 = roll2

    def __call__(self, x):
        qkv = self.qkv(x)
        if self.mask is not None:
            qkv = jnp.roll(qkv, self.roll, axis=1)
        if self.transpose:
            qkv = jnp.transpose(qkv.reshape(-1, self.size, self.size2, 4), (0, 2, 1, 3))
        qkv = qkv.reshape(-1, 8, 4)
        if self.mask is not None:
            qkv = jnp.square(qkv + self.mask)
        qkv = self.proj(qkv)
        if self.mask is not None:
            qkv = jnp.roll(qkv, self.roll2, axis=1)
        qkv = nnx.relu(self.grow(qkv))
        return x + self.shrink(qkv)
"""


WINDOWS = """\
        self.block0 = Window(size=2, size2=4, rngs=rngs)
        self.block1 = Window(roll=-1, size=2, size2=4, roll2=1, rngs=rngs)
        self.block2 = Window(roll=-2, size=4, size2=2, roll2=2, rngs=rngs)
        self.block3 = Window(rngs=rngs)
"""


ENDS_EARLY = """\
class EndsEarly(nnx.Module):
    def __init__(self, tanh=False, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.tanh = tanh

    def __call__(self, x):
        x = jnp.sin(x)
        x = self.fc(x)
        if self.tanh:
            x = jnp.cos(jnp.tanh(x))
        return x
"""


MAPPINGS = """\
        self.heads = nnx.Dict(head=nnx.Linear(4, 4, rngs=rngs))
        self.features = Features(rngs=rngs)
        self.blocks = Sequential([Item(rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = nnx.relu(self.heads.head(x))
        x = self.features(x)
        return self.blocks(x)
"""


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("lenet", [LENET]),
        ("resnet", [BASIC_BLOCK, BASIC_BLOCK_CALL, RESNET_LAYERS]),
        ("block_list", [BLOCK_LIST]),
        ("sequential", [SEQUENTIAL]),
        ("convolutional_sequential", [CONVOLUTIONAL_SEQUENTIAL]),
        ("wide", [WIDE]),
        ("twice", ["        x = self.encoder(x)\n        return self.encoder(x)\n"]),
        ("attention_twice", ["    def __call__(self, x, y):\n"]),
        ("shared_elsewhere", ["self.encoder.block(", "self.decoder.out("]),
        ("residual_blocks", [INVERTED, INVERTED_CALLS]),
        ("kernels", [KERNELS, "self.block1 = Block(4, 8, (1, 1), rngs=rngs)"]),
        ("dense", [DENSE]),
        ("numbered", [NUMBERED]),
        ("numbered_oddly", ['self.layers[f"b-{i}"](x)', 'getattr(self, f"b-{i}")(x)']),
        ("named_alike", [NAMED_ALIKE]),
        ("parts", [PARTS]),
        ("parts_left_over", [PARTS_LEFT_OVER]),
        ("arranged", [ARRANGED]),
        ("branches", [BRANCHES]),
        ("bottlenecks", [BOTTLENECKS]),
        ("activations", [ACTIVATIONS, "self.block1 = LinearActivation(activation=nnx.relu, rngs=rngs)"]),
        ("functions", ["def __init__(self, function, *, rngs", "self.block1 = Chain(jnp.cos, rngs=rngs)"]),
        ("windows", [WINDOW, WINDOWS]),
        ("shortened_otherwise", [ENDS_EARLY, "class ReadLater2(", "class TakesTwo2(", "class GivesBoth2("]),
        ("called_mappings", [MAPPINGS, "class Features(", "class Item("]),
        ("kept_axes", ["jnp.mean(x, (1, 2), keepdims=True)", "jnp.expand_dims(jnp.sum(x, (1, 2)), (0, 1))"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_source_reads_as_written_by_hand(case: str, parts: list[str]) -> None:
    text = print_source(CASES[case][0]())
    for part in parts:
        assert part in text


def test_unused_calls_are_left_out() -> None:
    s = Sketch("Dead")
    s.call("jnp.tanh", s.call("nnx.relu", X))
    assert "tanh" not in print_source(s.network((X,), s.call("neg", X)))


def test_variable_kinds() -> None:
    text = print_source(variables())
    for line in (
        "self.scale = nnx.Param(jnp.zeros((4,)))",
        "self.table = layers.Constant(jnp.zeros((4,), jnp.int32))",
        "self.shift = layers.Buffer(jnp.zeros((4,)))",
        "jnp.maximum(self.scale * self.inner(x), self.scale[...])",
    ):
        assert line in text


def test_a_recurrent_layer_gives_an_output_and_a_state() -> None:
    text = print_source(recurrent())
    for line in (
        "y, (h, c) = self.both(x)",
        "_, (_, c) = self.cell(y)",
        "y, state = self.gru(c)",
        "y, state = self.whole(y)",
        "z, _ = self.last(x)",
    ):
        assert f"        {line}\n" in text, text


def test_a_factor_is_called_scale() -> None:
    s = Sketch("Net")
    y = X
    for k, factor in enumerate((0.1, 0.2)):
        with s.inside(f"block{k}", "Block"):
            y = s.call("*", s.linear(f"block{k}.fc", y, 4, 4), factor)
    text = print_source(s.network((X,), y))
    assert "def __init__(self, scale, *, rngs: nnx.Rngs):" in text, text
    assert "Block(0.2, rngs=rngs)" in text, text
