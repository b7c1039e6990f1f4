"""Small networks, one for each feature of printed source."""

from typing import Any

from jaxensemble.network.network import Dtype, Func, Network, Ref, Slice
from tests.helpers.sketch import Sketch, X


def lenet() -> Network:
    s = Sketch("LeNet")
    y = s.call("nnx.relu", s.conv("conv1", X, 1, 4, padding="VALID"))
    y = s.call("nnx.relu", s.conv("conv2", y, 4, 8, padding="VALID"))
    y = s.call("nnx.max_pool", y, (2, 2), strides=(2, 2))
    y = s.call(".reshape", y, s.call(".shape", y, 0), -1)
    y = s.call("nnx.relu", s.linear("fc1", y, 32, 16))
    return s.network((X,), s.linear("fc2", y, 16, 10))


def residual_block(s: Sketch, path: str, x: Ref, inputs: int, outputs: int, stride: int) -> Ref:
    strides: dict[str, Any] = {"strides": (stride, stride)} if stride > 1 else {}
    with s.inside(path, "BasicBlock"):
        y = s.conv(f"{path}.conv1", x, inputs, outputs, padding=1, use_bias=False, **strides)
        with s.inside(f"{path}.relu", "ReLU"):
            y = s.call("nnx.relu", s.norm(f"{path}.bn1", y, outputs))
        y = s.norm(f"{path}.bn2", s.conv(f"{path}.conv2", y, outputs, outputs, padding=1, use_bias=False), outputs)
        if inputs != outputs:
            with s.inside(f"{path}.downsample", "Sequential", "sequence"):
                x = s.conv(f"{path}.downsample.0", x, inputs, outputs, 1, use_bias=False, **strides)
                x = s.norm(f"{path}.downsample.1", x, outputs)
        with s.inside(f"{path}.relu", "ReLU"):
            return s.call("nnx.relu", s.call("+", y, x))


def resnet() -> Network:
    s = Sketch("ResNet")
    y = s.call("nnx.relu", s.norm("bn1", s.conv("conv1", X, 3, 4, 5, padding=2), 4))
    width = 4
    for stage, outputs in enumerate((4, 8), start=1):
        with s.inside(f"layer{stage}", "Sequential", "sequence"):
            for k in range(3):
                y = residual_block(s, f"layer{stage}.{k}", y, width, outputs, 2 if outputs != width else 1)
                width = outputs
    y = s.call("jnp.mean", y, (1, 2))
    return s.network((X,), s.linear("fc", y, 8, 10))


def sequential() -> Network:
    s = Sketch("Sequential", "sequence")
    y = s.linear("0", X, 4, 5)
    with s.inside("1", "ReLU"):
        y = s.call("nnx.relu", y)
    with s.inside("2", "Sequential", "sequence"):
        y = s.linear("2.0", y, 5, 6)
        with s.inside("2.2", "LeakyReLU"):
            y = s.call("nnx.leaky_relu", y, 0.2)
        y = s.linear("2.3", y, 6, 3)
    return s.network((X,), y)


def convolutional_sequential() -> Network:
    """A chain with steps before and after it, and a step between that belongs to no child."""
    s = Sketch("Sequential", "sequence")
    y = s.conv("0", s.call("jnp.transpose", X, (0, 2, 3, 1)), 2, 4, padding=1)
    with s.inside("1", "ReLU", "function"):
        y = s.call("nnx.relu", y)
    y = s.call(".reshape", y, s.call(".shape", y, 0), -1)
    y = s.linear("3", y, 36, 6)
    with s.inside("4", "Sequential", "sequence"):
        y = s.linear("4.0", y, 6, 6)
        y = s.call("jnp.square", s.linear("4.1", y, 6, 6))
    return s.network((X,), s.call("jnp.transpose", y))


def irregular_sequential() -> Network:
    s = Sketch("Skipping", "sequence")
    y = s.linear("0", X, 4, 4)
    with s.inside("1", "ReLU"):
        y = s.call("nnx.relu", y)
    return s.network((X,), s.call("+", s.linear("3", y, 4, 4), y))


def twice() -> Network:
    s = Sketch("Twice")
    y = X
    for _ in range(2):
        with s.inside("encoder", "Encoder"):
            y = s.call("nnx.relu", s.linear("encoder.fc", y, 4, 4))
    return s.network((X,), y)


def twice_differently() -> Network:
    s = Sketch("Twice")
    with s.inside("encoder", "Encoder"):
        y = s.call("nnx.relu", s.linear("encoder.fc", X, 4, 4))
    with s.inside("encoder", "Encoder"):
        y = s.call("jnp.tanh", s.linear("encoder.fc", y, 4, 4))
    return s.network((X,), y)


