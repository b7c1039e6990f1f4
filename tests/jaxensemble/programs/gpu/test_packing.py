"""Members packed in channels: the same numbers, with fewer steps between convolutions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble
from jaxensemble.programs.gpu.packing import pack_members
from jaxensemble.programs.rewrite import equations
from jaxensemble.running.members import call_members
from jaxensemble.running.runner import Arguments, Runner

BETWEEN: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda x, y: nnx.relu(y),
    "residual": lambda x, y: nnx.relu(x + y),
    "relu6": lambda x, y: nnx.relu6(y),
    "swish": lambda x, y: nnx.swish(y),
    "pooled": lambda x, y: nnx.relu(nnx.max_pool(y, (2, 2), (2, 2), "SAME")),
    "pooled over channels": lambda x, y: jax.lax.reduce_window(
        y, -jnp.inf, jax.lax.max, (1, 1, 1, 2), (1, 1, 1, 1), "SAME"
    ),
    "clipped by channel": lambda x, y: jnp.clip(y, jnp.zeros(4), jnp.arange(4.0)),
    "divides": lambda x, y: jnp.arange(1.0, 5.0) / (2 + jnp.tanh(y)),
    "other order": lambda x, y: jnp.swapaxes(nnx.relu(jnp.swapaxes(y, 1, 3)), 1, 3),
    "read twice": lambda x, y: nnx.relu(y) * jnp.sin(y),
    "in two groups": lambda x, y: nnx.relu(y.reshape(*y.shape[:-1], 2, 2).swapaxes(-1, -2)).reshape(y.shape),
}


class Layers(nnx.Module):
    """Two convolutions, with a normalisation, and some steps between them."""

    def __init__(self, between: Callable[[Any, Any], Any], rngs: nnx.Rngs, groups: int = 1):
        conv = functools.partial(nnx.Conv, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)
        self.first, self.second = conv(4, 4, (3, 3), feature_group_count=groups), conv(4, 4, (3, 3))
        self.norm = nnx.BatchNorm(4, use_running_average=True, param_dtype=jnp.float64, rngs=rngs)
        self.norm.mean[...] = jax.random.normal(rngs(), (4,), "float32")
        self.last = conv(4, 6, (1, 1))
        self.between = between

    def __call__(self, x: Any) -> Any:
        x = self.first(x)
        return self.last(self.between(x, self.norm(self.second(nnx.relu(x)))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", BETWEEN)
def test_packed_members_give_the_same(name: str, groups: int, each: bool) -> None:
    ensemble = Ensemble.from_modules([Layers(BETWEEN[name], nnx.Rngs(seed), groups) for seed in range(3)])
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, 5, 4) if each else (2, 5, 5, 4), "float64")
    call = Runner(ensemble.state, None, None).workload(Arguments.of(None, (x,), {}, None, each=each)).call
    state = ensemble.params, ensemble.buffers, ensemble.constants, ensemble.rngs, None, (x,)
    plain, packed = (
        jax.jit(functools.partial(call_members, call=dataclasses.replace(call, platform=platform, fold=fold)))(*state)
        for platform, fold in (("none", False), ("gpu", True))
    )
    np.testing.assert_allclose(packed, plain, rtol=1e-12, atol=1e-12)


def test_nothing_is_transposed_between_convolutions() -> None:
    convolve = lambda x, kernel: jax.lax.conv_general_dilated(  # noqa: E731
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def layers(x: Any, kernels: Any, biases: Any) -> Any:
        for kernel, bias in zip(kernels, biases, strict=True):
            x = nnx.relu(x + convolve(x, kernel) + bias)
        return x

    arrays = jnp.ones((2, 5, 5, 4)), [jnp.ones((3, 3, 3, 4, 4))] * 5, [jnp.ones((3, 1, 1, 1, 4))] * 5
    members = jax.vmap(layers, (None, 0, 0))
    plain, packed = (_transposed(function, *arrays) for function in (members, pack_members(members)))
    assert plain == 5 + 4  # those by a reshape with other axes first
    assert packed <= 4


def _transposed(function: Callable[..., Any], *arrays: Any) -> int:
    """The steps that transpose the images of all members."""
    steps = [step for step in equations(jax.make_jaxpr(function)(*arrays)) if step.outvars[0].aval.size == 600]  # type: ignore[attr-defined]
    return sum(
        step.primitive.name == "transpose" or step.params.get("dimensions") is not None
        for step in steps
        if step.primitive.name in ("reshape", "transpose")
    )
