"""Calls of a Flax module with given state: PyTorch's own tests of `functional_call`, rewritten, and further ones.

Where a test stands for one of PyTorch's, its docstring says which (test/functorch/test_eager_transforms.py and
test/test_stateless.py of PyTorch).
"""

import copy
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import functional_call, stack_module_state
from jaxensemble.errors import UnsupportedError
from jaxensemble.modules.state import flatten, split


class Mock(nnx.Module):
    """`MockModule` of PyTorch's test_stateless.py: a line plus a buffer, and an attribute that is no array."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.l1: Any = nnx.Linear(1, 1, rngs=rngs)
        self.buffer = nnx.Variable(jnp.ones(1))
        self.foo = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.l1(x) + self.buffer


class MockTied(Mock):
    """`MockTiedModule`: bias and buffer each have a second name, under which they are added again."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.tied_bias = self.l1.bias
        self.tied_buffer = self.buffer

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + self.tied_bias + self.tied_buffer


X = jnp.array([[0.5]])
WEIGHT, BIAS, BUFFER = jnp.array([[2.0]]), jnp.array([5.0]), jnp.array([3.0])
ALL = {"l1.kernel": WEIGHT, "l1.bias": BIAS, "buffer": BUFFER}


@pytest.fixture
def mock() -> Mock:
    return Mock(nnx.Rngs(0))


@pytest.fixture
def tied() -> MockTied:
    return MockTied(nnx.Rngs(0))


def _arrays(module: nnx.Module) -> dict[str, Any]:
    state = split(module)
    return copy.deepcopy({name: flatten(getattr(state, name)) for name in ("params", "buffers", "constants")})


def _assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "dicts",
    [
        ALL,
        {"l1": {"kernel": WEIGHT, "bias": BIAS}, "buffer": BUFFER},
        ({"l1": {"kernel": WEIGHT, "bias": BIAS}}, {"buffer": BUFFER}),
        [{"l1.kernel": WEIGHT}, {"l1": {"bias": BIAS}}, {"buffer": BUFFER}],
        {name: np.asarray(value) for name, value in ALL.items()},
        nnx.State({"l1": {"kernel": nnx.Param(WEIGHT), "bias": nnx.Param(BIAS)}, "buffer": nnx.Variable(BUFFER)}),
    ],
    ids=["flat", "nested", "params and buffers", "three dicts", "numpy", "nnx.State"],
)
def test_given_arrays_are_used_and_the_module_stays(mock: Mock, dicts: Any) -> None:
    """test_functional_call, test_functional_call_tuple_dicts"""
    before, given = _arrays(mock), jax.tree.map(jnp.copy, dicts)
    output = functional_call(mock, dicts, X, strict=True)
    np.testing.assert_array_equal(output, X * 2 + 5 + 3)
    _assert_trees_equal(_arrays(mock), before)
    jax.tree.map(np.testing.assert_array_equal, dicts, given)


def test_what_is_not_given_is_the_module_s_own(mock: Mock) -> None:
    """test_reparametrize_some_weights, test_functional_call_tuple_dicts"""
    np.testing.assert_allclose(functional_call(mock, {"l1.kernel": WEIGHT}, X), X * 2 + mock.l1.bias[...] + 1)
    np.testing.assert_array_equal(functional_call(mock, (), X), mock(X))
    np.testing.assert_array_equal(functional_call(mock, {}, X), mock(X))


def test_the_module_stays_after_an_exception(mock: Mock) -> None:
    """test_reparametrize_module_fail_reset_to_original"""
    before = _arrays(mock)
    with pytest.raises(TypeError):
        functional_call(mock, ALL, jnp.ones((4, 5)))
    _assert_trees_equal(_arrays(mock), before)


def test_gradients_are_those_of_the_given_arrays(mock: Mock) -> None:
    """test_functional_call_with_gradient"""
    gradients = jax.grad(lambda arrays: functional_call(mock, arrays, X).sum())(ALL)
    _assert_trees_equal(gradients, {"l1.kernel": X, "l1.bias": jnp.ones(1), "buffer": jnp.ones(1)})


