"""The source of a network: it computes what the calls say, reads as written by hand, and keeps every path."""

import inspect
import linecache
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxensemble.errors import InputError
from jaxensemble.modules.build import skeleton
from jaxensemble.modules.classes import load_class
from jaxensemble.modules.state import flatten, split
from jaxensemble.network.network import Call, Dtype, Func, Layer, Network, Ref, Slice
from jaxensemble.source import print_source
from tests.helpers.sketch import Sketch, at, evaluate, made

X = Ref("x")


def ruff_accepts(text: str) -> bool:
    return _ruff("format", "--check", text=text)


def ruff_finds_nothing(text: str) -> bool:
    """Whether lint has nothing to say. In the code of others, jaxensemble is a package like any other."""
    first_party = "--config=lint.isort.known-third-party=['jaxensemble']"
    return _ruff("check", "--select=F,E,I,UP,B,C4", first_party, text=text)


def _ruff(*arguments: str, text: str) -> bool:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--line-length=120", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode == 0


def run_both(network: Network, *inputs: Any, at_once: bool = True) -> tuple[nnx.Module, Any, Any]:
    """A model with random weights, what it gives, and what the calls one by one give.

    Both are compiled as one program, which is faster than every operation by itself where most of them differ.
    """
    model: Any = made(network)
    calls = (lambda m, *xs: m(*xs), partial(evaluate, network))
    if not at_once:
        return model, *(call(model, *inputs) for call in calls)
    graph, state = nnx.split(model)
    trees: list[Any] = []

    def both(state: Any, inputs: Any) -> list[Any]:
        results = [call(nnx.merge(graph, state), *inputs) for call in calls]
        trees.extend(jax.tree.structure(result) for result in results)
        return [jax.tree.leaves(result) for result in results]

    found = jax.jit(both)(state, inputs)
    actual, expected = (jax.tree.unflatten(tree, leaves) for tree, leaves in zip(trees, found, strict=True))
    return model, actual, expected


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


# Networks


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
    """A chain with steps before and behind it, and with one between that no child is said to take."""
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
    """A module that calls what another one holds."""
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


def wide() -> Network:
    """Blocks whose numbers have little in common."""
    s = Sketch("Wide")
    y = X
    for k, (size, axis) in enumerate(((3, 0), (5, 1), (3, 1))):
        with s.inside(f"block{k}", "Block"):
            y = s.linear(f"block{k}.grow", y, 4, size)
            y = s.linear(f"block{k}.shrink", y, size, 4)
            y = s.call("jnp.flip", s.call("jnp.cumsum", y, axis=axis), axis)
    return s.network((X,), y)


def residual_blocks() -> Network:
    """Blocks of which some add their input; some shrink, and are told so by an option of a class within."""
    s = Sketch("MobileNet")
    y = X
    with s.inside("blocks", "Sequential", "sequence"):
        for k, (before, after, stride) in enumerate(((4, 8, 2), (8, 8, 1), (8, 8, 1), (8, 12, 1))):
            with s.inside(f"blocks.{k}", "Inverted"):
                x, path = y, f"blocks.{k}.conv"
                strides: dict[str, Any] = {"strides": (stride, stride)} if stride > 1 else {}
                with s.inside(path, "ConvNorm"):
                    y = s.conv(f"{path}.expand", y, before, 2 * before, 1, padding="VALID")
                    y = s.conv(
                        f"{path}.each", y, 2 * before, 2 * before, padding=1, feature_group_count=2 * before, **strides
                    )
                y = s.conv(f"blocks.{k}.project", y, 2 * before, after, 1)
                y = s.call("+", x, y) if before == after else y
    return s.network((X,), y)


