"""`Ensemble.predict_batches`: the figures of `predict`, batch after batch, by one program."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, NotANumberWarning, Plan
from jaxensemble.running import batches as module
from tests.helpers.training import MLP

X = np.random.default_rng(0).normal(size=(21, 3)).astype("float32")


@pytest.fixture
def ensemble() -> Ensemble:
    return Ensemble.from_modules([MLP(rngs=nnx.Rngs(seed)) for seed in range(5)], mode="eval")


def joined(found: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    parts = list(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


FIGURES = ("mean", "soft_vote", "votes", "hard_vote", "predictive_entropy", "mutual_information", "log_mean")


@pytest.mark.parametrize(
    "given",
    [(X, 8), (X[:16], 8), ((X,), 8), ([X[:8], X[8:16], X[16:]], None), ([{"x": X[:8]}, {"x": X[8:]}], None)],
    ids=["blocks", "whole blocks", "a tuple", "an iterable", "growing"],
)
def test_figures_are_those_of_predict(ensemble: Ensemble, given: Any) -> None:
    batches, rows = given
    if isinstance(batches, list) and isinstance(batches[0], dict):  # only a ported network has names of inputs
        batches = [batch["x"] for batch in batches]
    found = joined(ensemble.predict_batches(batches, FIGURES, rows=rows))
    wanted = ensemble.predict(X[: len(found["mean"])])
    for name in FIGURES:
        np.testing.assert_allclose(found[name], getattr(wanted, name), rtol=1e-5, atol=1e-6)


def test_one_program_runs_all_batches(ensemble: Ensemble) -> None:
    list(ensemble.predict_batches(X, rows=8))
    assert len(ensemble._runner.calls) == 1


def test_two_batches_are_in_flight(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def source() -> Iterator[np.ndarray]:
        for k in range(4):
            events.append(f"given {k}")
            yield X[k : k + 4]

    read = module._read
    monkeypatch.setattr(module, "_read", lambda *found: events.append("read") or read(*found))
    list(ensemble.predict_batches(source()))
    assert events == ["given 0", "given 1", "read", "given 2", "read", "given 3", "read", "read"]


def test_a_memory_mapped_file_is_read_block_by_block(ensemble: Ensemble, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    stream = ensemble.predict_batches(mapped, "std", rows=8)
    assert next(stream)["std"].shape == (8, 2)
    assert sum(len(part["std"]) for part in stream) == 13


def test_regression_and_a_plan(ensemble: Ensemble) -> None:
    found = joined(ensemble.predict_batches(X, ("mean", "variance"), rows=8, task="regression", plan=Plan(members=1)))
    wanted = ensemble.predict(X, task="regression")
    np.testing.assert_allclose(found["mean"], wanted.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["variance"], wanted.variance, rtol=1e-5, atol=1e-6)


class Mixing(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x - x.mean(0))


def test_a_network_that_mixes_rows_gets_no_others() -> None:
    ensemble = Ensemble.from_modules([Mixing(rngs=nnx.Rngs(seed)) for seed in range(2)])
    found = list(ensemble.predict_batches(X, rows=8))
    for part, x in zip(found, (X[:8], X[8:16], X[16:]), strict=True):
        np.testing.assert_allclose(part["mean"], ensemble.predict(x).mean, rtol=1e-5, atol=1e-6)


def test_nan_is_told_of(ensemble: Ensemble) -> None:
    x = X.copy()
    x[9] = np.nan
    with pytest.warns(NotANumberWarning, match="members 0, 1, 2 and 2 more give NaN for 1 of the 8 rows of a batch"):
        list(ensemble.predict_batches(x, rows=8))


def test_random_numbers_differ_from_batch_to_batch() -> None:
    ensemble = Ensemble.from_modules([MLP(0.5, rngs=nnx.Rngs(seed)) for seed in range(3)], mode="train")
    same = np.repeat(X[:1], 8, axis=0)
    first, second = ensemble.predict_batches(np.concatenate([same, same]), rows=8, key=jax.random.key(0))
    assert not np.allclose(first["mean"], second["mean"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"figures": "median"}, "must be attributes of a prediction for classification:\\sconfidence, .*got 'median'"),
        ({"figures": ()}, "got none"),
        ({"rows": 0}, "`rows` must be a positive integer"),
        ({"plan": "auto"}, "`plan` must be a jaxensemble.Plan or None"),
        ({"class_axis": "last"}, "`class_axis` must be an integer"),
        ({"task": "ranking"}, "`task` must be"),
    ],
)
def test_wrong_options_are_refused_at_once(ensemble: Ensemble, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ensemble.predict_batches(X, **options)