def test_buffers_come_back_if_asked_for() -> None:
    """test_functional_batch_norm; test_make_functional_state_correctly_returned_after_forward"""
    norm = nnx.BatchNorm(10, momentum=0.9, rngs=nnx.Rngs(0))
    x = jnp.full((20, 10), 128.0)
    given = {"mean": jnp.zeros(10)}
    output, buffers = functional_call(norm, given, x, mutable=True)
    np.testing.assert_allclose(buffers["mean"], jnp.full(10, 12.8), rtol=1e-6)
    assert list(buffers) == ["mean", "var"]
    np.testing.assert_array_equal(norm.mean[...], jnp.zeros(10))
    np.testing.assert_array_equal(given["mean"], jnp.zeros(10))
    np.testing.assert_array_equal(functional_call(norm, given, x), output)


class Counter(nnx.Module):
    """Counts its calls, by replacing the array or by adding in place."""

    def __init__(self, *, in_place: bool) -> None:
        self.foo = nnx.Variable(jnp.zeros(1))
        self.in_place = in_place

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.in_place:
            self.foo[...] += 1
        else:
            self.foo = nnx.Variable(self.foo + 1)
        return x + self.foo


@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_call_does_to_a_buffer_reaches_only_the_result(in_place: bool) -> None:
    """test_setattr, test_in_place_operator; PyTorch writes into what was passed"""
    counter, given = Counter(in_place=in_place), {"foo": jnp.array([2.0])}
    output, buffers = functional_call(counter, given, jnp.ones(1), mutable=True)
    assert (float(output[0]), float(buffers["foo"][0])) == (4, 3)
    assert (float(given["foo"][0]), float(counter.foo[0])) == (2, 0)


class Scaled(nnx.Module):
    def __init__(self, x: jax.Array) -> None:
        self.x = x

    def __call__(self, inp: Any, *, other: Any) -> Any:
        return jnp.asarray(inp) * self.x + other


def test_args_and_kwargs() -> None:
    """test_functional_call_with_kwargs; a list is one argument"""
    module, given = Scaled(jnp.ones(2)), {"x": jnp.zeros(2)}
    inp, other = jnp.ones(2), jnp.array([1.0, 2.0])
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'other'"):
        functional_call(module, given, inp)
    for args, kwargs in [
        (inp, {"other": other}),
        ((inp,), {"other": other}),
        ((), {"inp": inp, "other": other}),
        (None, {"inp": inp, "other": other}),
        ([1.0, 1.0], {"other": other}),
    ]:
        np.testing.assert_array_equal(functional_call(module, given, args, kwargs), other)


def test_a_name_given_twice_is_refused(mock: Mock) -> None:
    """test_functional_call_multiple_dicts_error"""
    text = "['l1.kernel'] appeared in multiple dictionaries; behavior of functional call is ambiguous"
    with pytest.raises(ValueError, match=re.escape(text)):
        functional_call(mock, (ALL, {"l1": {"kernel": WEIGHT}}), X)
    with pytest.raises(ValueError, match=re.escape(text)):
        functional_call(mock, {"l1": {"kernel": WEIGHT}, "l1.kernel": WEIGHT}, X)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (ALL | {"extra": BIAS}, "Unexpected key(s): 'extra'."),
        ({"l1.kernel": WEIGHT}, "Missing key(s): 'buffer', 'l1.bias'."),
        ({"l1.kernel": WEIGHT, "extra": BIAS}, "Unexpected key(s): 'extra'.\n\tMissing key(s): 'buffer', 'l1.bias'."),
        (ALL | {"foo": BIAS}, "Unexpected key(s): 'foo'."),
        ({"l1.kernel": 2.0, "foo": BIAS}, "Unexpected key(s): 'foo'.\n\tMissing key(s): 'buffer', 'l1.bias'."),
    ],
)
def test_strict_calls_name_what_is_missing_and_unexpected(mock: Mock, given: dict[str, Any], text: str) -> None:
    """test_reparametrize_strict"""
    with pytest.raises(RuntimeError, match=re.escape(f"Error(s) in reparametrizing for Mock:\n\t{text}")):
        functional_call(mock, given, X, strict=True)