def residual_blocks_with_parts() -> Network:
    """Blocks of which some add their input, and all give what they made before as well."""
    s = Sketch("Parts")
    y, parts = X, []
    for k, (before, after) in enumerate(((4, 6), (6, 6), (6, 3), (3, 3))):
        with s.inside(f"block{k}", "Block"):
            x, part = y, s.linear(f"block{k}.first", y, before, after)
            y = s.linear(f"block{k}.second", part, after, after)
            y = s.call("+", x, y) if before == after else y
            parts.append(part)
    return s.network((X,), (y, *parts))


def kernels() -> Network:
    """Convolutions of several sizes with padding to match, and a scale for each feature."""
    s = Sketch("Kernels")
    y = X
    for k, (size, width) in enumerate(((3, 4), (1, 8), (5, 4))):
        with s.inside(f"block{k}", "Block"):
            padding = "VALID" if size == 1 else size // 2
            y = s.conv(f"block{k}.conv", y, 12 - width if k else 4, width, size, padding=padding)
            y = s.call("*", s.variable(f"block{k}.scale", (1, width)), y)
    return s.network((X,), y)


def dense() -> Network:
    """Layers that take all that the ones before have given."""
    s = Sketch("Dense")
    found = [X]
    for k in range(1, 6):
        with s.inside(f"layer{k}", "DenseLayer"):
            y = s.call("jnp.concatenate", list(found), axis=-1) if k > 1 else X
            found.append(s.call("nnx.relu", s.linear(f"layer{k}.fc", y, 1 + 3 * k, 3)))
    return s.network((X,), s.call("jnp.concatenate", list(found), axis=-1))


def numbered(stem: str) -> Network:
    """Blocks with numbered names in a container of PyTorch's, and again in the network itself."""
    s = Sketch("Numbered")
    y = X
    with s.inside("layers", "Layers"):
        for k in range(4):
            with s.inside(f"layers.{stem}{k}", "Block"):
                y = s.call("nnx.relu", s.linear(f"layers.{stem}{k}.fc", y, 4, 4))
    for k in range(1, 5):
        with s.inside(f"{stem}{k}", "Block"):
            y = s.call("nnx.relu", s.linear(f"{stem}{k}.fc", y, 4, 4))
    return s.network((X,), y)


def named_alike() -> Network:
    """Layers with numbered names that are called one by one, and too few to be called in a loop."""
    s = Sketch("Alike")
    y = X
    for k in range(1, 5):
        y = s.call("jnp.tanh" if k % 2 else "nnx.relu", s.linear(f"fc{k}", y, 4, 4))
    for k in range(1, 4):
        y = s.linear(f"out{k}", y, 4, 4)
    return s.network((X,), y)


def parts() -> Network:
    """Attention over parts of one projection, and halves of what comes out."""
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
    """A module that begins by arranging what others read too, and two alike, one of which takes the network's input."""
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


