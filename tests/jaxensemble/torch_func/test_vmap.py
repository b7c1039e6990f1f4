"""`vmap` as PyTorch has it: PyTorch's own tests of its API (test/functorch/test_vmap.py, TestVmapAPI), rewritten.

Each docstring names the tests it stands for. Error texts are compared with PyTorch's own in test_torch_func_twin.py.
"""

import functools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import functional_call, vmap
from jaxensemble.errors import InputError, StateError

A = jnp.arange(6.0).reshape(2, 3)
B = jnp.arange(24.0).reshape(2, 3, 4)


def _equal(result: Any, expected: Any) -> None:
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_allclose, result, expected)


def _pair(x: Any) -> Any:
    return x, 2 * x


VALUES: dict[str, tuple[Callable[[], Any], Any]] = {
    # test_single_input, test_multiple_inputs
    "single input": (lambda: vmap(lambda x: x**2)(A), A**2),
    "inputs of two ranks": (lambda: vmap(lambda x, y: x[:, None] * y)(A, B), A[:, :, None] * B),
    "numpy": (lambda: vmap(lambda x: x**2)(np.asarray(A)), A**2),
    # test_constant_function
    "constant": (lambda: vmap(lambda x: jnp.array(3.0))(A), jnp.array([3.0, 3.0])),
    "constant of numpy": (lambda: vmap(lambda x: np.ones(2))(A), jnp.ones((2, 2))),
    # test_multiple_outputs
    "two outputs": (lambda: vmap(_pair)(A), (A, 2 * A)),
    # test_nested_with_same_map_dim, test_nested_with_different_map_dim, test_noop_in_inner_vmap
    "nested": (lambda: vmap(vmap(lambda x, y: x * y))(A, A), A * A),
    "nested, other dims": (
        lambda: vmap(lambda x: vmap(lambda y: x * y)(B[0, 0]))(A[:, 0]),
        jnp.outer(A[:, 0], B[0, 0]),
    ),
    "inner one idle": (lambda: vmap(lambda x: vmap(lambda y: x)(A))(A), jnp.stack([A, A], axis=1)),
    # test_nonzero_out_dims, test_multiple_out_dims, test_nested_out_dims, test_out_dims_edge_case
    "out_dims 1": (lambda: vmap(lambda x: x, out_dims=1)(A), A.T),
    "out_dims -1": (lambda: vmap(lambda x: x, out_dims=-1)(B), jnp.moveaxis(B, 0, -1)),
    "an out_dim each": (lambda: vmap(_pair, out_dims=(0, 1))(A), (A, 2 * A.T)),
    "nested out_dims": (lambda: vmap(vmap(lambda x: x, out_dims=1), out_dims=1)(B), B.transpose(2, 0, 1)),
    "out_dims (1,) for one output": (lambda: vmap(lambda x: x, out_dims=(1,))(A), A.T),
    "out_dims (1,) for a tuple of one": (lambda: vmap(lambda x: (x,), out_dims=(1,))(A), (A.T,)),
    # test_out_dims_none, test_out_dims_none_tuple
    "an output apart": (lambda: vmap(lambda x: (x, jnp.ones(2)), out_dims=(0, None))(A), (A, jnp.ones(2))),
    # test_pytree_returns, test_pytree_odict_returns, test_pytree_returns_outdims, ..._broadcast_{simple,nested}
    "tree": (lambda: vmap(lambda x: {"a": x, "b": [x, (x,)]})(A), {"a": A, "b": [A, (A,)]}),
    "ordered dict": (lambda: vmap(lambda x: OrderedDict(b=x, a=x))(A), OrderedDict(b=A, a=A)),
    "out_dims of a tree": (
        lambda: vmap(lambda x: (x, {"a": x}), out_dims=(1, {"a": 0}))(A),
        (A.T, {"a": A}),
    ),
    "out_dims for a part": (lambda: vmap(lambda x: (x, [x, x]), out_dims=(0, 1))(A), (A, [A.T, A.T])),
    # test_non_zero_in_dims, test_none_in_dims, test_nested_non_default_in_dims, test_non_default_in_dims_out_dims
    "in_dims 1": (lambda: vmap(lambda x: x, in_dims=1)(A), A.T),
    "in_dims -1": (lambda: vmap(lambda x: x, in_dims=-1)(B), jnp.moveaxis(B, -1, 0)),
    "in_dims, one None": (lambda: vmap(lambda x, y: x * y, (0, None))(A, A), A[:, None] * A),
    "in_dims (0,) for one input": (lambda: vmap(lambda x: x, (0,))(A), A),
    "in and out": (lambda: vmap(lambda x: x, in_dims=2, out_dims=2)(B), B),
    # test_accepts_nested_inputs
    "tuple": (lambda: vmap(lambda t: t[0] + t[1])((A, A)), 2 * A),
    "dims of a tuple": (lambda: vmap(lambda t: t[0] + t[1], in_dims=((0, None),))((A, A[0])), A + A[0]),
    "dims of a list": (lambda: vmap(lambda t: t[0] + t[1], in_dims=([0, 1],))([A, A.T]), 2 * A),
    "dims of a dict": (
        lambda: vmap(lambda t: t["x"] * t["y"], in_dims=({"x": 0, "y": None},))({"x": A, "y": 2}),
        2 * A,
    ),
    "None within": (lambda: vmap(lambda t: t[0] if t[1] is None else t, in_dims=((0, None),))((A, None)), A),
    "empty tree": (lambda: vmap(lambda p, b, x: p * x, (0, 0, None))(A, {}, 2.0), 2 * A),
    # keyword arguments are not mapped
    "keyword argument": (lambda: vmap(lambda x, scale: x * scale)(A, scale=A), A[:, None] * A),
    "no elements": (lambda: vmap(lambda x: x * 2)(jnp.ones((0, 3))), jnp.ones((0, 3))),
    "functools.partial": (lambda: vmap(functools.partial(jnp.add, A[0]))(A), A[0] + A),
    "an nnx module": (lambda: vmap(nnx.Embed(3, 2, rngs=nnx.Rngs(0)))(jnp.array([1, 1])).shape, (2, 2)),
}