class NotAnArray:
    def __repr__(self) -> str:
        return "<NotAnArray>"


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"l1.kernel": NotAnArray()}, TypeError, "<NotAnArray> is not an instance of jax.Array"),
        ({"l1.kernel": 2.0}, TypeError, "2.0 is not an instance of jax.Array"),
        ({"foo": BIAS}, TypeError, "attribute `foo`: 0.0 is not an instance of jax.Array"),
        ({"l1": BIAS}, TypeError, "attribute `l1`: Linear is not an instance of jax.Array"),
        ({"foo.bar": BIAS}, TypeError, "submodule `foo`: 0.0 is not an instance of flax.nnx.Module"),
        ({"l2.bias": BIAS}, AttributeError, "Mock has no attribute `l2`"),
        ({"l1.weight": BIAS}, AttributeError, "Linear has no attribute `weight`"),
        ({"extra": BIAS}, AttributeError, "Mock has no attribute `extra`"),
        ([1], ValueError, "Expected all elements of parameter_and_buffer_dicts to be dictionaries"),
        (
            1,
            ValueError,
            "Expected parameter_and_buffer_dicts to be a dict, or a list/tuple of dicts, but got <class 'int",
        ),
    ],
)
def test_names_and_values_that_are_no_arrays(mock: Mock, given: Any, error: type[Exception], text: str) -> None:
    """test_reparametrize_special"""
    with pytest.raises(error, match=re.escape(text)):
        functional_call(mock, given, X)


class Optional(nnx.Module):
    def __init__(self) -> None:
        self.shift = nnx.Param(jnp.ones(1))
        self.same = self.shift

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + sum(shift[...] for shift in (self.shift, self.same) if shift is not None)


def test_none_takes_the_place_of_an_optional_array() -> None:
    """test_reparametrize_special"""
    module = Optional()
    np.testing.assert_array_equal(functional_call(module, {"shift": None}, X), X)
    np.testing.assert_array_equal(functional_call(module, {"shift": None}, X, tie_weights=False), X + 1)
    np.testing.assert_array_equal(functional_call(module, {"same": None}, X, tie_weights=False), X + 1)
    assert module.shift is module.same is not None


@pytest.mark.parametrize("names", [("l1.bias", "buffer"), ("tied_bias", "tied_buffer"), ("tied_bias", "buffer")])
def test_any_name_of_a_tied_array_stands_for_all(tied: MockTied, names: tuple[str, str]) -> None:
    """test_reparametrize_tie_weights, test_reparametrize_tie_weights_strict"""
    given = {"l1.kernel": WEIGHT, names[0]: BIAS, names[1]: BUFFER}
    np.testing.assert_array_equal(functional_call(tied, given, X, strict=True), X * 2 + 2 * 5 + 2 * 3)


def test_some_tied_arrays_are_given(tied: MockTied) -> None:
    """test_reparametrize_tie_some_weights"""
    output = functional_call(tied, {"l1.kernel": WEIGHT, "buffer": BUFFER}, X)
    np.testing.assert_allclose(output, X * 2 + 2 * tied.l1.bias[...] + 2 * 3)


def test_tied_arrays_take_one_value(tied: MockTied) -> None:
    """test_tied_weights_errors"""
    both = ALL | {"tied_bias": BIAS, "tied_buffer": BUFFER}
    np.testing.assert_array_equal(functional_call(tied, both, X), X * 2 + 2 * 5 + 2 * 3)
    for name, names in (("tied_bias", ["l1.bias", "tied_bias"]), ("tied_buffer", ["buffer", "tied_buffer"])):
        text = f"functional_call got multiple values for keys {names}, which are tied. Consider using tie_weights=False"
        with pytest.raises(ValueError, match=re.escape(text)):
            functional_call(tied, ALL | {name: jnp.array([7.0])}, X)