def bottlenecks() -> Network:
    s = Sketch("Bottlenecks")
    y = X
    for k, width in enumerate((4, 8, 8)):
        with s.inside(f"block{k}", "Gate"):
            y = s.linear(f"block{k}.grow", y, width, 4 * width)
            y = s.linear(f"block{k}.gate", y, 4 * width, width // 2)
            y = s.linear(f"block{k}.out", y, width // 2, 8)
            y = s.call(".reshape", s.call(".reshape", y, -1, 8 // width, width), -1, 8)
    return s.network((X,), y)


def recurrent() -> Network:
    """Recurrent layers whose output and state are read in every way that there is."""
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


def activations() -> Network:
    """Chains of one class that differ in what stands between or behind their layers, or lack it."""
    s = Sketch("Activations")
    y = X
    for k, (inner, last) in enumerate(
        (("nnx.relu", "nnx.hard_swish"), ("nnx.relu", None), (None, "jnp.tanh"), ("nnx.relu", "nnx.hard_swish"))
    ):
        with s.inside(f"block{k}", "LinearActivation", "sequence"):
            y = s.linear(f"block{k}.0", y, 4, 4)
            if inner:
                with s.inside(f"block{k}.1", "Inner", "function"):
                    y = s.call(inner, y)
            y = s.linear(f"block{k}.2", y, 4, 4)
            if last:
                with s.inside(f"block{k}.3", "Last", "function"):
                    y = s.call(last, y)
    return s.network((X,), y)


def functions() -> Network:
    """Chains that differ in a function that is no activation."""
    s = Sketch("Functions")
    y = X
    for k, target in enumerate(("jnp.square", "jnp.cos")):
        with s.inside(f"block{k}", "Chain", "sequence"):
            y = s.linear(f"block{k}.0", y, 4, 4)
            with s.inside(f"block{k}.1", "Function", "function"):
                y = s.call(target, y)
    return s.network((X,), y)


def windows() -> Network:
    """Blocks of which some shift what they are given, and add a mask; some are of one window, and cut nothing."""
    s = Sketch("Windows")
    y = X
    for k, (count, shift) in enumerate(((2, 0), (2, 1), (4, 2), (1, 0))):
        path = f"block{k}"
        with s.inside(path, "Window"):
            x = y
            y = s.linear(f"{path}.qkv", y, 4, 4)
            if shift:
                y = s.call("jnp.roll", y, -shift, axis=1)
            if count > 1:
                y = s.call("jnp.transpose", s.call(".reshape", y, -1, count, 8 // count, 4), (0, 2, 1, 3))
            y = s.call(".reshape", y, -1, 8, 4)
            if shift:
                mask = s.variable(f"{path}.mask", (8, 1), "constant")
                y = s.call("jnp.square", s.call("+", y, mask))
            y = s.linear(f"{path}.proj", y, 4, 4)
            if shift:
                y = s.call("jnp.roll", y, shift, axis=1)
            y = s.call("nnx.relu", s.linear(f"{path}.grow", y, 4, 8))
            y = s.call("+", x, s.linear(f"{path}.shrink", y, 8, 4))
    return s.network((X,), y)


def shortened_otherwise() -> Network:
    """Modules of one class that differ by steps which no flag can leave out."""
    s = Sketch("Otherwise")
    outs = []
    for k in range(3):
        with s.inside(f"a{k}", "ReadLater"):  # what goes into the step is read again
            y = s.linear(f"a{k}.fc", X, 4, 4)
            z = s.call("jnp.cos", y) if k == 1 else y
            outs.append(s.call("*", s.call("jnp.sin", s.call("+", y, z)), 2))
        with s.inside(f"b{k}", "TakesTwo"):
            y = s.linear(f"b{k}.fc", X, 4, 4)
            z = s.call("jnp.sin", X)
            y = s.call("*", y, z) if k == 1 else y
            outs.append(s.call("jnp.square", s.call("+", y, y)))
        with s.inside(f"c{k}", "GivesBoth"):
            y = s.linear(f"c{k}.fc", s.call("jnp.sin", X), 4, 4)
            outs += [y, s.call("jnp.cos", y)] if k == 1 else [y]
        with s.inside(f"d{k}", "EndsEarly"):
            y = s.linear(f"d{k}.fc", s.call("jnp.sin", X), 4, 4)
            outs.append(s.call("jnp.cos", s.call("jnp.tanh", y)) if k == 1 else y)
    return s.network((X,), tuple(outs))


def called_mappings() -> Network:
    """Containers with names for their children: called with few steps, with many, and as an item of a list."""
    s = Sketch("Mappings")
    y = X
    with s.inside("heads", "Heads", "mapping"):
        y = s.call("nnx.relu", s.linear("heads.head", y, 4, 4))
    with s.inside("features", "Features", "mapping"):
        for k in ("a", "b", "c", "d"):
            y = s.call("nnx.relu", s.linear(f"features.{k}", y, 4, 4))
    with s.inside("blocks", "Sequential", "sequence"):
        for k in range(2):
            with s.inside(f"blocks.{k}", "Item", "mapping"):
                y = s.linear(f"blocks.{k}.fc", y, 4, 4)
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


CASES: dict[str, tuple[Callable[[], Network], list[tuple[int, ...]]]] = {
    "lenet": (lenet, [(2, 8, 8, 1)]),
    "resnet": (resnet, [(2, 8, 8, 3)]),
    "sequential": (sequential, [(2, 4)]),
    "convolutional_sequential": (convolutional_sequential, [(2, 2, 3, 3)]),
    "irregular_sequential": (irregular_sequential, [(2, 4)]),
    "twice": (twice, [(2, 4)]),
    "twice_differently": (twice_differently, [(2, 4)]),
    "attention_twice": (attention_twice, [(3, 4), (3, 4)]),
    "interleaved": (interleaved, [(2, 4)]),
    "shared_elsewhere": (shared_elsewhere, [(2, 4)]),
    "block_list": (block_list, [(2, 4), (2, 4)]),
    "mapping": (mapping, [(2, 4)]),
    "variables": (variables, [(2, 4)]),
    "odd_names": (odd_names, [(2, 4)]),
    "constants": (constants, [(3, 4)]),
    "several_results": (several_results, [(2, 4)]),
    "wide": (wide, [(2, 4)]),
    "residual_blocks": (residual_blocks, [(2, 8, 8, 4)]),
    "residual_blocks_with_parts": (residual_blocks_with_parts, [(2, 4)]),
    "kernels": (kernels, [(2, 8, 8, 4)]),
    "dense": (dense, [(2, 4)]),
    "numbered": (lambda: numbered("block_"), [(2, 4)]),
    "numbered_oddly": (lambda: numbered("b-"), [(2, 4)]),
    "named_alike": (named_alike, [(2, 4)]),
    "parts": (parts, [(2, 3, 4)]),
    "parts_left_over": (parts_left_over, [(2, 4)]),
    "arranged": (arranged, [(2, 4, 3)]),
    "branches": (branches, [(2, 4)]),
    "bottlenecks": (bottlenecks, [(2, 4)]),
    "recurrent": (recurrent, [(3, 4)]),
    "activations": (activations, [(2, 4)]),
    "functions": (functions, [(2, 4)]),
    "windows": (windows, [(2, 8, 4)]),
    "shortened_otherwise": (shortened_otherwise, [(2, 4)]),
    "called_mappings": (called_mappings, [(2, 4)]),
    "kept_axes": (kept_axes, [(2, 3, 3, 4)]),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_source_computes_what_the_calls_say(case: str) -> None:
    build, shapes = CASES[case]
    _, actual, expected = run_both(build(), *(draw(*shape) for shape in shapes))
    assert_same(actual, expected)


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_source_is_formatted(case: str) -> None:
    text = print_source(CASES[case][0]())
    assert ruff_accepts(text), text
    if case != "odd_names":  # B009 would have `ﬁ` spelled as an attribute, which Python reads as `fi`
        assert ruff_finds_nothing(text), text
    assert max(map(len, text.splitlines())) <= 120


def test_the_formatting_test_can_fail() -> None:
    assert not ruff_accepts("x = ( 1)\n")
    assert not ruff_finds_nothing("import os\n")


@pytest.mark.parametrize("case", CASES)
def test_every_path_is_kept(case: str) -> None:
    network = CASES[case][0]()
    model = made(network)
    for layer in network.layers:
        assert type(at(model, layer.path)).__name__ == layer.type.partition(".")[2]
    for variable in network.variables:
        assert at(model, variable.path).shape == variable.shape
        assert at(model, variable.path)[...].dtype == variable.dtype
    stored = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    held = [*(layer.path + "." for layer in network.layers), *(variable.path for variable in network.variables)]
    assert all(path.startswith(tuple(held)) for path in stored)


def test_nested_inputs_and_outputs() -> None:
    x = draw(2, 4)
    _, actual, expected = run_both(trees(), x, (x + 1, [x + 2]), {"mask": x, "none": None})
    assert_same(actual, expected)
    assert ruff_accepts(print_source(trees()))


# How it reads

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


def test_what_is_one_value_in_some_calls_alone_is_skipped_nowhere() -> None:
    """Steps that take two values of one call, which are one in another, are not left out."""
    s = Sketch("Pairs")
    y = X
    for k in range(2):
        for other in (y, X) if k else (X, X):
            with s.inside(f"pair{k}", "Pair"):
                y = s.linear(f"pair{k}.fc", y, 4, 4)
                y = s.call("jnp.sin", s.call("*", y, other))
                y = s.call("jnp.square", s.call("+", y, 1)) if k else y
    network = s.network((X,), y)
    _, actual, expected = run_both(network, draw(2, 4))
    assert_same(actual, expected)


def test_a_network_without_training_mode_says_why() -> None:
    s = Sketch("Frozen")
    reason = 'captured in "eval" mode, ' + "because the forward does something else in training mode, " * 4
    network = s.network((X,), s.linear("fc", X, 4, 4), evaluation_only=reason)
    model = made(network)
    with pytest.raises(ValueError) as caught:
        model.train()
    assert caught.value.args == (reason,)
    model.eval()
    assert ruff_accepts(print_source(network)) and ruff_finds_nothing(print_source(network))


# Running it


def test_equal_networks_share_a_class_and_a_structure() -> None:
    cls = load_class(lenet())
    assert cls is load_class(lenet())
    graphs = [nnx.graphdef(made(sequential())) for _ in range(2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


def test_source_shows_in_tracebacks_and_inspect() -> None:
    cls = load_class(lenet())
    model: Any = made(lenet())
    assert inspect.getsource(cls).startswith("class LeNet(nnx.Module):")
    linecache.checkcache()
    with pytest.raises(Exception) as caught:
        model(jnp.ones((2, 3)))
    assert "x = nnx.relu(self.conv1(x))" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_the_class_jits_and_differentiates() -> None:
    model: Any = made(sequential())
    x = draw(2, 4)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), model(x), rtol=1e-5, atol=1e-5)
    gradients = nnx.grad(lambda m: m(x).sum())(model)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


# What is refused


def refuse(network: Network, match: str) -> None:
    with pytest.raises(InputError, match=match):
        print_source(network)


@pytest.mark.parametrize("name", ["train", "_pytree__state", "__init__", "set_attributes"])
def test_names_of_nnx_module_are_refused(name: str) -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.linear(name, X, 4, 4)), name)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "jnp.save",
        "jnp.load",
        "jax.pure_callback",
        "jnp.a b",
        "jnp._src.x",
        *(f"jnp.{name}" for name in "apply_along_axis apply_over_axes vectorize piecewise frompyfunc ufunc".split()),
        *(f"jnp.{name}" for name in "fromfunction mask_indices fromfile frombuffer savez printoptions".split()),
        *(f"lax.{name}" for name in "map scan fori_loop while_loop switch cond associative_scan reduce".split()),
        *(f"lax.{name}" for name in "composite platform_dependent reduce_window custom_root scatter_apply".split()),
        *(f"lax.{name}" for name in "psum all_gather axis_index rng_uniform create_token stage".split()),
        *(f"jax.{name}" for name in "scipy.linalg.funm vmap lax.map lax.add experimental.io_callback".split()),
        ".tofile",
        ".x; y",
        "nnx.x()",
        "import",
    ],
)
def test_functions_that_are_none_on_arrays_are_refused(target: str) -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.call(target, X)), "a network may call|names nothing")


@pytest.mark.parametrize("nested", [False, True])
def test_functions_are_handed_to_recurrent_functions_alone(nested: bool) -> None:
    s = Sketch("Net")
    function = Func("jnp.add")
    out = s.call("jnp.pad", X, 1, mode=[function, X] if nested else function)
    refuse(s.network((X,), out), "may hand functions to ops.rnn and ops.rnn_cell alone; got jnp.add as an argument")


@pytest.mark.parametrize(
    "type_", ["nnx.relu", "os.PathLike", "nnx.Linear(1, 2)", "nnx.NoSuchLayer", "nnx.Param", "jnp.ndarray"]
)
def test_types_that_are_no_layers_are_refused(type_: str) -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.layer("fc", type_, X)), "layer|names nothing")