@pytest.mark.thinned
@pytest.mark.parametrize(("run", "expected"), VALUES.values(), ids=VALUES.keys())
def test_values(run: Callable[[], Any], expected: Any) -> None:
    _equal(run(), expected)


def test_under_jit_and_grad() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return vmap(lambda row: jnp.sum(row**2), chunk_size=1)(x).sum()

    _equal(jax.jit(jax.grad(loss))(A), 2 * A)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("in_dims", "out_dims"), [(0, 0), (1, 1), (-1, -2)])
def test_chunks_change_nothing(chunk_size: int, in_dims: int, out_dims: int) -> None:
    """TestVmapAPI's chunk_size variants"""
    x = jnp.moveaxis(jnp.arange(15.0).reshape(5, 3), 0, in_dims)

    def func(row: jax.Array, y: jax.Array) -> Any:
        return row * y, {"outer": jnp.outer(row, y), "constant": y}

    chunked, whole = (
        vmap(func, (in_dims, None), (out_dims, {"outer": out_dims, "constant": None}), chunk_size=size)(x, jnp.ones(3))
        for size in (chunk_size, None)
    )
    _equal(chunked, whole)


def test_chunks_run_one_after_another() -> None:
    calls: list[jax.Array] = []
    vmap(lambda x: calls.append(x) or x, chunk_size=2)(jnp.arange(5.0))
    assert len(calls) == 3


def test_outputs_that_are_no_arrays_are_passed_on() -> None:
    """test_out_dims_none"""
    mapped, *others = vmap(lambda x: (x, "a", None, 1), out_dims=(0, None, None, None))(A)
    _equal(mapped, A)
    assert others == ["a", None, 1]


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "randomness": (
        lambda: vmap(jnp.sin, randomness="random"),  # pyright: ignore[reportArgumentType]
        RuntimeError,
        "Only allowed values for randomness are 'error', 'different', or 'same'. Got random",
    ),
    "chunk_size": (
        lambda: vmap(jnp.sin, chunk_size=0),
        ValueError,
        "vmap: chunk_size should be None or greater than 0. (got 0)",
    ),
    # test_data_dependent_control_flow_throws, test_item_throws: these stay JAX's own errors
    "control flow": (
        lambda: vmap(lambda x: x if x.sum() else 2 * x)(A),
        jax.errors.TracerBoolConversionError,
        "traced",
    ),
    "item": (lambda: vmap(lambda x: x.sum().item())(A), jax.errors.ConcretizationTypeError, "item()"),
    "an error within": (lambda: vmap(lambda x: jnp.dot(x, jnp.ones(5)))(A), TypeError, "dot"),
}


