"""Copied and pickled ensembles are equal to the original, also in another process."""

import copy
import dataclasses
import functools
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, NarrowIntegerWarning, Plan, StateError
from jaxensemble.modules.structure import Structure
from tests.helpers.artifacts import SAVED, X, same_bits


class Dropping(nnx.Module):
    """A network that keeps random state."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.dropout = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.linear(x))


def of_modules() -> Ensemble:
    return Ensemble.from_modules([Dropping(nnx.Rngs(seed)) for seed in range(3)], mode="as_is")


def pickled(ensemble: Ensemble) -> Ensemble:
    return pickle.loads(pickle.dumps(ensemble))


VARIANTS: dict[str, Callable[[Ensemble], Ensemble]] = {
    "as it is": lambda ensemble: ensemble,
    "in training mode": Ensemble.train,
    "some members": lambda ensemble: ensemble[1:],
    "in half precision": lambda ensemble: ensemble.astype(jnp.bfloat16),
    "with a plan": lambda ensemble: dataclasses.replace(ensemble, plan=Plan(members=1)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("source", ["ported", "modules"])
def test_a_copy_is_the_same(source: str, how: Callable, variant: Callable) -> None:
    ensemble = variant(Ensemble.load(SAVED / "net") if source == "ported" else of_modules())
    again = how(ensemble)
    assert same_bits(again, ensemble)
    assert again.graphdef == ensemble.graphdef
    assert again.plan == ensemble.plan
    assert again.origin == ensemble.origin
    x = X if source == "ported" else np.ones((4, 3), np.float32)
    outputs, expected = (each(x, key=jax.random.key(7)) for each in (again, ensemble))
    np.testing.assert_array_equal(outputs, expected)


def test_a_proof_goes_along() -> None:
    ensemble = Ensemble.load(SAVED / "net")
    assert ensemble.proof is not None
    assert pickled(ensemble).proof == copy.copy(ensemble).proof == ensemble.proof
    assert pickled(ensemble.astype(jnp.bfloat16)).proof is None


class Activated(nnx.Module):
    """A network that holds functions: wrapped by JAX, by Python, and not at all."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.relu, self.silu = nnx.Linear(3, 2, rngs=rngs), nnx.relu, nnx.silu
        self.leaky, self.exact = functools.partial(nnx.leaky_relu, negative_slope=0.1), nnx.gelu
        self.both = {"all": (nnx.tanh, functools.partial(nnx.softmax, axis=-1))}

    def __call__(self, x: jax.Array) -> jax.Array:
        for function in (self.relu, self.silu, self.leaky, self.exact, *self.both["all"]):
            x = function(x - 0.1)
        return self.linear(x)


def outputs_of(called: list[tuple[Any, np.ndarray]]) -> list[np.ndarray]:
    return [np.asarray(network(x)) for network, x in called]


def test_another_process_computes_the_same() -> None:
    """Pickles ensembles, ported and not, a member, a part of a member, and an ensemble of members."""
    ensemble, words = Ensemble.load(SAVED / "net"), Ensemble.load(SAVED / "words")
    ones, ids = np.ones((4, 3), np.float32), np.arange(4).reshape(2, 2).astype("int32")
    networks = [
        (ensemble, X),
        (ensemble[0], X),
        (ensemble[0].conv, np.ones((1, 3, 3, 1), np.float32)),
        (words[1], ids),
        (Ensemble.from_modules([words[0], words[1]]), ids),
        (Ensemble.from_modules([Activated(nnx.Rngs(seed)) for seed in range(2)]), ones),
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(outputs_of, (networks,))
    for outputs, expected in zip(found, outputs_of(networks), strict=True):
        np.testing.assert_array_equal(outputs, expected)


def test_a_member_is_copied_as_other_modules_are() -> None:
    member = Ensemble.load(SAVED / "net")[0]
    shallow, deep = copy.copy(member), copy.deepcopy(member)
    assert shallow.conv is member.conv and deep.conv is not member.conv
    np.testing.assert_array_equal(deep(X), member(X))
    structure = nnx.graphdef(member)
    assert copy.copy(Structure.of(structure)) is Structure.of(structure)


def test_functions_that_no_process_finds_are_refused() -> None:
    wrapped = jax.jit(lambda x: x)
    module = Activated(nnx.Rngs(0))
    module.relu = wrapped
    with pytest.raises((pickle.PicklingError, AttributeError), match="<lambda>"):
        pickle.dumps(Ensemble.from_modules([module]))


def test_what_is_wide_is_not_rounded() -> None:
    with jax.enable_x64(True):
        data = pickle.dumps(Ensemble.load(SAVED / "wide"))
        assert pickle.loads(data).params["weight"].dtype == jnp.float64
    with pytest.raises(InputError, match="JAX would round to 32 bits"):
        pickle.loads(data)


def test_integers_that_are_narrower_cost_the_proof() -> None:
    with jax.enable_x64(True):
        data = pickle.dumps(Ensemble.load(SAVED / "hashing"))
        assert pickle.loads(data).proof is not None
    with pytest.warns(NarrowIntegerWarning, match="they are off"):
        assert pickle.loads(data).proof is None


def test_a_changed_structure_is_refused() -> None:
    ensemble = Ensemble.load(SAVED / "net")
    other = dataclasses.replace(ensemble, graphdef=of_modules().graphdef)
    with pytest.raises(StateError, match="no longer that of its network"):
        pickle.dumps(other)