def test_unknown_options_are_refused() -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.layer("fc", "nnx.Linear", X, in_features=1, out_features=1, bogus=1)), "'bogus'")


def test_hostile_names_of_arguments_and_dtypes_are_refused() -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.call("jnp.add", X, 1, **{"x=print())#": 1})), "identifier")
    s = Sketch("Net")
    refuse(s.network((X,), s.call("+", X, s.variable("w", (1,), dtype="float32)#"))), "dtype")
    s = Sketch("Net")
    refuse(s.network((X,), s.layer("fc", "nnx.Linear", X, in_features=1, out_features=1, **{"a=1": 1})), "'a=1'")


def test_hostile_names_of_classes_and_inputs_are_made_safe() -> None:
    s = Sketch('A"""\nimport os\n')
    x = Ref("x, y=print()")
    with s.inside("inner", "B:\n    pass\nprint()"):
        y = s.linear("inner.fc", x, 4, 4)
    model, actual, expected = run_both(s.network((x,), y), draw(2, 4))
    assert_same(actual, expected)
    assert type(model).__name__ == "A_import_os"


def test_a_dtype_that_is_none_is_refused() -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.call(".astype", X, Dtype("load"))), "dtype")


def test_missing_modules_are_refused() -> None:
    layer = Layer("a.fc", "nnx.Linear", {"in_features": 1, "out_features": 1})
    network = Network("Net", (X,), Ref("y"), (layer,), (), (Call("y", "layer:a.fc", (X,)),), {"": ("Net", "module")})
    refuse(network, "'a' is missing")


