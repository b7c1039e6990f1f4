"""Calls with any number of rows by programs for a few of them."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble, ManySizesWarning, NotANumberWarning, Plan
from jaxensemble.errors import InputError
from jaxensemble.running.members import CannotCall

M, N = 3, 5
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
XS = np.stack([X * (k + 1) for k in range(M)])
TRACES: list[Any] = []


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        TRACES.append(x.shape)
        y = nnx.relu(self.norm(self.linear(x)))
        return {"features": jnp.moveaxis(y, 0, 1), "y": y, "scale": jnp.asarray(self.norm.scale)}


ENSEMBLE = Ensemble.from_modules([Net(nnx.Rngs(seed)) for seed in range(M)], mode="eval")


def _assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("each", [False, True])
def test_any_number_of_rows_gives_the_outputs_of_a_call(each: bool) -> None:
    padded, call = ENSEMBLE.padded(), ENSEMBLE.each if each else ENSEMBLE
    run = ENSEMBLE.prepare(XS if each else X, each=each, pad=True)
    several = padded.each if each else padded
    for rows in (0, 1, 2, 3, 4, 5):
        x = XS[:, :rows] if each else X[:rows]
        expected = call(x)
        _assert_same(run(x), expected)
        _assert_same(several(x), expected)
    _assert_same(jax.jit(run)(x[..., :3, :]), call(x[..., :3, :]))
    _assert_same(jax.jit(several)(x[..., :3, :]), call(x[..., :3, :]))


def test_numbers_of_rows_share_programs() -> None:
    padded = ENSEMBLE.padded()
    padded(X)  # eight rows
    run = ENSEMBLE.prepare(X, pad=True)
    before = len(TRACES)
    for x in (X, np.concatenate([X, X[:1]]), np.concatenate([X, X[:3]])):
        padded(x)
    for rows in (1, 3, 4):
        run(X[:rows])
    assert len(TRACES) == before


def test_rows_that_are_nan_stay_alone() -> None:
    x = np.where(np.arange(N)[:, None] == 0, np.nan, X).astype(np.float32)
    for run in (ENSEMBLE.padded(), ENSEMBLE.prepare(np.ones((8, 3), np.float32), pad=True)):
        found = run(x)["y"]
        assert np.isnan(found).all((0, 2)).tolist() == [True, False, False, False, False]
        np.testing.assert_allclose(found[:, 1:], ENSEMBLE(X)["y"][:, 1:], rtol=1e-5, atol=1e-6)


class Mixing(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.linear(x)
        return y - y.mean(0)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_networks_that_mix_rows_are_refused(rows: int) -> None:
    mixing = Ensemble.from_modules([Mixing(nnx.Rngs(seed)) for seed in range(M)], mode="eval")
    for ensemble in (mixing, ENSEMBLE.train()):
        for run in (ensemble.padded(), lambda x, e=ensemble: e.prepare(x, pad=True)):
            with pytest.raises(InputError, match="rows cannot be added, since the network may mix the rows"):
                run(X[:rows])


def test_other_inputs_are_refused() -> None:
    run = ENSEMBLE.prepare(X, pad=True)
    with pytest.raises(InputError, match="prepared for at most 5 rows; got 10"):
        run(np.concatenate([X, X]))
    with pytest.raises(InputError, match=r"prepared for inputs float32\[5,3\]; got float32\[5,2\]"):
        run(X[:2, :2])
    with pytest.raises(InputError, match="inputs must have one number of rows"):
        run(X, X[:2])
    with pytest.raises(InputError, match="must have one number of rows; got float32"):
        ENSEMBLE.padded()(jnp.float32(1))
    for call in (ENSEMBLE.padded(), ENSEMBLE, lambda x: ENSEMBLE(x, plan=Plan(rows=2))):
        with pytest.raises(CannotCall, match=r"^Net cannot be called with \(float32\[."):
            call(X[:, :2])


def test_padded_ensembles_are_pickled() -> None:
    _assert_same(pickle.loads(pickle.dumps(ENSEMBLE.padded()))(X[:3]), ENSEMBLE(X[:3]))


def test_many_batch_sizes_give_one_warning() -> None:
    ensemble = Ensemble.from_modules([nnx.Linear(3, 4, rngs=nnx.Rngs(seed)) for seed in range(M)])
    x = np.ones((20, 3), np.float32)
    for rows in range(1, 8):
        ensemble(x[:rows])
        ensemble(x[:rows])
        ensemble.predict(x[:rows])  # another kind of call
    with pytest.warns(ManySizesWarning, match=r"programs for 8 batch sizes, the last one 8: .*padded") as found:
        ensemble(x[:8])
    assert [warning.filename for warning in found] == [__file__]
    ensemble.predict(x[:8])
    padded = Ensemble.from_modules(list(ensemble)).padded()
    for rows in range(1, 10):
        ensemble(x[:rows])
        padded(x[:rows])


def test_networks_that_cannot_be_padded_get_no_advice() -> None:
    mixing = Ensemble.from_modules([Mixing(nnx.Rngs(seed)) for seed in range(M)], mode="eval")
    for rows in range(1, 10):
        mixing(np.ones((rows, 3), np.float32))


class Logits(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        TRACES.append(x.shape)
        return self.linear(x)


@pytest.mark.parametrize("options", [{}, {"task": "regression"}, {"outputs_are": "log_probabilities"}])
def test_predictions_of_any_number_of_rows(options: dict[str, Any]) -> None:
    class Net(Logits):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(super().__call__(x))

    ensemble = Ensemble.from_modules([Net(nnx.Rngs(seed)) for seed in range(M)])
    padded = ensemble.padded()
    for rows in (1, 3, 5):
        _assert_same(padded.predict(X[:rows], **options), ensemble.predict(X[:rows], **options))
    before = len(TRACES)
    padded.predict(np.concatenate([X, X[:2]]), **options)
    assert len(TRACES) == before
    with pytest.warns(NotANumberWarning, match="row"):
        padded.predict(X[:3] * np.nan, task="regression")


def test_predictions_need_rows_first() -> None:
    class Net(Logits):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x).T

    ensemble = Ensemble.from_modules([Net(nnx.Rngs(seed)) for seed in range(M)])
    with pytest.raises(InputError, match="rows first"):
        ensemble.padded().predict(X)


def test_rows_of_an_embedding_are_apart() -> None:
    """A gather fills what lies outside with NaN, which is not equal to itself."""
    ensemble = Ensemble.from_modules([nnx.Embed(7, 2, rngs=nnx.Rngs(seed)) for seed in range(M)])
    ids = np.arange(5)
    _assert_same(ensemble.padded()(ids), ensemble(ids))
    _assert_same(ensemble(ids, plan=Plan(rows=2)), ensemble(ids))


def test_a_padded_ensemble_shows_its_ensemble() -> None:
    assert repr(ENSEMBLE.padded()) == f"PaddedEnsemble({ENSEMBLE!r})"
