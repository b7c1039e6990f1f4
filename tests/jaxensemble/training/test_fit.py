"""`fit`: epochs, validation, early stopping, history, and wrong arguments."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxensemble import Ensemble, History, InputError, Plan, fit, layers, train_step
from jaxensemble.training import minibatches
from tests.helpers.training import close, data, mean_square, state_of


def test_fit_takes_every_row_once_an_epoch(mlp: Ensemble) -> None:
    x, y = data(10)
    state = state_of(mlp, optax.sgd(0.0))
    seen: list[np.ndarray] = []

    def loss(outputs: Any, targets: Any) -> jax.Array:
        jax.debug.callback(lambda values: seen.append(np.asarray(values)), targets[:, 0])
        return mean_square(outputs, targets)

    _, history = fit(state, x, y, loss=loss, epochs=2, batch=4, shuffle="same", plan=Plan())
    jax.effects_barrier()
    assert history.loss.shape == (2, 3)
    rows = [values for values in seen if values.ndim == 1]
    for epoch in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        np.testing.assert_allclose(np.sort(np.concatenate(epoch)), np.sort(y[:, 0]))


@pytest.mark.parametrize("longest", [100, 4])  # steps of one program: all of an epoch's, or half of them
def test_fit_is_train_steps_in_order(mlp: Ensemble, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minibatches, "_LONGEST", longest)
    x, y = data(26)
    got, history = fit(state_of(mlp), x, y, loss=mean_square, epochs=2, batch=4, shuffle="never")
    state, losses = state_of(mlp), []
    for _ in range(2):
        for first in range(0, 26, 4):
            state, found = train_step(state, x[first : first + 4], y[first : first + 4], loss=mean_square)
            losses.append(found)
    close(got.ensemble.params, state.ensemble.params)
    close(history.loss, np.array(losses).reshape(2, 7, 3).mean(1))


def test_fit_refuses_an_optimizer_whose_state_changes_its_kind(mlp: Ensemble) -> None:
    def narrowed(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, state.astype("float16")

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros(3, "float32"), narrowed)
    x, y = data(8)
    with pytest.raises(InputError, match=r"keeps its shapes and dtypes from step to step"):
        fit(state_of(mlp, optimizer), x, y, loss=mean_square, epochs=1, batch=4)


def test_members_learn_from_samples_of_their_own(mlp: Ensemble) -> None:
    same = Ensemble.from_modules([mlp[0]] * 3)
    x, y = data(50)
    _, history = fit(state_of(same), x, y, loss=mean_square, epochs=1, batch=50, bootstrap=True, shuffle="never")
    assert len(set(history.loss[0].tolist())) == 3
    _, history = fit(state_of(same), x, y, loss=mean_square, epochs=1, batch=50)
    np.testing.assert_allclose(history.loss[0], history.loss[0][0], rtol=1e-5)  # all rows, in whatever order


def test_members_stop_when_their_validation_loss_does_not_fall(mlp: Ensemble) -> None:
    x, y = data(40)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    state = state_of(mlp, optimizer, hyperparams={"learning_rate": [0.05, 30.0, 0.05]})  # the second one diverges
    metrics = {"largest": lambda outputs, targets: jnp.abs(outputs - targets).max()}
    with pytest.warns(UserWarning, match="the loss of member 1 is no longer finite"):
        got, history = fit(
            state, x, y, loss=mean_square, epochs=6, batch=10, validation=data(20, 1), patience=2, metrics=metrics
        )
    assert history.active[-1].tolist() == [True, False, True]
    assert history.validation["largest"].shape == (6, 3)
    assert history.best[0] > history.best[1]
    x_val, y_val = data(20, 1)
    found = jax.vmap(mean_square, (0, None))(got.ensemble(x_val), y_val)
    best = np.nanmin(history.validation["loss"], 0)
    np.testing.assert_allclose(found, best, rtol=1e-5)


def test_fit_ends_when_all_have_stopped(mlp: Ensemble) -> None:
    x, y = data(8)
    state = state_of(mlp, optax.sgd(0.0))
    _, history = fit(state, x, y, loss=mean_square, epochs=50, batch=8, validation=(x, y), patience=3)
    assert len(history) == 4


def test_the_best_epoch_is_none_that_was_not_a_number() -> None:
    assert History(np.zeros((3, 1)), {"loss": np.array([[1.0], [0.5], [np.nan]])}).best.tolist() == [1]


def test_a_history_is_plain_data_and_a_picture(tmp_path: Path) -> None:
    history = History(np.ones((3, 2)), {"loss": np.ones((3, 2)), "accuracy": np.zeros((3, 2))}, np.ones((3, 2), bool))
    again = History.from_json(history.to_json())
    assert all(
        (a == b).all()
        for a, b in zip(
            jax.tree.leaves(dataclasses.asdict(again)), jax.tree.leaves(dataclasses.asdict(history)), strict=True
        )
    )
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_no_number_any_more_is_told_once(mlp: Ensemble) -> None:
    x, y = data()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.01)
    state = state_of(mlp, optimizer, hyperparams={"learning_rate": [0.01, 1e30, 0.01]})
    with pytest.warns(UserWarning, match="the loss of member 1 is no longer finite") as warned:
        _, history = fit(state, x, y, loss=mean_square, epochs=4, batch=6)
    assert len(warned) == 1 and np.isfinite(history.loss[:, [0, 2]]).all()


def test_outputs_that_are_spread_over_targets_are_told() -> None:
    ensemble = Ensemble.from_modules([nnx.Linear(3, 1, rngs=nnx.Rngs(seed)) for seed in range(2)])
    state, x, y = state_of(ensemble), data(4)[0], np.ones(4, "float32")
    with pytest.warns(UserWarning, match=r"mean_square spreads outputs \[4, 1\] .* targets \[4\] .* to \[4, 4\]"):
        fit(state, x, y, loss=mean_square, epochs=1, batch=4)
    for loss, targets in ((mean_square, y[:, None]), (lambda a, b: mean_square(a[:, 0], b), y)):
        train_step(state, x, targets, loss=loss)  # a warning would be an error here


def test_fit_refuses_a_last_minibatch_that_is_too_small_before_it_begins() -> None:
    class Normed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm, self.linear = layers.BatchNorm(4), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(self.norm(x))

    ensemble = Ensemble.from_modules([Normed(nnx.Rngs(seed)) for seed in range(2)], mode="as_is")
    x, y = np.ones((9, 4), "float32"), np.ones((9, 2), "float32")
    with pytest.raises(InputError, match=r"(?s)`batch` leaves 1 of 9 rows .*more than one value"):
        fit(state_of(ensemble), x, y, loss=mean_square, epochs=1, batch=4)


@pytest.mark.parametrize(("package", "extra"), [("orbax.checkpoint", "train"), ("matplotlib.figure", "plots")])
def test_a_missing_package_is_told_with_its_extra(
    mlp: Ensemble, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    x, y = data()
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'jaxensemble\[{extra}\]'"):
        if extra == "train":
            fit(state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4, checkpoints=tmp_path / "run")
        else:
            History(np.zeros((1, 2))).plot(tmp_path / "history.png")


def test_fit_refuses_all_that_is_wrong_at_once(mlp: Ensemble) -> None:
    x, y = data()
    with pytest.raises(
        InputError, match=r"(?s)`epochs` must be.*`batch` must be.*`shuffle` must be.*need `validation`"
    ):
        fit(state_of(mlp), x, y, loss=mean_square, epochs=0, batch=0, shuffle="no", patience=2)  # type: ignore[arg-type]