def test_lists_that_would_be_huge_are_refused() -> None:
    s = Sketch("Net")
    s.module("blocks", "ModuleList", "sequence")
    refuse(s.network((X,), s.linear("blocks.1000000000", X, 4, 4)), "too high")


# Any network at all

NAMES = ("a", "b", "0", "1", "2", "my-block", "class", "long_name_for_a_child_module")
KINDS = ("module", "module", "sequence", "mapping")


class Drawn:
    """A random network: values of shape [3, 4], modules entered and left at will, layers of any module."""

    def __init__(self, data: st.DataObject):
        self.pick = lambda items: data.draw(st.sampled_from(list(items)))
        self.sketch = Sketch("Random", self.pick(KINDS))
        self.values: list[Ref] = [X, Ref("y")]
        self.paths: list[str] = [""]

    def build(self, size: int) -> Network:
        self._fill("", size)
        outputs = tuple({self.pick(self.values).name: None for _ in range(2)})
        return self.sketch.network((X, Ref("y")), [Ref(name) for name in outputs])

    def _fill(self, path: str, size: int) -> None:
        for _ in range(size):
            self.pick([self._call, self._call, self._enter, self._repeat, self._number])(path, size)

    def _child(self, path: str) -> str:
        name = self.pick(NAMES)
        return f"{path}.{name}" if path else name

    def _enter(self, path: str, size: int) -> None:
        again = [p for p in self.paths if p]
        inner = self.pick(again) if again and self.pick([True, False]) else self._child(path)
        if inner in self.sketch.layers or inner in self.sketch.variables or size < 2 or path.count(".") > 3:
            return
        class_name, kind = self.sketch.modules.get(
            inner, (self.pick(("Block", "Cell", "Sequential")), self.pick(KINDS))
        )
        self.paths.append(inner)
        if self.pick([True, True, False]):
            with self.sketch.inside(inner, class_name, kind):
                self._fill(inner, size - 2)
        else:  # left and entered again under one name
            times = dict(self.sketch.times)
            with self.sketch.inside(inner, class_name, kind):
                self._fill(inner, size - 2)
            self.sketch.times = times

    def _repeat(self, path: str, size: int) -> None:
        """A block like others but for its numbers, and for a child that only some of them have."""
        s, x, block = self.sketch, self.pick(self.values[-2:]), self._free(path)
        width, bound, times = self.pick((3, 5)), self.pick((0.5, 2.0)), self.pick((1, 1, 2))
        has_gate, is_chain, is_residual, is_shifted = (self.pick((True, False)) for _ in range(4))
        activation = self.pick(("nnx.relu", "jnp.tanh", None))
        for _ in range(times):
            with s.inside(block, "Repeated"):
                y = s.linear(f"{block}.grow", x, 4, width)
                with s.inside(f"{block}.body", "Body", "sequence" if is_chain else "module"):
                    y = s.linear(f"{block}.body.0", y, width, width)
                    with s.inside(f"{block}.body.1", "Clip", "function"):
                        y = s.call("jnp.clip", y, -bound, bound)
                    y = s.linear(f"{block}.body.2", y, width, 4)
                    if activation:
                        with s.inside(f"{block}.body.3", "Activation", "function"):
                            y = s.call(activation, y)
                if is_shifted:
                    y = s.call("jnp.roll", s.call("+", y, s.variable(f"{block}.mask", (4,), "constant")), 1, axis=1)
                if has_gate:
                    x = s.linear(f"{block}.gate", x, 4, 4)
                x = s.call("+", y, x) if is_residual else y
        self.values.append(x)

    def _number(self, path: str, size: int) -> None:
        """Blocks with numbered names, called in turn, some with all that has come before, some with gaps."""
        s, x, holder = self.sketch, self.pick(self.values[-2:]), self._free(path)
        found: list[Any] = [x]
        is_dense, gap = self.pick((True, False)), self.pick((2, 9, 9))
        with s.inside(holder, holder.rpartition(".")[2].title()):
            for k in range(5):
                block = f"{holder}.block{k + (k > gap)}"
                with s.inside(block, "Numbered"):
                    y = s.call("jnp.concatenate", [*found], axis=-1) if is_dense and k else found[-1]
                    y = s.linear(f"{block}.fc", y, 4 * len(found) if is_dense else 4, 4)
                found.append(s.call("nnx.relu", y))
        self.values.append(found[-1])

    def _call(self, path: str, size: int) -> None:
        s, x, y = self.sketch, self.pick(self.values[-3:]), self.pick(self.values[-3:])
        kinds = ["linear", "linear", "relu", "tanh", "+", "*", "variable", "reshape", "stack", "parts", "nothing"]
        match self.pick(kinds):
            case "linear":
                out = self._layer(path, x)
            case "relu":
                with s.inside(self._free(path), "ReLU"):
                    out = s.call("nnx.relu", x)
            case "tanh":
                out = s.call("jnp.clip", s.call("jnp.tanh", x), -0.5, self.pick([0.5, 0.25]))
            case "variable":
                name = self._free(path)
                out = s.call("+", s.variable(name, (4,)), x)
            case "reshape":
                out = s.call(".reshape", x, s.call(".shape", y, 0), -1)
            case "stack":
                out = s.call("[]", s.call("jnp.concatenate", [x, y], axis=1), (Slice(), Slice(None, 4)))
            case "parts":
                whole = self.pick([s.call("jnp.split", x, 2, axis=-1), s.call(".reshape", x, -1, 2, 2)])
                before = (Slice(), Slice()) if whole.name != f"v{len(s.calls) - 2}" else ()
                halves: list[Any] = [
                    s.call("[]", whole, (*before, k) if before else k) for k in self.pick([(0, 1), (1, 0)])
                ]
                out = s.call("jnp.concatenate", halves, axis=-1)
            case "nothing":
                s.linear(self._free(path), x, 4, 4)
                return
            case operator:
                out = s.call(operator, x, y)
        self.values.append(out)

    def _free(self, path: str) -> str:
        names = [self._child(path), f"{path}.extra{len(self.sketch.calls)}".lstrip(".")]
        return next(n for n in names if not self._is_taken(n))

    def _is_taken(self, path: str) -> bool:
        held = [*self.sketch.layers, *self.sketch.variables, *self.sketch.modules]
        return any(p == path or p.startswith(path + ".") for p in held)

    def _layer(self, path: str, x: Ref) -> Ref:
        square = [path for path, layer in self.sketch.layers.items() if set(layer.options.values()) == {4}]
        if square and self.pick([True, False, False]):
            return self.sketch.call(f"layer:{self.pick(square)}", x)
        return self.sketch.linear(self._free(path), x, 4, 4)