def attention_twice() -> Network:
    """A module called with three equal values, then with two different ones."""
    s = Sketch("Cross")
    y = X
    for other in (X, Ref("memory")):
        with s.inside("attend", "Attend"):
            scores = s.call("@", s.linear("attend.q", y, 4, 4), s.call("jnp.transpose", other))
            y = s.call("@", s.call("jax.nn.softmax", scores, axis=-1), other)
    return s.network((X, Ref("memory")), y)


def interleaved() -> Network:
    """Two modules whose steps alternate."""
    s = Sketch("Interleaved")
    with s.inside("a", "A"):
        one = s.linear("a.fc", X, 4, 4)
    with s.inside("b", "B"):
        two = s.linear("b.fc", one, 4, 4)
    s.times.clear()
    with s.inside("a", "A"):
        return s.network((X,), s.call("nnx.relu", two))


def shared_elsewhere() -> Network:
    """A module that calls a layer of another module."""
    s = Sketch("Shared")
    with s.inside("encoder", "Encoder"), s.inside("encoder.block", "Block"):
        y = s.call("nnx.relu", s.linear("encoder.block.fc", X, 4, 4))
    with s.inside("decoder", "Decoder"):
        y = s.linear("decoder.out", y, 4, 4)
        with s.inside("encoder.block", "Block"):
            y = s.call("nnx.relu", s.linear("encoder.block.fc", y, 4, 4))
    return s.network((X,), y)


def block_list() -> Network:
    s = Sketch("Blocks")
    s.module("blocks", "ModuleList", "sequence")
    y = X
    for k in range(3):
        with s.inside(f"blocks.{k}", "Block"):
            h = s.call("*", s.linear(f"blocks.{k}.fc", y, 4, 4), Ref("mask"))
            with s.inside(f"blocks.{k}.act", "Gate"):
                h = s.call("jnp.tanh", s.call("*", s.call("nnx.sigmoid", h), h))
            y = s.call("+", h, y)
    return s.network((X, Ref("mask")), s.call("+", y, X))


def mapping() -> Network:
    s = Sketch("Choices")
    s.module("acts", "ModuleDict", "mapping")
    one = s.linear("acts.left", X, 4, 4)
    two = s.linear("acts.keys", X, 4, 4)
    return s.network((X,), {"left": one, "both": (one, two)})


def trees() -> Network:
    s = Sketch("Trees")
    h, c, m = Ref("h"), Ref("c"), Ref("m")
    y = s.call("+", s.call("*", X, h), c)
    return s.network((X, (h, [c]), {"mask": m, "none": None}), {"y": y, "rest": [(h, None), s.call("neg", m)]})


def variables() -> Network:
    s = Sketch("Variables")
    scale, table = s.variable("scale", (4,)), s.variable("table", (4,), "constant", "int32")
    with s.inside("inner", "Shift"):
        y = s.call("+", X, s.variable("inner.shift", (4,), "buffer"))
    y = s.call("jnp.maximum", s.call("*", scale, y), scale)
    y = s.call("jnp.where", s.call(">", table, 0), y, s.call("-", 1.5, scale))
    return s.network((X,), s.call("+", y, s.call(".shape", scale, 0)))


def odd_names() -> Network:
    s = Sketch("Odd")
    with s.inside("class", "def"):
        y = s.linear("class.0", X, 4, 4)
        y = s.linear("class.my-block", y, 4, 4)
    y = s.linear('x"); print("hi', y, 4, 4)
    y = s.linear("ﬁ", y, 4, 4)
    y = s.linear("__hidden", y, 4, 4)
    return s.network((X,), s.linear("match", y, 4, 4))


def constants() -> Network:
    s = Sketch("Constants")
    y = s.call("jnp.clip", X, -0.0, float("inf"))
    y = s.call("jnp.where", s.call("==", y, float("inf")), float("nan"), s.call("**", y, -2))
    y = s.call("**", -1.5, s.call(".astype", s.call("jnp.nan_to_num", y, neginf=float("-inf")), Dtype("int32")))
    y = s.call("*", s.call("jnp.real", s.call("*", y, complex(1, -0.0))), 10**9)
    y = s.call("jnp.expand_dims", s.call("[]", y, (Slice(), None, Slice(1, None, 2))), (0,))
    y = s.call("[]", s.call("[]", y, 0), (..., Slice(None, s.call(".shape", X, 0))))
    return s.network((X,), s.call("jnp.sum", y, 1))


def several_results() -> Network:
    s = Sketch("Several")
    h = y = X
    for _ in range(2):
        with s.inside("cell", "Cell"):
            h = s.call("jnp.tanh", s.linear("cell.fc", h, 4, 4))
            y = s.call("*", h, 2)
    return s.network((X,), (h, y))


