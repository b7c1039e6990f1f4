"""The source of a network: it computes what the calls say, reads as written by hand, and keeps every path."""

import inspect
import linecache
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch import Sketch, at, evaluate, randomised

from jaxensemble.errors import InputError
from jaxensemble.network import Call, Dtype, Func, Layer, Network, Ref, Slice
from jaxensemble.source import load_class, print_source

X = Ref("x")


def ruff_accepts(text: str) -> bool:
    command = [sys.executable, "-m", "ruff", "format", "--check", "--isolated", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode == 0


def run_both(network: Network, *inputs: Any) -> tuple[nnx.Module, Any, Any]:
    """A model with random weights, what it gives, and what the calls one by one give."""
    model: Any = randomised(load_class(network)(rngs=nnx.Rngs(0)))
    return model, model(*inputs), evaluate(network, model, *inputs)


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
    return s.network((X,), s.call("lax.reduce", y, 0.0, Func("lax.add"), (1,)))


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
}


@pytest.mark.parametrize("case", CASES)
def test_source_computes_what_the_calls_say(case: str) -> None:
    build, shapes = CASES[case]
    _, actual, expected = run_both(build(), *(draw(*shape) for shape in shapes))
    assert_same(actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_source_is_formatted(case: str) -> None:
    text = print_source(CASES[case][0]())
    assert ruff_accepts(text), text
    assert max(map(len, text.splitlines())) <= 88


def test_the_formatting_test_can_fail() -> None:
    assert not ruff_accepts("x = ( 1)\n")


@pytest.mark.parametrize("case", CASES)
def test_every_path_is_kept(case: str) -> None:
    network = CASES[case][0]()
    model = load_class(network)(rngs=nnx.Rngs(0))
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
    def __init__(
        self, in_features, out_features, strides=1, downsample=False, *, rngs: nnx.Rngs
    ):
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
            [
                BasicBlock(4, 8, strides=(2, 2), downsample=True, rngs=rngs),
                BasicBlock(8, 8, rngs=rngs),
                BasicBlock(8, 8, rngs=rngs),
            ]
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
                Chain(
                    [
                        nnx.Linear(5, 6, rngs=rngs),
                        identity,
                        leaky_relu,
                        nnx.Linear(6, 3, rngs=rngs),
                    ]
                ),
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


def test_a_network_without_training_mode_says_why() -> None:
    s = Sketch("Frozen")
    network = s.network((X,), s.linear("fc", X, 4, 4), evaluation_only='captured in "eval" mode')
    model = load_class(network)(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match='captured in "eval" mode'):
        model.train()
    model.eval()
    assert ruff_accepts(print_source(network))


# Running it


def test_equal_networks_share_a_class_and_a_structure() -> None:
    cls = load_class(lenet())
    assert cls is load_class(lenet())
    graphs = [nnx.graphdef(load_class(sequential())(rngs=nnx.Rngs(seed))) for seed in (0, 1)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


def test_source_shows_in_tracebacks_and_inspect() -> None:
    cls = load_class(lenet())
    model: Any = cls(rngs=nnx.Rngs(0))
    assert inspect.getsource(cls).startswith("class LeNet(nnx.Module):")
    linecache.checkcache()
    with pytest.raises(Exception) as caught:
        model(jnp.ones((2, 3)))
    assert "x = nnx.relu(self.conv1(x))" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_the_class_jits_and_differentiates() -> None:
    model: Any = randomised(load_class(resnet())(rngs=nnx.Rngs(0)))
    x = draw(2, 8, 8, 3)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), model(x), rtol=1e-4, atol=1e-5)
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
        ".tofile",
        ".x; y",
        "nnx.x()",
        "import",
    ],
)
def test_functions_that_are_none_on_arrays_are_refused(target: str) -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.call(target, X)), "a network may call|names nothing")


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
            self.pick([self._call, self._call, self._enter, self._repeat])(path, size)

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
        has_gate, is_chain = self.pick((True, False)), self.pick((True, False))
        for _ in range(times):
            with s.inside(block, "Repeated"):
                y = s.linear(f"{block}.grow", x, 4, width)
                with s.inside(f"{block}.body", "Body", "sequence" if is_chain else "module"):
                    y = s.linear(f"{block}.body.0", y, width, width)
                    with s.inside(f"{block}.body.1", "Clip", "function"):
                        y = s.call("jnp.clip", y, -bound, bound)
                    y = s.linear(f"{block}.body.2", y, width, 4)
                if has_gate:
                    x = s.linear(f"{block}.gate", x, 4, 4)
                x = s.call("+", y, x)
        self.values.append(x)

    def _call(self, path: str, size: int) -> None:
        s, x, y = self.sketch, self.pick(self.values[-3:]), self.pick(self.values[-3:])
        match self.pick(["linear", "linear", "relu", "tanh", "+", "*", "variable", "reshape", "stack", "nothing"]):
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


@settings(max_examples=40)
@given(data=st.data())
def test_any_network_computes_what_its_calls_say(data: st.DataObject) -> None:
    network = Drawn(data).build(data.draw(st.integers(2, 7)))
    x, y = draw(3, 4), draw(3, 4) + 1
    _, actual, expected = run_both(network, x, y)
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
