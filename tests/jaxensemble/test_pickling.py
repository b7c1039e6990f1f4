"""An ensemble that was copied or pickled is the same one, in another process, too."""

import copy
import dataclasses
import multiprocessing
import pickle
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, NarrowIntegerWarning, Plan, StateError
from tests.helpers.artifacts import SAVED, X, same_bits


class Dropping(nnx.Module):
    """A network that keeps random state."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.dropout = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.linear(x))


def of_modules() -> Ensemble:
    return Ensemble.from_modules([Dropping(nnx.Rngs(seed)) for seed in range(3)])


def pickled(ensemble: Ensemble) -> Ensemble:
    return pickle.loads(pickle.dumps(ensemble))


VARIANTS: dict[str, Callable[[Ensemble], Ensemble]] = {
    "as it is": lambda ensemble: ensemble,
    "in training mode": Ensemble.train,
    "some members": lambda ensemble: ensemble[1:],
    "in half precision": lambda ensemble: ensemble.astype(jnp.bfloat16),
    "with a plan": lambda ensemble: dataclasses.replace(ensemble, plan=Plan(members=1)),
}


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


def outputs_of(ensemble: Ensemble, x: np.ndarray) -> np.ndarray:
    return np.asarray(ensemble(x))


def test_another_process_computes_the_same() -> None:
    ensemble = Ensemble.load(SAVED / "net")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        outputs = pool.apply(outputs_of, (ensemble, X))
    np.testing.assert_array_equal(outputs, outputs_of(ensemble, X))


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
