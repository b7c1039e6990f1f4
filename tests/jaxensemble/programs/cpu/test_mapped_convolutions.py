"""Convolutions whose kernels are mapped: the numbers, gradients and shapes of `jax.vmap` over XLA's own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxensemble import functional_call, stack_module_state, vmap
from jaxensemble.compat import JaxprEqn
from jaxensemble.programs.cpu.mapped_convolutions import mapped_convolution
from jaxensemble.programs.rewrite import CONVOLUTION, equations

pytestmark = pytest.mark.usefixtures("x64")

KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 5, 6, 3), (3, 2, 3, 4), {"window_strides": (1, 1), "padding": "VALID"}),
    "strided": ((2, 5, 6, 2), (3, 3, 2, 4), {"window_strides": (2, 1), "padding": [(1, 1), (0, 2)]}),
    "groups": ((2, 5, 6, 4), (2, 2, 2, 6), {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2}),
    "dilated": ((2, 7, 3), (2, 3, 4), {"window_strides": (1,), "padding": "SAME", "rhs_dilation": (2,)}),
    "input dilated": ((2, 4, 3), (2, 3, 4), {"window_strides": (1,), "padding": [(1, 0)], "lhs_dilation": (2,)}),
}

Two = Callable[[jax.Array, jax.Array], Any]
MAPPINGS: dict[str, Callable[[Two], Two]] = {
    "kernels": lambda f: lambda x, k: jax.vmap(f, (None, 0))(x[0, 0], k[0]),
    "both": lambda f: lambda x, k: jax.vmap(f)(x[0], k[0]),
    "inputs": lambda f: lambda x, k: jax.vmap(f, (0, None))(x[0], k[0, 0]),
    "nested": lambda f: jax.vmap(jax.vmap(f)),
    "nested, one each": lambda f: lambda x, k: jax.vmap(lambda k: jax.vmap(lambda x: f(x, k))(x[0]))(k[0]),
    "none": lambda f: lambda x, k: f(x[0, 0], k[0, 0]),
}


def _arrays(kind: str) -> tuple[jax.Array, jax.Array, Two, Two]:
    shape, kernel, options = KINDS[kind]
    rng = np.random.default_rng(0)
    n = len(shape)
    numbers = lax.ConvDimensionNumbers(
        (0, n - 1, *range(1, n - 1)), (n - 1, n - 2, *range(n - 2)), (0, n - 1, *range(1, n - 1))
    )

    def of(step: Callable[..., jax.Array]) -> Two:
        return lambda x, k: step(x, k, dimension_numbers=numbers, **options)

    x, k = (jnp.asarray(rng.normal(size=(2, 3, *size))) for size in (shape, kernel))
    return x, k, of(mapped_convolution), of(lax.conv_general_dilated)


@pytest.mark.thinned
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives_are_those_of_jax(kind: str) -> None:
    x, k, ours, theirs = _arrays(kind)

    @jax.jit
    def found(x: jax.Array, k: jax.Array) -> Any:
        def everything(step: Two) -> Any:
            results = []
            for mapping in MAPPINGS.values():
                inside = mapping(lambda x, k: jax.grad(lambda x, k: (step(x, k) ** 3).sum(), (0, 1))(x, k))
                outside = jax.grad(lambda x, k, mapping=mapping: (mapping(step)(x, k) ** 3).sum(), (0, 1))
                results.append((mapping(step)(x, k), inside(x, k), outside(x, k)))
            results.append(jax.jvp(MAPPINGS["both"](step), (x, k), (k.sum() * x, x.sum() * k)))
            square = lambda k: (MAPPINGS["kernels"](step)(x, k) ** 3).sum()  # noqa: E731
            results.append(jax.jvp(jax.grad(square), (k,), (k,)))
            return results

        return everything(ours), everything(theirs)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), *found(x, k))


class Net(nnx.Module):
    def __init__(self, seed: int, **options: Any) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(seed), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 6, 3)))


COMPILED: list[str] = []


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if "backend_compile" in event:
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def _convolutions(module: Net, function: Callable[..., Any], *args: Any) -> list[JaxprEqn]:
    steps = equations(jax.make_jaxpr(lambda *args: function(module, *args))(*args))
    return [step for step in steps if step.primitive.name == CONVOLUTION]


def _over_members(module: Net, params: Any, x: Any) -> Any:
    return vmap(lambda params, x: functional_call(module, params, x))(params, x)


def test_a_module_s_convolutions_are_not_grouped() -> None:
    modules = [Net(seed) for seed in range(3)]
    params, _ = stack_module_state(modules)
    (step,) = _convolutions(modules[0], _over_members, params, X)
    kernel: Any = step.invars[1].aval
    assert step.params["feature_group_count"] == 1 and kernel.shape == (3, 3, 3, 4)
    np.testing.assert_allclose(
        _over_members(modules[0], params, X),
        jnp.stack([module(x) for module, x in zip(modules, X, strict=True)]),
        rtol=1e-12,
    )
    np.testing.assert_array_equal(functional_call(modules[0], {}, X[0]), modules[0](X[0]))
    assert modules[0].conv.conv_general_dilated is lax.conv_general_dilated


def test_what_a_module_convolves_with_itself_stays() -> None:
    def own(*args: Any, **options: Any) -> jax.Array:
        return 2 * lax.conv_general_dilated(*args, **options)

    params, _ = stack_module_state([Net(seed, conv_general_dilated=own) for seed in range(3)])
    module = Net(0, conv_general_dilated=own)
    (step,) = _convolutions(module, _over_members, params, X)
    assert step.params["feature_group_count"] == 3
    np.testing.assert_allclose(_over_members(module, params, X)[0], module(X[0]), rtol=1e-12)


def test_repeated_calls_compile_nothing() -> None:
    params, _ = stack_module_state([Net(seed) for seed in range(3)])
    module = Net(0)
    _over_members(module, params, X)
    COMPILED.clear()
    _over_members(module, params, X)
    assert not COMPILED
    _over_members(module, params, X[:, :1])
    assert COMPILED