@settings(max_examples=15)
@given(data=st.data())
def test_any_network_computes_what_its_calls_say(data: st.DataObject) -> None:
    network = Drawn(data).build(data.draw(st.integers(2, 7)))
    x, y = draw(3, 4), draw(3, 4) + 1
    _, actual, expected = run_both(network, x, y, at_once=False)
    assert_same(actual, expected)


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


def test_what_a_recurrent_layer_gives_stays_whole_where_it_is_read_as_a_whole() -> None:
    s = Sketch("Whole")
    whole = s.layer("rnn", "layers.LSTM", X, in_features=4, hidden_features=4)
    state = s.call("[]", whole, 1)
    _, actual, expected = run_both(s.network((X,), (s.call("[]", state, 0), whole)), draw(3, 4))
    assert_same(actual, expected)


def test_a_factor_is_called_scale() -> None:
    s = Sketch("Net")
    y = X
    for k, factor in enumerate((0.1, 0.2)):
        with s.inside(f"block{k}", "Block"):
            y = s.call("*", s.linear(f"block{k}.fc", y, 4, 4), factor)
    text = print_source(s.network((X,), y))
    assert "def __init__(self, scale, *, rngs: nnx.Rngs):" in text, text
    assert "Block(0.2, rngs=rngs)" in text, text