def test_ties_can_be_loosened(tied: MockTied) -> None:
    """test_tied_weights_no_error_without_flag"""
    own_bias, own_buffer = tied.l1.bias[...], tied.buffer[...]
    loose = functional_call(tied, ALL, X, tie_weights=False)
    np.testing.assert_allclose(loose, X * 2 + 5 + 3 + own_bias + own_buffer)
    apart = functional_call(tied, ALL | {"tied_bias": jnp.array([7.0])}, X, tie_weights=False)
    np.testing.assert_allclose(apart, X * 2 + 5 + 3 + 7 + own_buffer)
    other = functional_call(tied, {"l1.kernel": WEIGHT, "tied_bias": BIAS}, X, tie_weights=False)
    np.testing.assert_allclose(other, X * 2 + own_bias + 5 + 2 * own_buffer)
    assert tied.tied_bias is tied.l1.bias


@pytest.mark.parametrize(
    ("given", "tie_weights", "text"),
    [
        (ALL, False, "Missing key(s): 'tied_bias', 'tied_buffer'."),
        ({"l1.kernel": WEIGHT, "buffer": BUFFER}, True, "Missing key(s): 'l1.bias', 'tied_bias'."),
        (ALL | {"extra": BIAS}, True, "Unexpected key(s): 'extra'."),
        (
            ALL | {"extra": BIAS},
            False,
            "Unexpected key(s): 'extra'.\n\tMissing key(s): 'tied_bias', 'tied_buffer'.",
        ),
    ],
)
def test_strict_calls_and_ties(tied: MockTied, given: dict[str, Any], tie_weights: bool, text: str) -> None:
    """test_reparametrize_tie_weights_strict"""
    with pytest.raises(RuntimeError, match=re.escape(text)):
        functional_call(tied, given, X, tie_weights=tie_weights, strict=True)


def test_ties_within_plain_containers_cannot_be_loosened() -> None:
    param = nnx.Param(jnp.ones(1))
    module = nnx.Dict(a=param, b=nnx.data([param]))
    with pytest.raises(UnsupportedError, match=re.escape("`b.0` is within a list")):
        functional_call(module, {"a": BIAS}, tie_weights=False)


def test_names_may_go_round_in_circles(mock: Mock) -> None:
    """test_circular_references"""
    mock.l1.m = mock
    given = {"l1.m.l1.kernel": WEIGHT, "l1.bias": BIAS, "l1.m.buffer": BUFFER}
    for tie_weights in (False, True):
        output = functional_call(mock, given, X, tie_weights=tie_weights, strict=True)
        np.testing.assert_array_equal(output, X * 2 + 5 + 3)


class Looks(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.l1 = nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return self.l1(x), split(self).params


def test_a_module_sees_the_given_arrays_as_its_own() -> None:
    """test_functional_call_member_reference"""
    _, params = functional_call(Looks(nnx.Rngs(0)), {"l1.kernel": WEIGHT, "l1.bias": BIAS}, X)
    _assert_trees_equal(params, {"l1": {"kernel": WEIGHT, "bias": BIAS}})


def test_random_streams_draw_from_the_module_s_keys_or_from_given_ones() -> None:
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    x = jnp.ones((8, 8))
    first, second = functional_call(dropout, {}, x), functional_call(dropout, {}, x)
    np.testing.assert_array_equal(first, second)
    other = functional_call(dropout, {"rngs.key": jax.random.key(5)}, x, strict=True)
    assert bool(jnp.any(other != first))
    assert int(dropout.rngs.count[...]) == 0  # pyright: ignore[reportOptionalMemberAccess]


def test_gradients_through_ties_add_up(tied: MockTied) -> None:
    """test_parameter_tying_grad"""
    gradients = jax.grad(lambda arrays: functional_call(tied, arrays, X).sum())(ALL)
    _assert_trees_equal(gradients, {"l1.kernel": X, "l1.bias": jnp.full(1, 2.0), "buffer": jnp.full(1, 2.0)})


def test_tied_parameters_are_stacked_once(tied: MockTied) -> None:
    """test_parameter_tying_ensemble, test_buffer_tying"""
    params, buffers = stack_module_state([tied, MockTied(nnx.Rngs(1))])
    assert (list(flatten(params)), list(flatten(buffers))) == (["l1.bias", "l1.kernel"], ["buffer"])
    outputs = jax.vmap(lambda p, b: functional_call(tied, (p, b), X))(params, buffers)
    np.testing.assert_allclose(outputs[0], tied(X))
