"""Builds networks by hand for tests, and computes them call by call, without any source."""

import contextlib
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxensemble.modules.classes import load_class
from jaxensemble.network.network import Arg, Call, Dtype, Func, Layer, Network, Ref, ReferenceTree, Slice, Var, Variable
from jaxensemble.network.vocabulary import resolve_name

X = Ref("x")


class Sketch:
    """Records layers, variables and calls; `inside` stands for the call of a module."""

    def __init__(self, name: str, kind: str = "module"):
        self.name = name
        self.modules: dict[str, tuple[str, str]] = {"": (name, kind)}
        self.layers: dict[str, Layer] = {}
        self.variables: dict[str, Variable] = {}
        self.calls: list[Call] = []
        self.scope: tuple[str, ...] = ()
        self.times: dict[str, int] = {}

    def module(self, path: str, class_name: str, kind: str = "module") -> None:
        self.modules[path] = (class_name, kind)

    @contextlib.contextmanager
    def inside(self, path: str, class_name: str, kind: str = "module") -> Iterator[None]:
        self.module(path, class_name, kind)
        count = self.times.get(path, 0)
        self.times[path] = count + 1
        outer, self.scope = self.scope, (*self.scope, f"{path}@{count}" if count else path)
        yield
        self.scope = outer

    def call(self, target: str, *args: Arg, **kwargs: Arg) -> Ref:
        out = Ref(f"v{len(self.calls)}")
        self.calls.append(Call(out.name, target, args, kwargs, self.scope))
        return out

    def layer(self, path: str, type_: str, *args: Arg, **options: Arg) -> Ref:
        self.layers.setdefault(path, Layer(path, type_, options))
        return self.call(f"layer:{path}", *args)

    def variable(self, path: str, shape: tuple[int, ...], kind: Any = "param", dtype: str = "float32") -> Var:
        self.variables.setdefault(path, Variable(path, kind, shape, dtype))
        return Var(path)

    def linear(self, path: str, x: Ref, inputs: int, outputs: int) -> Ref:
        return self.layer(path, "nnx.Linear", x, in_features=inputs, out_features=outputs)

    def conv(self, path: str, x: Ref, inputs: int, outputs: int, size: int = 3, **options: Arg) -> Ref:
        return self.layer(
            path, "nnx.Conv", x, in_features=inputs, out_features=outputs, kernel_size=(size, size), **options
        )

    def norm(self, path: str, x: Ref, features: int) -> Ref:
        return self.layer(path, "nnx.LayerNorm", x, num_features=features)

    def network(
        self, inputs: tuple[ReferenceTree, ...], outputs: ReferenceTree, evaluation_only: str | None = None
    ) -> Network:
        layers, variables = tuple(self.layers.values()), tuple(self.variables.values())
        return Network(
            self.name, inputs, outputs, layers, variables, tuple(self.calls), dict(self.modules), evaluation_only
        )


OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "@": operator.matmul,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "~": operator.invert,
    "neg": operator.neg,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "[]": operator.getitem,
    ".shape": lambda value, axis: value.shape[axis],
}


def at(model: nnx.Module, path: str) -> Any:
    """Returns a module's value at a dotted path: numbers are indices of lists, and attributes elsewhere."""
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, nnx.List) else getattr(found, part)
    return found


def evaluate(network: Network, model: nnx.Module, *inputs: Any) -> Any:
    """Computes a network with a model's layers and variables, one call after the other."""
    values: dict[str, Any] = {}
    for tree, given in zip(network.inputs, inputs, strict=True):
        _bind(tree, given, values)

    def read(arg: Any) -> Any:
        match arg:
            case Ref(name):
                return values[name]
            case Var(path):
                return at(model, path)[...]
            case Dtype(name):
                return getattr(jnp, name)
            case Func(name):
                return resolve_name(name)
            case Slice(start, stop, step):
                return slice(read(start), read(stop), read(step))
            case tuple() | list():
                return type(arg)(map(read, arg))
            case dict():
                return {key: read(value) for key, value in arg.items()}
        return arg

    for call in network.calls:
        args, kwargs = read(call.args), read(dict(call.kwargs))
        if call.target.startswith("layer:"):
            function = at(model, call.target.removeprefix("layer:"))
        elif call.target in OPERATORS:
            function = OPERATORS[call.target]
        elif call.target.startswith("."):
            function, args = getattr(args[0], call.target[1:]), args[1:]
        else:
            function: Any = resolve_name(call.target)
        values[call.out] = function(*args, **kwargs)
    return read(network.outputs)


def _bind(tree: ReferenceTree, given: Any, values: dict[str, Any]) -> None:
    match tree:
        case Ref(name):
            values[name] = given
        case dict():
            for key, item in tree.items():
                _bind(item, given[key], values)
        case tuple() | list():
            for item, one in zip(tree, given, strict=True):
                _bind(item, one, values)


def made(network: Network) -> nnx.Module:
    """Returns the network's module with random parameters, buffers and constants of float types.

    It is not initialised: to compile the initialisation of every layer takes longer than most tests.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: load_class(network)(rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(state)
    return nnx.merge(graph, jax.tree.unflatten(treedef, [_drawn(draw, leaf) for leaf in leaves]))


def _drawn(draw: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(draw.normal(size=leaf.shape) if is_float else np.zeros(leaf.shape), leaf.dtype)


def run_both(network: Network, *inputs: Any, at_once: bool = True) -> tuple[nnx.Module, Any, Any]:
    """Returns a model with random weights, its result, and the result of the calls one by one.

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