def test_a_long_chain_of_layers_that_differ_takes_little() -> None:
    """A run of layers that ends soon is given up soon: the time would else grow with its third power."""
    s = Sketch("Chain")
    y = X
    for k in range(300):
        y = s.layer(f"b{k}", "nnx.Linear", y, in_features=4, out_features=4, use_bias=bool(k % 2))
    network = s.network((X,), y)
    before, events = sys.getprofile(), 0

    def count(*_: object) -> None:
        nonlocal events
        events += 1

    sys.setprofile(count)
    try:
        text = print_source(network)
    finally:
        sys.setprofile(before)
    assert "self.b299 = nnx.Linear(4, 4, use_bias=True, rngs=rngs)" in text
    assert events < 4_000_000, events


def test_shapes_are_found_without_counting_random_keys() -> None:
    """Streams that layers keep are those that they would have been given."""
    s = Sketch("Net")
    y = s.call("[]", s.layer("rnn", "layers.LSTM", X, in_features=4, hidden_features=4, num_layers=2, rate=0.5), 0)
    network = s.network((X,), s.layer("drop", "nnx.Dropout", y, rate=0.5))
    expected = split(nnx.eval_shape(lambda: load_class(network)(rngs=nnx.Rngs(0))))
    found = skeleton(network)
    for kind in ("params", "rngs"):
        leaves, others = flatten(getattr(found, kind)), flatten(getattr(expected, kind))
        assert [(k, x.shape, x.dtype) for k, x in leaves.items()] == [(k, x.shape, x.dtype) for k, x in others.items()]
    assert "_Uncounted" not in str(found.graphdef)
