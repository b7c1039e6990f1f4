"""Stacking the states of Flax modules: PyTorch's own tests, rewritten, and further ones.

If a test rewrites one of PyTorch's (test/functorch/test_eager_transforms.py), its docstring names it.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx

import jaxensemble
from jaxensemble import combine_state_for_ensemble, functional_call, stack_module_state, unstack_module_state
from jaxensemble.errors import InputError, MemberError, StateError
from jaxensemble.layers.variables import Constant
from jaxensemble.modules.state import merge, split


class Mlp(nnx.Module):
    def __init__(self, hidden: int, *, rngs: nnx.Rngs, rate: float = 0.0) -> None:
        self.l1 = nnx.Linear(3, hidden, rngs=rngs)
        self.norm = nnx.BatchNorm(hidden, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.l2 = nnx.Linear(hidden, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.l2(self.dropout(nnx.relu(self.norm(self.l1(x)))))


def _mlps(count: int, hidden: int = 4, **options: Any) -> list[Mlp]:
    return [Mlp(hidden, rngs=nnx.Rngs(seed), **options) for seed in range(count)]


def _assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("count", [1, 3])
def test_stacked_state_run_by_vmap_is_what_the_modules_give(count: int) -> None:
    """test_stack_module_state_smoke"""
    modules = _mlps(count)
    for module in modules:
        module.eval()
    params, buffers = stack_module_state(modules)
    x = jnp.arange(12.0).reshape(4, 3)
    outputs = jax.jit(jax.vmap(lambda p, b: functional_call(modules[0], (p, b), x)))(params, buffers)
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
    outputs = jax.jit(jaxensemble.vmap(func, (0, 0, None)))(params, buffers, x)
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
    assert "member 1: expected tests.jaxensemble.modules.test_stacking.Mlp, got flax.nnx.nn.linear.Linear" in str(
        classes.value
    )


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
    with pytest.raises(MemberError, match="Expected all models to be the same except for the values") as caught:
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


# training, after PyTorch's TestExamplesCorrectness


def _loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((outputs - targets) ** 2)


def _step(module: Mlp, params: Any, buffers: Any, rate: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
    """One step of gradient descent: the loss, and the parameters after it."""

    def loss(params: Any) -> jax.Array:
        return _loss(functional_call(module, (params, buffers), x), y)

    value, gradients = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - rate * g, params, gradients)


def _double(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf


@pytest.fixture
def doubles(x64: None) -> list[Mlp]:
    return [merge(*jax.tree.map(_double, split(module))) for module in _mlps(2)]


def _data(rows: int) -> tuple[jax.Array, jax.Array]:
    x, y = jax.random.split(jax.random.key(0))
    return jax.random.normal(x, (rows, 3), jnp.float64), jax.random.normal(y, (rows, 2), jnp.float64)


def _assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), a, b)


@pytest.mark.parametrize("rates", [(0.2, 0.2), (0.1, 0.5)], ids=["one rate", "a rate each"])
def test_a_mapped_training_step_is_each_member_s_own(doubles: list[Mlp], rates: tuple[float, float]) -> None:
    """test_ensemble_regression, test_find_learning_rate_ensembling, test_update_batch_norm"""
    data = _data(6)
    step = jaxensemble.vmap(functools.partial(_step, doubles[0]), (0, 0, 0, None, None), randomness="same")
    losses, params = jax.jit(step)(*stack_module_state(doubles), jnp.array(rates), *data)
    for member, (module, rate) in enumerate(zip(doubles, rates, strict=True)):
        _, own, buffers, *_ = split(module)
        loss, expected = jax.jit(functools.partial(_step, module))(own, buffers, rate, *data)
        _assert_close((losses[member], jax.tree.map(lambda leaf, at=member: leaf[at], params)), (loss, expected))


def test_gradients_of_each_sample_are_those_of_a_loop(doubles: list[Mlp]) -> None:
    """test_resnet18_per_sample_grads, on a small network"""
    module = doubles[0]
    module.eval()
    params = split(module).params

    def gradient(x: jax.Array, y: jax.Array) -> Any:
        return jax.grad(lambda params: _loss(functional_call(module, params, x[None]), y[None]))(params)

    data = _data(3)
    mapped, gradient = jax.jit(jaxensemble.vmap(gradient))(*data), jax.jit(gradient)
    for sample, (x, y) in enumerate(zip(*data, strict=True)):
        _assert_close(jax.tree.map(lambda leaf, at=sample: leaf[at], mapped), gradient(x, y))


def test_gradients_through_a_training_step(doubles: list[Mlp]) -> None:
    """test_maml_regression, test_maml_omniglot: the gradient after a step, against finite differences"""
    module, data = doubles[0], _data(4)
    module.eval()
    _, params, buffers, *_ = split(module)

    def after_step(shift: jax.Array) -> jax.Array:
        shifted = params | {"l2": params["l2"] | {"bias": params["l2"]["bias"] + shift}}
        _, stepped = _step(module, shifted, buffers, jnp.array(0.1), *data)
        return _loss(functional_call(module, (stepped, buffers), data[0]), data[1])

    jax.test_util.check_grads(jax.jit(after_step), (jnp.array(0.3),), order=1, modes=["rev"], rtol=1e-6)
