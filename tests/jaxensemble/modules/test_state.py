"""Modules split and put together again, and conditions for two modules to be the same network."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble.errors import InputError, StateError, UnsupportedError
from jaxensemble.layers.variables import Constant
from jaxensemble.modules.state import flatten, merge, split, unflatten
from jaxensemble.modules.structure import NOTHING, Structure, structure_differences


class Everything(nnx.Module):
    """One of each kind of variable and container, and more than ten of a list, whose items sort as numbers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.named = nnx.Dict(scale=nnx.Param(jnp.full(2, 3.0)))
        self.counter = nnx.Variable(jnp.array(7))
        self.table = Constant(jnp.arange(2.0))
        self.bare = jnp.ones(2)
        self.tied = self.layers[3].bias
        self.parent = nnx.Dict(root=self)
        self.pool = functools.partial(jnp.max, axis=-1)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        x = self.dropout(self.norm(x)) * self.named.scale + self.table + self.bare + self.tied
        return self.pool(x) + self.counter


class Mnist(nnx.Module):
    """The network of Flax's own MNIST tutorial, smaller: its pooling is a partial object made for each instance."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 2, kernel_size=(3, 3), rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(8, 3, rngs=rngs)


class Holder(nnx.Module):
    def __init__(self, value: Any) -> None:
        self.value = nnx.static(value)


def _everything(seed: int = 0) -> Everything:
    return Everything(nnx.Rngs(seed))


def test_arrays_are_sorted_by_kind_under_string_keys() -> None:
    state = split(_everything())
    assert list(flatten(state.buffers)) == ["bare", "counter", "norm.mean", "norm.var"]
    assert list(flatten(state.constants)) == ["table"]
    assert list(flatten(state.rngs)) == ["dropout.rngs.count", "dropout.rngs.key"]
    assert list(state.params["layers"]) == [str(number) for number in range(11)]
    assert state.params["layers"]["10"].keys() == {"kernel", "bias"}
    assert "tied" not in state.params


def test_merge_is_the_inverse_of_split() -> None:
    module = _everything()
    again = merge(*split(module))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again, nnx.Param), nnx.state(module, nnx.Param))
    assert again is not module
    assert again.layers[3].bias is again.tied
    assert again.parent.root is again
    assert split(again).graphdef is split(module).graphdef
    module.eval()
    again.eval()
    x = jnp.ones((3, 2))
    np.testing.assert_array_equal(again(x), module(x))


def test_merged_arrays_are_independent_of_the_module() -> None:
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    again = merge(*split(module))
    again.kernel[...] = jnp.zeros((2, 2))
    assert bool(jnp.any(module.kernel[...] != 0))


def test_shapes_without_arrays_can_be_split() -> None:
    state = split(nnx.eval_shape(lambda: Mnist(nnx.Rngs(0))))
    assert state.params["linear1"]["kernel"].shape == (8, 3)
    assert state.graphdef == split(Mnist(nnx.Rngs(0))).graphdef


def test_states_pass_through_jit() -> None:
    state = split(_everything())
    doubled = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state.params))(state)
    np.testing.assert_array_equal(doubled["named"]["scale"], [6.0, 6.0])


def test_merge_lists_every_array_that_does_not_fit() -> None:
    state = split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    params = {"bias": state.params["bias"], "weight": state.params["scale"]}
    with pytest.raises(StateError) as caught:
        merge(state.graphdef, params, {"mean": state.buffers["mean"]})
    assert str(caught.value) == (
        "the arrays given do not fit BatchNorm: missing params: scale, buffers: var; unexpected params: weight"
    )


@pytest.mark.parametrize("module", [object(), nnx.Linear, {"kernel": jnp.ones(2)}, None])
def test_only_modules_are_split(module: Any) -> None:
    with pytest.raises(InputError, match=r"`module` must be a flax\.nnx\.Module; got [a-z]+\."):
        split(module)


def test_a_variable_holding_a_dict_is_refused() -> None:
    module = nnx.Dict(cache=nnx.Variable({"keys": jnp.ones(2)}))
    with pytest.raises(StateError, match="`cache` holds a dict"):
        split(module)


def test_names_with_dots_are_refused() -> None:
    module = nnx.Dict({"a.b": nnx.Param(jnp.ones(2))})
    with pytest.raises(UnsupportedError, match=r"'a\.b'; names cannot contain dots"):
        split(module)


@pytest.mark.parametrize(
    ("nested", "flat"),
    [({}, {}), ({"a": 1}, {"a": 1}), ({"a": {"b": {"c": 1}, "d": 2}, "e": 3}, {"a.b.c": 1, "a.d": 2, "e": 3})],
)
def test_flatten_and_unflatten_are_inverses(nested: dict[str, Any], flat: dict[str, Any]) -> None:
    assert flatten(nested) == flat
    assert unflatten(flat) == nested


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a")])
def test_a_name_cannot_be_array_and_dict(names: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="cannot be nested"):
        unflatten(dict.fromkeys(names, 1))


def test_two_instances_of_flax_tutorial_network_are_the_same() -> None:
    first, second = (nnx.graphdef(Mnist(nnx.Rngs(seed))) for seed in (0, 1))
    assert first != second  # as Flax compares them
    assert structure_differences(first, second) == []
    assert Structure.of(first) is Structure.of(second)


def test_structures_serve_as_static_arguments() -> None:
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def double(structure: Structure, x: jax.Array) -> jax.Array:
        traces.append(structure)
        return 2 * x

    for seed in (0, 1):
        double(split(Mnist(nnx.Rngs(seed))).graphdef, jnp.ones(2))
    assert len(traces) == 1


def test_structures_survive_copies() -> None:
    structure = split(_everything()).graphdef
    assert copy.deepcopy(structure) is structure
    assert repr(structure) == "Structure(Everything, 32 leaves)"


def _scaled(by: Any) -> Callable[[Any], Any]:
    return lambda x: x * by


def _recursive(by: int) -> Callable[[int], int]:
    def down(n: int) -> int:
        return by if n == 0 else down(n - 1)

    return down


SAME = {
    "number": lambda: 1e-5,
    "function": lambda: jnp.tanh,
    "partial": lambda: functools.partial(jnp.clip, min=0, max=6),
    "partial of a lambda": lambda: functools.partial(_scaled(2), 1),
    "closure": lambda: _scaled(2),
    "closure over a closure": lambda: _scaled(_scaled(2)),
    "closure over itself": lambda: _recursive(3),
    "dict": lambda: {"a": [1, {2}], "b": _scaled(3)},
    "closure over a numpy array": lambda: _scaled(np.arange(3)),
    "closure over an array": lambda: _scaled(jnp.arange(3)),
    "unhashable": lambda: bytearray(b"x"),
}
DIFFERENT = {
    "number": (1e-5, 1e-6),
    "type": (1, 1.0),
    "function": (jnp.tanh, jnp.sin),
    "partial": (functools.partial(jnp.clip, max=6), functools.partial(jnp.clip, max=7)),
    "closure": (_scaled(2), _scaled(3)),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "defaults": (lambda x, y=1: x + y, lambda x, y=2: x + y),
    "dict": ({"a": 1}, {"a": 2}),
    "closure over an array": (_scaled(np.arange(3)), _scaled(np.arange(3) + 1)),
    "unhashable": (bytearray(b"x"), bytearray(b"y")),
    "object": (object(), object()),
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME.keys())
def test_attributes_that_do_the_same_are_the_same(make: Callable[[], Any]) -> None:
    first, second = (nnx.graphdef(Holder(make())) for _ in range(2))
    assert structure_differences(first, second) == []
    assert hash(Structure.of(first)) == hash(Structure.of(second))


@pytest.mark.parametrize(("a", "b"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_attributes_that_differ_are_reported_with_both_values(a: Any, b: Any) -> None:
    ((path, left, right),) = structure_differences(nnx.graphdef(Holder(a)), nnx.graphdef(Holder(b)))
    assert path == "value"
    assert left is a
    assert right is b


def _block(**options: Any) -> nnx.Module:
    settings = {"features": 2, "bias": True, "rate": 0.5, "shared": True} | options
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(2, settings["features"], use_bias=settings["bias"], rngs=rngs)
    head = linear if settings["shared"] else nnx.Linear(2, 2, rngs=rngs)
    return nnx.Dict(block=nnx.List([linear, nnx.Dropout(settings["rate"], rngs=rngs)]), head=head)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"features": 3}, ["block.0.out_features: 2, 3"]),
        ({"rate": 0.1}, ["block.1.rate: 0.5, 0.1"]),
        ({"bias": False}, ["block.0.bias: Param(), None", "block.0.use_bias: True, False"]),
        ({"shared": False}, ["head: the same object as `block.0`, <class 'flax.nnx.nn.linear.Linear'>"]),
    ],
)
def test_differences_name_the_place(options: dict[str, Any], expected: list[str]) -> None:
    found = structure_differences(nnx.graphdef(_block()), nnx.graphdef(_block(**options)))
    shown = [f"{path}: {a!r}, {b!r}" for path, a, b in found]
    assert [line for line in shown if line.split(":")[0] not in _implied(options)] == expected


def _implied(options: dict[str, Any]) -> set[str]:
    """Returns the paths of differences that follow from another one."""
    return {f"head.{name}" for name in ("bias", "out_features", "use_bias")} if options else set()


def test_differences_stop_below_another_class_and_count_absences() -> None:
    linear, conv = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Conv(2, 2, (1,), rngs=nnx.Rngs(0))
    found = structure_differences(nnx.graphdef(nnx.Dict(a=linear)), nnx.graphdef(nnx.Dict(a=conv, b=linear)))
    assert found == [("a", nnx.Linear, nnx.Conv), ("b", NOTHING, nnx.Linear)]
    assert structure_differences(nnx.graphdef(linear), nnx.graphdef(conv)) == [("", nnx.Linear, nnx.Conv)]
