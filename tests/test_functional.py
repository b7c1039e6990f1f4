"""`torch.func`'s way with modules, over Flax: PyTorch's own tests of it, rewritten, and what is ours.

Where a test stands for one of PyTorch's, its docstring says which (test/functorch/test_eager_transforms.py and
test/test_stateless.py of PyTorch).
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxensemble
from jaxensemble import combine_state_for_ensemble, functional_call, stack_module_state, unstack_module_state
from jaxensemble.errors import InputError, MemberError, StateError, UnsupportedError
from jaxensemble.state import Constant, flatten, split


class Mock(nnx.Module):
    """`MockModule` of PyTorch's test_stateless.py: a line plus a buffer, and an attribute that is no array."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.l1 = nnx.Linear(1, 1, rngs=rngs)
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


class Mlp(nnx.Module):
    def __init__(self, hidden: int, *, rngs: nnx.Rngs, rate: float = 0.0) -> None:
        self.l1 = nnx.Linear(3, hidden, rngs=rngs)
        self.norm = nnx.BatchNorm(hidden, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.l2 = nnx.Linear(hidden, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.l2(self.dropout(nnx.relu(self.norm(self.l1(x)))))


X = jnp.array([[0.5]])
WEIGHT, BIAS, BUFFER = jnp.array([[2.0]]), jnp.array([5.0]), jnp.array([3.0])
ALL = {"l1.kernel": WEIGHT, "l1.bias": BIAS, "buffer": BUFFER}


@pytest.fixture
def mock() -> Mock:
    return Mock(nnx.Rngs(0))


@pytest.fixture
def tied() -> MockTied:
    return MockTied(nnx.Rngs(0))


def _mlps(count: int, hidden: int = 4, **options: Any) -> list[Mlp]:
    return [Mlp(hidden, rngs=nnx.Rngs(seed), **options) for seed in range(count)]


def _arrays(module: nnx.Module) -> dict[str, Any]:
    state = split(module)
    return copy.deepcopy({name: flatten(getattr(state, name)) for name in ("params", "buffers", "constants")})


def _assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# stack_module_state and its inverse


@pytest.mark.parametrize("count", [1, 3])
def test_stacked_state_run_by_vmap_is_what_the_modules_give(count: int) -> None:
    """test_stack_module_state_smoke"""
    modules = _mlps(count)
    for module in modules:
        module.eval()
    params, buffers = stack_module_state(modules)
    x = jnp.arange(12.0).reshape(4, 3)
    outputs = jax.vmap(lambda p, b: functional_call(modules[0], (p, b), x))(params, buffers)
    np.testing.assert_allclose(outputs, jnp.stack([module(x) for module in modules]), rtol=1e-6)


def test_stacked_names_and_shapes() -> None:
    params, buffers = stack_module_state(_mlps(5))
    assert jax.tree.map(jnp.shape, params) == {
        "l1": {"bias": (5, 4), "kernel": (5, 3, 4)},
        "l2": {"bias": (5, 2), "kernel": (5, 4, 2)},
        "norm": {"bias": (5, 4), "scale": (5, 4)},
    }
    assert jax.tree.map(jnp.shape, buffers) == {"norm": {"mean": (5, 4), "var": (5, 4)}}


def test_the_stack_does_not_follow_the_modules() -> None:
    """test_stack_module_state_leaf, as far as JAX has it: arrays of its own, with no `requires_grad`."""
    modules = _mlps(2)
    params, _ = stack_module_state(modules)
    before = np.array(params["l1"]["kernel"])
    modules[0].l1.kernel[...] = jnp.zeros((3, 4))
    np.testing.assert_array_equal(params["l1"]["kernel"], before)


def test_unstacking_is_the_inverse_of_stacking() -> None:
    modules = _mlps(3)
    members = unstack_module_state(*stack_module_state(modules))
    for module, (params, buffers) in zip(modules, members, strict=True):
        _assert_trees_equal((params, buffers), (split(module).params, split(module).buffers))


@pytest.mark.parametrize(
    ("params", "buffers", "text"),
    [
        ({}, {}, "there are no parameters and no buffers"),
        ({"a": jnp.ones((2, 1))}, {"b": jnp.ones((3, 1))}, "params: a [2, 1]\n  buffers: b [3, 1]"),
        ({"a": jnp.ones(())}, {}, "params: a []"),
        ({"a": jnp.ones((0, 2))}, {}, "M of at least 1; got\n  params: a [0, 2]"),
    ],
)
def test_unstacking_wants_one_member_axis(params: Any, buffers: Any, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        unstack_module_state(params, buffers)


def test_combined_state_run_by_vmap_is_what_the_modules_give() -> None:
    """test_combine_state_for_ensemble_smoke"""
    modules = _mlps(3)
    for module in modules:
        module.eval()
    func, params, buffers = combine_state_for_ensemble(modules)
    x = jnp.arange(12.0).reshape(4, 3)
    outputs = jaxensemble.vmap(func, (0, 0, None))(params, buffers, x)
    np.testing.assert_allclose(outputs, jnp.stack([module(x) for module in modules]), rtol=1e-6)


def test_a_combined_function_wants_the_whole_state() -> None:
    func, params, _ = combine_state_for_ensemble(_mlps(2))
    with pytest.raises(StateError, match=re.escape("Missing key(s): 'norm.mean', 'norm.var'.")):
        func(params, {}, jnp.ones((1, 3)))


def _with(module: Any, change: Callable[[Any], Any]) -> Any:
    change(module)
    return module


STACKERS = [stack_module_state, combine_state_for_ensemble]


@pytest.mark.parametrize("stacker", STACKERS)
def test_no_modes_or_classes_are_mixed(stacker: Callable[..., Any]) -> None:
    """test_stack_module_state_error, test_combine_state_for_ensemble_error"""
    name = stacker.__name__
    with pytest.raises(RuntimeError, match=f"{name}: Expected at least one model, got 0."):
        stacker([])
    first, second = _mlps(2)
    second.eval()
    with pytest.raises(RuntimeError, match=f"{name}: Expected all models to have the same training/eval mode.") as mode:
        stacker([first, second])
    assert "member 1, `norm.use_running_average`: expected False, got True" in str(mode.value)
    with pytest.raises(RuntimeError, match=f"{name}: Expected all models to be of the same class.") as classes:
        stacker([first, nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
    assert "member 1: expected test_functional.Mlp, got flax.nnx.nn.linear.Linear" in str(classes.value)


def _lacking(name: str) -> Callable[[Any], Any]:
    return lambda module: setattr(module.l1, name, nnx.data(None))


MISMATCHES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "shape": (
        lambda: Mlp(5, rngs=nnx.Rngs(0)),
        ["member 1, `l1.kernel`: expected float32[3, 4], got float32[3, 5]", "`l1.out_features`: expected 4, got 5"],
    ),
    "missing key": (
        lambda: _with(_mlps(1)[0], _lacking("bias")),
        ["member 1, `l1.bias`: expected Param(), got None"],
    ),
    "extra key": (
        lambda: _with(_mlps(1)[0], lambda m: setattr(m, "extra", nnx.Param(jnp.ones(1)))),
        ["member 1, `extra`: expected nothing, got Param()"],
    ),
    "dtype": (
        lambda: _with(_mlps(1)[0], lambda m: setattr(m.l1, "bias", nnx.Param(jnp.ones(4, jnp.bfloat16)))),
        ["member 1, `l1.bias`: expected float32[4], got bfloat16[4]"],
    ),
    "rate": (lambda: Mlp(4, rngs=nnx.Rngs(0), rate=0.5), ["member 1, `dropout.rate`: expected 0.0, got 0.5"]),
    "epsilon": (
        lambda: _with(_mlps(1)[0], lambda m: setattr(m.norm, "epsilon", 1e-3)),
        ["member 1, `norm.epsilon`: expected 1e-05, got 0.001"],
    ),
    "kind": (
        lambda: _with(_mlps(1)[0], lambda m: setattr(m.l1, "bias", nnx.Variable(jnp.ones(4)))),
        ["member 1, `l1.bias`: expected Param(), got Variable()"],
    ),
}


@pytest.mark.parametrize(("make", "expected"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_what_else_differs_is_refused_with_name_and_member(make: Callable[[], Any], expected: list[str]) -> None:
    """test_stack_module_state_mismatch_error; PyTorch stacks some of these"""
    with pytest.raises(MemberError, match="Expected all models to be the same but for the values") as caught:
        stack_module_state([_mlps(1)[0], make()])
    for line in expected:
        assert line in str(caught.value)


def test_every_difference_of_every_member_is_in_one_error() -> None:
    modules = [*_mlps(2), Mlp(4, rngs=nnx.Rngs(0), rate=0.5), Mlp(5, rngs=nnx.Rngs(0))]
    with pytest.raises(MemberError) as caught:
        stack_module_state(modules)
    assert {"member 2", "member 3"} <= set(re.findall(r"member \d", str(caught.value)))
    assert "member 1" not in str(caught.value)


def test_constants_must_be_equal() -> None:
    def make(value: float) -> nnx.Module:
        return nnx.Dict(weight=nnx.Param(jnp.ones(2)), table=Constant(jnp.full(2, value)))

    params, buffers = stack_module_state([make(1.0), make(1.0)])
    assert (list(params), buffers) == (["weight"], {})
    with pytest.raises(MemberError, match="member 1, `table`: a Constant has one value for all members"):
        stack_module_state([make(1.0), make(2.0)])


def test_wide_arrays_are_not_rounded() -> None:
    with jax.enable_x64(True):
        modules = [nnx.Dict(weight=nnx.Param(jnp.ones(2, jnp.float64))) for _ in range(2)]
        assert stack_module_state(modules)[0]["weight"].dtype == jnp.float64
    with pytest.raises(InputError, match="`weight` is float64, which JAX would round"):
        stack_module_state(modules)


def test_tied_parameters_are_stacked_once(tied: MockTied) -> None:
    """test_parameter_tying_ensemble, test_buffer_tying"""
    params, buffers = stack_module_state([tied, MockTied(nnx.Rngs(1))])
    assert (list(flatten(params)), list(flatten(buffers))) == (["l1.bias", "l1.kernel"], ["buffer"])
    outputs = jax.vmap(lambda p, b: functional_call(tied, (p, b), X))(params, buffers)
    np.testing.assert_allclose(outputs[0], tied(X))


# functional_call


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
    before, given = _arrays(mock), copy.deepcopy(dicts)
    output = functional_call(mock, dicts, X, strict=True)
    np.testing.assert_array_equal(output, X * 2 + 5 + 3)
    _assert_trees_equal(_arrays(mock), before)
    _assert_trees_equal(dicts, given)


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


def test_none_takes_the_place_of_an_optional_array(mock: Mock, tied: MockTied) -> None:
    """test_reparametrize_special"""
    output = functional_call(mock, {"l1.kernel": WEIGHT, "l1.bias": None, "buffer": BUFFER}, X)
    np.testing.assert_array_equal(output, X * 2 + 3)
    assert mock.l1.bias is not None


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


def test_none_loosens_a_tie_where_it_is_given(tied: MockTied) -> None:
    with pytest.raises(TypeError, match="NoneType"):
        functional_call(tied, ALL | {"tied_bias": None}, X, tie_weights=False)


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


# training, after PyTorch's TestExamplesCorrectness


def _loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((outputs - targets) ** 2)


def _steps(modules: list[Mlp], rates: jax.Array, x: jax.Array, y: jax.Array) -> list[tuple[Any, Any]]:
    """One step of gradient descent for each module by itself."""

    def one(module: Mlp, rate: jax.Array) -> tuple[Any, Any]:
        state = split(module)
        loss, gradients = jax.value_and_grad(lambda p: _loss(functional_call(module, (p, state.buffers), x), y))(
            state.params
        )
        return loss, jax.tree.map(lambda p, g: p - rate * g, state.params, gradients)

    return [one(module, rate) for module, rate in zip(modules, rates, strict=True)]


def _all_steps(modules: list[Mlp], rates: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
    """The same for all modules at once."""

    def one(params: Any, buffers: Any, rate: jax.Array) -> tuple[Any, Any]:
        loss, gradients = jax.value_and_grad(lambda p: _loss(functional_call(modules[0], (p, buffers), x), y))(params)
        return loss, jax.tree.map(lambda p, g: p - rate * g, params, gradients)

    return jaxensemble.vmap(one, randomness="same")(*stack_module_state(modules), rates)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rates", [(0.2, 0.2), (0.1, 0.5)], ids=["one rate", "a rate each"])
def test_a_mapped_training_step_is_each_member_s_own(rates: tuple[float, float]) -> None:
    """test_ensemble_regression, test_find_learning_rate_ensembling, test_update_batch_norm"""
    modules = _mlps(2)
    for module in modules:
        nnx.update(module, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(module, nnx.Param)))
    x = jax.random.normal(jax.random.key(0), (6, 3), jnp.float64)
    y = jax.random.normal(jax.random.key(1), (6, 2), jnp.float64)
    losses, params = _all_steps(modules, jnp.array(rates), x, y)
    for member, (loss, expected) in enumerate(_steps(modules, jnp.array(rates), x, y)):
        np.testing.assert_allclose(losses[member], loss, rtol=1e-12)
        jax.tree.map(
            lambda a, b, at=member: np.testing.assert_allclose(a[at], b, rtol=1e-11, atol=1e-13), params, expected
        )


def test_gradients_through_ties_add_up(tied: MockTied) -> None:
    """test_parameter_tying_grad"""
    gradients = jax.grad(lambda arrays: functional_call(tied, arrays, X).sum())(ALL)
    _assert_trees_equal(gradients, {"l1.kernel": X, "l1.bias": jnp.full(1, 2.0), "buffer": jnp.full(1, 2.0)})
