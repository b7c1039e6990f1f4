"""Training over a mesh: the same losses and weights as on one device."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, TrainState, fit, train_step
from jaxensemble.training.data import as_data, put_data
from jaxensemble.training.planning import make_step
from jaxensemble.training.step import compile_step, next_state
from tests.helpers.training import MLP, data, mean_square, state_of
from tests.jaxensemble.devices.test_over import CNN, close, ensemble_of, mesh, x_of

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices; the tests' settings make four CPUs")


@pytest.mark.parametrize("members", [4, 6])
@pytest.mark.parametrize("each", [False, True])
def test_steps(members: int, each: bool) -> None:
    state, (x, y) = state_of(ensemble_of(members), optax.adam(0.01)), data(8)
    if each:
        x, y = np.stack([x + k for k in range(members)]), np.stack([y] * members)
    spread = state.over(mesh())
    for _ in range(3):
        state, losses = train_step(state, x, y, loss=mean_square, each=each)
        spread, found = train_step(spread, x, y, loss=mean_square, each=each)
        assert found.shape == (members,)
        close(found, losses)
    close(spread.over(None).ensemble.params, state.ensemble.params)


def test_batch_norm_and_dropout() -> None:
    state, x = state_of(ensemble_of(6, CNN)), x_of(8, 6, 6, 1)
    y = np.zeros((8, 3), "float32")
    spread, rows = state.over(mesh()), np.stack([np.random.default_rng(k).permutation(8)[:4] for k in range(6)])
    for _ in range(3):
        state, losses = train_step(state, x, y, loss=mean_square, rows=rows)
        spread, found = train_step(spread, x, y, loss=mean_square, rows=rows)
        close(found, losses)
    close(spread.over(None).ensemble.buffers, state.ensemble.buffers)


def test_states_of_an_ensemble_on_a_mesh() -> None:
    x, y = data(8)
    make = lambda **options: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, **options)  # noqa: E731
    ensemble = Ensemble.from_modules([MLP(0.3, rngs=nnx.Rngs(k)) for k in range(6)], mode="eval")
    options: dict[str, Any] = {"hyperparams": {"learning_rate": np.linspace(0.1, 0.3, 6)}, "dropout": [0.1] * 6}
    optimizer = make()
    state, spread = (
        TrainState.create(chosen, optimizer, jax.random.key(0), **options)
        for chosen in (ensemble, ensemble.over(mesh()))
    )
    assert repr(spread) == repr(state)
    for _ in range(2):
        state, losses = train_step(state, x, y, loss=mean_square)
        spread, found = train_step(spread, x, y, loss=mean_square)
        close(found, losses)


def test_a_step_sends_nothing() -> None:
    state, (x, y) = state_of(ensemble_of(8)).over(mesh()), data(8)
    given, rows = as_data(state.ensemble, x, y)
    given, rows = put_data(state.ensemble, given, rows, each=False)
    step = make_step(state, given, rows, mean_square, each=False, plan=None)
    text = compile_step(next_state, step).lower(state, given, rows, None, step=step).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective", text)


@pytest.mark.parametrize("indexed", [False, True])
def test_rows_over_another_axis(indexed: bool) -> None:
    state, (x, y) = state_of(ensemble_of(3)), data(8)
    rows = np.array([3, 1, 7, 2]) if indexed else None
    spread = state.over(mesh(2, 2), rows="rows")
    for _ in range(3):
        state, losses = train_step(state, x, y, loss=mean_square, rows=rows)
        spread, found = train_step(spread, x, y, loss=mean_square, rows=rows)
        close(found, losses)
    close(spread.over(None).ensemble.params, state.ensemble.params)


def test_rows_that_cannot_be_apart_are_refused() -> None:
    y = np.zeros((8, 3), "float32")
    spread = state_of(ensemble_of(4, CNN)).over(mesh(2, 2), rows="rows")
    with pytest.raises(InputError, match="may mix the rows"):
        train_step(spread, x_of(8, 6, 6, 1), y, loss=mean_square)
    spread, (x, y) = state_of(ensemble_of(4)).over(mesh(2, 2), rows="rows"), data(8)
    with pytest.raises(InputError, match="is not the plain mean over the rows"):
        train_step(spread, x, y, loss=lambda outputs, targets: ((outputs - targets) ** 2).sum())
    with pytest.raises(InputError, match="must divide into 2 equal parts; got 7"):
        train_step(spread, x[:7], y[:7], loss=mean_square)
    with pytest.raises(InputError, match="must divide into 2 equal parts; got 5"):
        fit(spread, x, y, loss=mean_square, epochs=1, batch=5, progress=False)
    with pytest.raises(InputError, match="`augment` needs all rows"):
        fit(spread, x, y, loss=mean_square, epochs=1, batch=4, augment=lambda key, both: both, progress=False)


def a_run(spread: bool, folder: Path | None = None, epochs: int = 4, devices: int = 4, **options: Any) -> Any:
    ensemble = Ensemble.from_modules([MLP(0.2, rngs=nnx.Rngs(seed)) for seed in range(3)], mode="eval")
    state, (x, y) = state_of(ensemble, optax.adam(0.05)), data(30)
    state = state.over(mesh(devices)) if spread else state
    return fit(
        state, x, y, loss=mean_square, epochs=epochs, batch=8, validation=data(20, 1), checkpoints=folder,
        progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": "same", "bootstrap": True},
        {"patience": 1},
        {"augment": lambda key, both: (both[0] + 0.1 * jax.random.normal(key, both[0].shape), both[1])},
    ],
    ids=["shuffled", "bootstrap", "patience", "augment"],
)
def test_fit(options: dict[str, Any]) -> None:
    state, history = a_run(False, **options)
    spread, found = a_run(True, **options)
    close(found.loss, history.loss)
    close(found.validation["loss"], history.validation["loss"])
    close(spread.over(None).ensemble.params, state.ensemble.params)


def test_fit_on_a_function_of_the_epoch() -> None:
    state, (x, y) = state_of(ensemble_of(3)), data(30)
    given = lambda epoch: [(x[k : k + 8], y[k : k + 8]) for k in (0, 8, 16)]  # noqa: E731
    _, history = fit(state, given, loss=mean_square, epochs=2, progress=False)
    _, found = fit(state.over(mesh()), given, loss=mean_square, epochs=2, progress=False)
    close(found.loss, history.loss)


@pytest.mark.parametrize("devices", [4, 2])
def test_a_run_goes_on_with_other_devices(tmp_path: Path, devices: int) -> None:
    state, history = a_run(False, patience=20)
    a_run(True, tmp_path / "run", epochs=2, patience=20)
    spread, found = a_run(True, tmp_path / "run", devices=devices, patience=20)
    close(found.loss, history.loss)
    close(spread.over(None).ensemble.params, state.ensemble.params)
    assert jnp.isfinite(found.loss).all()
