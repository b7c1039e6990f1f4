"""Predictions that are a part of the program of a call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble, NotANumberWarning, Plan, Prediction
from jaxensemble.errors import InputError
from jaxensemble.running.finish import PredictionSteps

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Outputs:
    logits: jax.Array
    states: jax.Array


class Net(nnx.Module):
    def __init__(self, kind: str, rngs: nnx.Rngs) -> None:
        self.kind = kind
        dtype = jnp.bfloat16 if kind == "half" else jnp.float32
        self.linear = nnx.Linear(3, 4, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        y = self.linear(x) * 3
        match self.kind:
            case "pair":
                return y, y - 1
            case "fields":
                return Outputs(y, jnp.stack([x, x]))
            case "maps":
                return jnp.stack([y, y + 1], -1)
            case "classless":
                return y[:, :1]
        return y


def _ensemble(kind: str) -> Ensemble:
    return Ensemble.from_modules([Net(kind, nnx.Rngs(seed)) for seed in range(3)], mode="eval")


PLAIN = _ensemble("plain")


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the prediction was made after the program")

    monkeypatch.setattr("jaxensemble.ensemble.Prediction.from_outputs", fail)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [
        ("plain", "classification", {}),
        ("plain", "classification", {"outputs_are": "logits", "class_axis": 1}),
        ("plain", "regression", {}),
        ("half", "classification", {}),
        ("half", "regression", {}),
        ("pair", "gaussian", {}),
        ("fields", "classification", {}),
        ("maps", "classification", {"class_axis": 1}),
        ("maps", "classification", {"class_axis": -1}),
    ],
)
def test_predictions_are_those_of_the_outputs(kind: str, task: Any, options: dict[str, Any]) -> None:
    ensemble = _ensemble(kind)
    outputs = ensemble(X)
    expected = PredictionSteps(task, options.get("class_axis"), None)(outputs)[0]
    compiled = ensemble.predict(X, task=task, **options)
    traced = jax.jit(lambda ensemble, x: ensemble.predict(x, task=task, **options))(ensemble, X)
    for prediction in (
        compiled,
        compiled if task == "regression" else traced,
        ensemble.predict(X, task=task, **options),
    ):
        assert jax.tree.structure(prediction) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), prediction, expected)
    if task == "regression":  # rounded to the dtype of the outputs, as these are
        np.testing.assert_array_equal(compiled.outputs, outputs.astype(jnp.float32))
    if task == "classification":
        np.testing.assert_array_equal(compiled.member_classes, expected.member_classes)


@pytest.mark.usefixtures("one_program")
def test_plans_and_keys_go_with_predictions() -> None:
    for plan in (Plan(members=1, rows=4), Plan(members=2), "auto"):
        found: Any = PLAIN.predict(X, plan=plan)
        np.testing.assert_allclose(found.mean, jax.nn.softmax(PLAIN(X)).mean(0), rtol=1e-5)


def test_gradients_go_through_predictions() -> None:
    def score(params: Any, read: Any) -> jax.Array:
        return read(PLAIN.with_params(params)).log_mean[:, 0].sum()

    one, other = (
        jax.grad(score)(PLAIN.params, read)
        for read in (lambda ensemble: ensemble.predict(X), lambda ensemble: Prediction.from_outputs(ensemble(X)))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


@pytest.mark.parametrize(
    ("kind", "task", "options", "message"),
    [
        ("plain", "classification", {"class_axis": 2}, "`class_axis` must be one of 1, -1"),
        ("plain", "classification", {"class_axis": 1.0}, "`class_axis` must be one of 1, -1"),
        ("plain", "classification", {"class_axis": [1]}, "`class_axis` must be one of 1, -1"),
        ("plain", "classification", {"outputs_are": "odds"}, "`outputs_are` must be 'logits'"),
        ("plain", "classification", {"outputs_are": "probabilities"}, "`outputs` must be at least 0 and sum to 1"),
        ("plain", "gaussian", {}, r"`outputs` must be a pair \(means, log_variances\); got one array"),
        ("pair", "classification", {}, r"`outputs` must be one array; got a tuple of 2"),
        ("maps", "classification", {}, "could have classes along several axes"),
        ("classless", "classification", {}, "at least two classes; got 1 along class axis -1"),
    ],
)
def test_errors_are_those_of_predictions(kind: str, task: Any, options: dict[str, Any], message: str) -> None:
    ensemble = _ensemble(kind)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            ensemble.predict(X, task=task, **options)
    assert PLAIN.predict(X, class_axis=1).members == 3  # and an equal number of another type has no use of this program
    with pytest.raises(InputError, match=r"got 1\.0"):
        PLAIN.predict(X, class_axis=1.0)


@pytest.mark.usefixtures("one_program")
def test_members_and_rows_that_are_nan_are_named() -> None:
    kernel = PLAIN.params["linear"]["kernel"]
    lost = PLAIN.with_params({"linear": PLAIN.params["linear"] | {"kernel": kernel.at[1, 0, 0].set(jnp.nan)}})
    for task in ("classification", "regression"):
        for _ in range(2):
            with pytest.warns(
                NotANumberWarning, match=r"member 1 gives NaN for 6 of 6 rows \(0, 1, 2 and 3 more\)"
            ) as found:
                lost.predict(X, task=task)
            assert len(found) == 1
        with jax.disable_jit(), pytest.warns(NotANumberWarning) as found:  # after a compiled call
            lost.predict(X, task=task)
        assert len(found) == 1
    jax.jit(lambda ensemble: ensemble.predict(X))(lost)  # values are unknown during tracing
    x = jnp.asarray(X)
    with pytest.warns(NotANumberWarning):  # and known where all arrays are
        jax.jit(lambda: lost.predict(x).mean)()