@pytest.mark.parametrize(("run", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(run: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        run()


def test_a_value_error_within_the_function_stays_as_it_is() -> None:
    def func(x: jax.Array) -> jax.Array:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        vmap(func)(A)
    assert not isinstance(caught.value, InputError)


# randomness


class Noisy(nnx.Module):
    def __init__(self) -> None:
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(x)


ROWS = jnp.ones((3, 32))


def _noise(x: jax.Array) -> jax.Array:
    return functional_call(Noisy(), {}, x)


def _run(func: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return jax.jit(vmap(func, **options))(*args)


def _distinct(rows: jax.Array) -> int:
    return len({np.asarray(row).tobytes() for row in rows})


def test_drawing_is_an_error_by_default() -> None:
    text = "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different'"
    with pytest.raises(StateError, match=re.escape(text)):
        vmap(_noise)(ROWS)


def test_a_module_that_does_not_draw_is_no_error() -> None:
    module = Noisy()
    module.eval()
    _equal(vmap(lambda x: functional_call(module, {}, x))(ROWS), ROWS)


def test_the_same_for_every_element() -> None:
    same = _run(_noise, ROWS, randomness="same")
    assert _distinct(same) == 1
    _equal(same[0], _noise(ROWS[0]))


def test_different_for_every_element_and_alike_in_chunks() -> None:
    whole, chunked = (_run(_noise, ROWS, randomness="different", chunk_size=size) for size in (None, 2))
    assert _distinct(whole) == 3
    _equal(chunked, whole)


@pytest.mark.parametrize(
    ("outer", "inner", "distinct"),
    [("different", "different", 6), ("different", "same", 2), ("same", "different", 3), ("same", "same", 1)],
)
def test_nested_randomness(outer: Any, inner: Any, distinct: int) -> None:
    result = _run(vmap(_noise, randomness=inner), jnp.ones((2, 3, 32)), randomness=outer)
    assert _distinct(result.reshape(6, 32)) == distinct


@pytest.mark.parametrize(("outer", "inner"), [("error", "different"), ("different", "error")])
def test_one_level_in_error_mode_is_enough(outer: Any, inner: Any) -> None:
    with pytest.raises(StateError, match="called random operation"):
        vmap(vmap(_noise, randomness=inner), randomness=outer)(jnp.ones((2, 3, 32)))


def test_a_compiled_function_within_follows_the_randomness_around_it() -> None:
    """`jax.jit` keeps traces; the axis names around a function must tell apart those that draw otherwise."""
    compiled = jax.jit(_noise)
    different, same = vmap(compiled, randomness="different")(ROWS), vmap(compiled, randomness="same")(ROWS)
    chunked = vmap(compiled, randomness="different", chunk_size=2)(ROWS)
    assert (_distinct(different), _distinct(same)) == (3, 1)
    _equal(chunked, different)
    with pytest.raises(StateError, match="called random operation"):
        vmap(compiled)(ROWS)
    _equal(compiled(ROWS[0]), same[0])


def test_streams_with_a_key_for_each_of_several_draw_apart() -> None:
    module = nnx.Dict(stream=nnx.RngStream(jax.random.split(jax.random.key(0), 2), tag="x"))

    def draw(_: jax.Array) -> jax.Array:
        _, buffers = functional_call(Draws(module), {}, mutable=True)
        return buffers["drawn"]

    drawn = _run(draw, jnp.ones(3), randomness="different")
    assert drawn.shape == (3, 2)
    assert len(set(np.asarray(drawn).ravel().tolist())) == 6


class Draws(nnx.Module):
    """Draws once from each of the keys of a stream."""

    def __init__(self, holder: nnx.Dict) -> None:
        self.holder = holder
        self.drawn = nnx.Variable(jnp.zeros(2))

    def __call__(self) -> None:
        self.drawn[...] = jax.vmap(jax.random.uniform)(self.holder.stream.key[...])