def parts() -> Network:
    """Attention over parts of one projection, and halves of its result."""
    s = Sketch("Parts")
    y = s.call(".reshape", s.linear("qkv", X, 4, 12), -1, 3, 3, 4)
    q, k, v = (s.call("[]", y, (Slice(), Slice(), part)) for part in range(3))
    heads = (s.call(".reshape", part, -1, 3, 2, 2) for part in (q, k, v))
    y = s.call(".reshape", s.call("ops.attention", *heads), -1, 3, 4)
    y = s.call("jnp.split", y, 2, axis=-1)
    one, two = s.call("[]", y, 0), s.call("[]", y, 1)
    y = s.call("jnp.transpose", s.call(".reshape", s.linear("gate", one, 2, 4), -1, 3, 2, 2), (2, 0, 1, 3))
    up, down = s.call("[]", y, 1), s.call("[]", y, 0)
    return s.network((X,), s.call("+", s.call("*", down, up), two))


def parts_left_over() -> Network:
    """Parts that cannot be unpacked: read twice, elsewhere, in part, or as a whole too."""
    s = Sketch("Rest")
    whole = s.call("jnp.split", X, 4, axis=-1)
    one = s.call("+", s.call("[]", whole, 0), s.call("[]", whole, 2))
    rows = s.call(".reshape", X, 2, 2, 2)
    two = s.call("+", s.call("[]", rows, 0), s.call("*", s.call("[]", rows, 1), s.call("jnp.sum", rows)))
    with s.inside("inner", "Inner"):
        halves = s.call("jnp.split", X, 2, axis=-1)
        left = s.linear("inner.fc", s.call("[]", halves, 0), 2, 1)
    return s.network((X,), (s.call("*", s.call("+", one, left), s.call("[]", halves, 1)), two))


def arranged() -> Network:
    """A module that first rearranges a shared value, and two equal ones, of which one takes the network's input."""
    s = Sketch("Arranged")
    with s.inside("first", "Project"):
        y = s.linear("first.fc", s.call("jnp.transpose", X, (0, 2, 1)), 4, 4)
    with s.inside("second", "Project"):
        y = s.linear("second.fc", y, 4, 4)
    with s.inside("third", "Mix"):
        rows = s.call(".reshape", s.call("jnp.transpose", y, (1, 0, 2)), -1, 4)
        y = s.linear("third.fc", rows, 4, 4)
    return s.network((X,), s.call("+", y, rows))


def branches() -> Network:
    s = Sketch("Branches")
    found = []
    for name in ("branch3x3dbl", "branch7x7"):
        y = X
        for k in range(1, 4):
            y = s.linear(f"{name}_{k}", y, 4, 4)
        found.append(y)
    return s.network((X,), s.call("jnp.concatenate", [*found, X], axis=-1))


def recurrent() -> Network:
    """Recurrent layers whose output and state are read in every possible way."""
    s = Sketch("Recurrent")

    def lstm(path: str, x: Ref) -> Ref:
        return s.layer(path, "layers.LSTM", x, in_features=4, hidden_features=4)

    both = lstm("both", X)
    y, state = s.call("[]", both, 0), s.call("[]", both, 1)
    y = s.call("+", y, s.call("*", s.call("[]", s.call("[]", state, 0), 0), s.call("[]", s.call("[]", state, 1), 0)))
    y = s.call("+", X, s.call("[]", s.call("[]", s.call("[]", lstm("cell", y), 1), 1), 0))
    gru = s.layer("gru", "layers.GRU", y, in_features=4, hidden_features=4)
    y = s.call("+", s.call("[]", gru, 0), s.call("[]", s.call("[]", gru, 1), 0))
    whole = lstm("whole", y)
    weights = [s.variable(name, (4, 4)) for name in ("kernel", "recurrent_kernel")]
    bare = s.call("ops.rnn", s.call("[]", whole, 0), None, *weights, None, None, activation_fn=Func("nnx.relu"))
    return s.network((X,), (s.call("[]", bare, 0), s.call("[]", whole, 1), s.call("[]", lstm("last", X), 0)))


def functions() -> Network:
    """Chains that differ in a function that is not an activation."""
    s = Sketch("Functions")
    y = X
    for k, target in enumerate(("jnp.square", "jnp.cos")):
        with s.inside(f"block{k}", "Chain", "sequence"):
            y = s.linear(f"block{k}.0", y, 4, 4)
            with s.inside(f"block{k}.1", "Function", "function"):
                y = s.call(target, y)
    return s.network((X,), y)


def kept_axes() -> Network:
    s = Sketch("Axes")
    with s.inside("pool", "Pool", "function"):
        y = s.call("jnp.mean", X, (1, 2))
    y = s.call("*", X, s.call("jnp.expand_dims", y, (1, 2)))
    other = s.call("jnp.expand_dims", s.call("jnp.sum", y, (1, 2)), (0, 1))
    twice = s.call("jnp.max", y, 1)
    both = s.call("+", s.call("jnp.expand_dims", twice, 1), s.call("jnp.mean", twice))
    return s.network((X,), (other, both))
