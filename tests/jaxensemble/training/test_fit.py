"""`fit`: epochs, validation, checkpoints that go on to the same bits, and what it refuses."""

import dataclasses
import functools
import io
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxensemble import Ensemble, History, InputError, Plan, fit, layers, train_step
from jaxensemble.training import checkpoints, minibatches, progress
from jaxensemble.training import step as steps
from jaxensemble.training.identity import differences, of_state
from jaxensemble.training.names import parts_of
from tests.helpers.training import MLP, close, data, mean_square, runs, same_bits, state_of


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
    with pytest.warns(UserWarning, match="the loss of member 1 is not finite any more"):
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


def test_a_run_goes_on_from_its_checkpoints_to_the_same_bits(mlp: Ensemble, tmp_path: Path) -> None:
    expected, history = runs(mlp, 5, None)
    runs(mlp, 2, tmp_path / "run")
    got, again = runs(mlp, 5, tmp_path / "run")
    same_bits(got, expected)
    np.testing.assert_array_equal(again.loss, history.loss)
    with pytest.raises(InputError, match=r"holds a run of 5 epochs already, and `epochs` is 3:\sgive epochs=5 to "):
        runs(mlp, 3, tmp_path / "run")
    with pytest.raises(InputError, match=r"(?s)checkpoints of another run.*\n  bootstrap True, was False$"):
        runs(mlp, 5, tmp_path / "run", bootstrap=True)
    with pytest.raises(
        InputError,
        match=r"(?s)steps made before 20, was 0\n  the metric more: there was none\n  the weights of the members: not",
    ):
        x, y = data(30)
        fit(
            got, x, y, loss=mean_square, epochs=5, batch=8, validation=data(20, 1), patience=20,
            metrics={"more": mean_square}, checkpoints=tmp_path / "run",
        )  # fmt: skip


def test_a_folder_that_holds_no_checkpoints_is_refused_and_left_alone(mlp: Ensemble, tmp_path: Path) -> None:
    note = tmp_path / "3" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(
        InputError, match=r"(?s)3 cannot be read as a checkpoint of `fit` \(KeyError: .*another directory"
    ):
        runs(mlp, 1, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["3", "note.txt"] and note.read_text() == "mine"


def test_a_loss_that_is_no_number_any_more_is_told_once(mlp: Ensemble) -> None:
    x, y = data()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.01)
    state = state_of(mlp, optimizer, hyperparams={"learning_rate": [0.01, 1e30, 0.01]})
    with pytest.warns(UserWarning, match="the loss of member 1 is not finite any more") as told:
        _, history = fit(state, x, y, loss=mean_square, epochs=4, batch=6)
    assert len(told) == 1 and np.isfinite(history.loss[:, [0, 2]]).all()


def weighted_square(*weights: float, slope: float = 1.0) -> Any:
    """A jitted loss with an array and a gradient of its own."""
    weight = jnp.array(weights)

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    same.defjvp(lambda primals, tangents: (primals[0], slope * tangents[0]))
    return jax.jit(lambda a, b: jnp.mean(weight * (same(a) - b) ** 2))


def same_sign(a: Any, b: Any) -> jax.Array:
    return jnp.mean((a > 0) == b)


TARGETS = {
    name: f"{kind}[20, 2], was {kind}[30, 2]"
    for name, kind in (("the data", "float32"), ("the validation set", "bool"))
}

OTHER_RUNS: dict[str, tuple[Any, list[str]]] = {
    "the same": ({"loss": weighted_square(1, 2)}, []),
    "an array of a loss": (
        {"loss": weighted_square(1, 3)},
        ["the loss: weight of weighted_square [1, 3], was [1, 2]"],
    ),
    "a gradient of a loss": (
        {"loss": weighted_square(1, 2, slope=2.0)},
        ["the gradient of the loss: not the same as before"],
    ),
    "a loss": (
        {"loss": lambda a, b: jnp.abs(a - b).mean()},
        ["the loss: made of <lambda>, was weighted_square, same"],
    ),
    "a rate": ({"optimizer": optax.sgd(0.2)}, ["the optimizer: learning rate 0.2, was 0.1"]),
    "a momentum": (
        {"optimizer": optax.sgd(0.1, momentum=0.5)},
        ["the optimizer: made of trace, scale, was identity, scale"],
    ),
    "a metric": ({"metric": lambda a, b: jnp.mean(a > b)}, ["the metric accuracy: made of <lambda>, was same_sign"]),
    "what is frozen": ({"frozen": ["fc1.bias"]}, ["frozen parameters fc1.bias, was none"]),
    "a mode": ({"train": False}, ["the network: layers in training mode none, was dropout"]),
    "dropout": ({"dropout": 0.3}, ["the rates of dropout: dropout.rate [0.3, 0.3, 0.3], was none",
         "the network: no dropout.rate, was 0.1"]),
    "a key": ({"randomness": "same"}, ["the random keys: not the same as before"]),
    "fewer rows than a minibatch has": (
        {"rows": 5},
        [
            f"{name}: {part}" for name in ("the data", "the validation set") for part in (
                "inputs[0] float32[5, 3], was float32[30, 3]", f"targets {TARGETS[name].replace('20', '5')}"
            )
        ],
    ),
    "a wider network": (
        {"width": 16},
        [
            "the network: fc1.out_features 16, was 8", "the network: fc2.in_features 16, was 8",
            "the weights of the members: not the same as before",
        ],
    ),
    "settings and data": (
        {"batch": 10, "patience": 3, "rows": 20, "frozen": ["fc1"]},
        [
            "batch 10, was 8", "patience 3, was None", "frozen parameters fc1.bias, fc1.kernel, was none",
            *(f"{name}: {part}" for name in ("the data", "the validation set") for part in (
                "inputs[0] float32[20, 3], was float32[30, 3]", f"targets {TARGETS[name]}"
            )),
        ],
    ),
}  # fmt: skip


@pytest.mark.thinned
@pytest.mark.parametrize("case", OTHER_RUNS)
def test_another_loss_optimizer_or_mode_is_another_run(case: str, tmp_path: Path) -> None:
    def run(
        loss: Any, optimizer: Any, metric: Any, batch: int = 8, patience: Any = None, rows: int = 30, width: int = 8,
        **options: Any,
    ) -> None:  # fmt: skip
        ensemble = Ensemble.from_modules([MLP(0.1, width, rngs=nnx.Rngs(seed)) for seed in range(3)], mode="eval")
        x, y = data(rows)
        measured: Any = {"validation": (x, y > 0), "metrics": {"accuracy": metric}}  # other targets than in training
        state = state_of(ensemble, optimizer, **options)
        fit(state, x, y, loss=loss, epochs=1, batch=batch, patience=patience, checkpoints=tmp_path, **measured)

    before = {"loss": weighted_square(1, 2), "optimizer": optax.sgd(0.1), "metric": same_sign}
    changes, expected = OTHER_RUNS[case]
    run(**before)
    if not expected:
        return run(**before | changes)
    with pytest.raises(InputError, match=r"(?s)checkpoints of another run.*begins a run of its own\.\n") as error:
        run(**before | changes)
    assert [line.strip() for line in error.value.details.splitlines()[1:]] == expected


SMOOTHING = 0.1


def smoothed(outputs: Any, targets: Any, weight: float = 2.0) -> jax.Array:
    return weight * jnp.mean((outputs - targets * (1 - SMOOTHING)) ** 2)


def injected(rate: float) -> Any:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=rate)


NAMED: dict[str, tuple[Any, Any, list[str]]] = {
    "adam": (optax.adamw(1e-3), optax.adamw(1e-2, b1=0.8, weight_decay=0.0), [
        "b1 of scale_by_adam 0.8, was 0.9", "weight_decay of add_decayed_weights 0.0, was 0.0001",
        "learning rate 0.01, was 0.001",
    ]),
    "groups": (
        optax.chain(optax.clip(1.0), optax.scale(3.0), optax.scale(2.0)),
        optax.chain(optax.clip(1.0), optax.scale(3.0), optax.scale(4.0)),
        ["step_size of scale (2) 4.0, was 2.0"],
    ),
    "a schedule": (
        optax.sgd(optax.cosine_decay_schedule(0.1, 100)), optax.sgd(optax.cosine_decay_schedule(0.1, 200)),
        ["decay_steps of cosine_decay_schedule 200, was 100"],
    ),
    "a schedule of one's own": (
        optax.sgd(lambda count: 0.1 / (count + 1)), optax.sgd(lambda count: 0.2 / (count + 1)),
        ["numbers written in a lambda [0.2, 1], was [0.1, 1]"],
    ),
    "a loss without numbers": (
        lambda a, b: abs(a - b).mean(), lambda a, b: ((a - b) ** 2).mean(),
        ["numbers written in a lambda [2], was none"],
    ),
    "a loss with numbers": (
        lambda a, b: ((a - b) ** 2).mean(), lambda a, b: abs(a - b).mean(),
        ["no numbers written in a lambda, was [2]"],
    ),
    "every few steps": (
        optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(),
        optax.MultiSteps(optax.sgd(0.1), 8).gradient_transformation(),
        ["every_k_schedule of MultiSteps 8, was 4"],
    ),
    "another one": (optax.sgd(0.1), optax.rprop(0.1), ["made of scale_by_rprop, scale, was identity, scale"]),
    "a partial": (smoothed, functools.partial(smoothed, weight=3.0), ["weight of smoothed 3.0, was 2.0"]),
    "nothing to tell": (smoothed, smoothed, []),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_numbers_of_optimizers_and_losses_are_told_by_name(case: str) -> None:
    before, after, expected = NAMED[case]
    then, now = ({"it": {"digest": k, "kind": "program", "parts": parts_of(f)}} for k, f in enumerate((before, after)))
    told = differences(now, then)
    assert all(f"it: {line}" in told for line in expected or ["not the same as before"]), told
    assert parts_of(smoothed)["SMOOTHING of smoothed"] == "0.1"


def test_numbers_within_the_state_of_an_optimizer_are_told_by_name(mlp: Ensemble) -> None:
    def state(rates: Any) -> Any:
        return of_state(state_of(mlp, injected(0.1), hyperparams={"learning_rate": rates}))

    assert differences(state([0.1, 0.2, 0.4]), state([0.1, 0.2, 0.3])) == [
        "the state of the optimizer: learning_rate [0.1, 0.2, 0.4], was [0.1, 0.2, 0.3]"
    ]


def test_objects_that_refuse_to_be_looked_into_are_no_hindrance() -> None:
    class Closed:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    closed = Closed()
    assert parts_of(lambda: closed)["made of"] == "test_objects_that_refuse_to_be_looked_into_are_no_hindrance"


class Trainer:
    def __init__(self) -> None:
        self.token = "SECRET-1"
        self.smoothing, self.unnamed = 0.125, 0.375

    def loss(self, outputs: Any, targets: Any) -> jax.Array:
        assert self.token
        return (1 - self.smoothing) * mean_square(outputs, targets)


def test_strings_that_a_loss_holds_are_told_nowhere(mlp: Ensemble, tmp_path: Path) -> None:
    secret, held = "SECRET-2", {"SECRET-3": 0.625, "name": np.array(["SECRET-4"])}

    def closed(outputs: Any, targets: Any, *, by: Any = ("SECRET-5", 3)) -> jax.Array:
        assert secret and by
        return held["SECRET-3"] * trainer.loss(outputs, targets)

    trainer = Trainer()
    told = parts_of(functools.partial(closed, by="SECRET-6"))
    assert "SECRET" not in str(told) and told["by 1 of closed"] == "3" and told["held 0 of closed"] == "0.625"
    assert parts_of(trainer.loss) == {"made of": "loss", "smoothing of loss": "0.125"}
    x, y = data()
    for loss in (trainer.loss, closed):
        fit(state_of(mlp), x, y, loss=loss, epochs=1, batch=4, checkpoints=tmp_path / loss.__name__)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"smoothing of loss" in content for content in files)
    assert not any(b"SECRET" in content for content in files)


def test_a_loss_that_calls_python_has_no_checkpoints(mlp: Ensemble, tmp_path: Path) -> None:
    def called(outputs: Any, targets: Any) -> jax.Array:
        loss = mean_square(outputs, targets)
        jax.debug.print("{loss}", loss=loss)  # changes nothing
        return loss + jax.pure_callback(
            lambda x: x * 5, jax.ShapeDtypeStruct((), loss.dtype), jax.lax.stop_gradient(loss)
        )

    x, y = data()
    with pytest.raises(InputError, match=r"run that calls Python from within JAX \(pure_callback\)"):
        fit(state_of(mlp), x, y, loss=called, epochs=1, batch=4, checkpoints=tmp_path)


def test_a_run_in_another_precision_is_another_run(mlp: Ensemble, tmp_path: Path) -> None:
    """Whose bits would be others. Nothing that was traced before, in the same process, may be taken for it."""
    runs(mlp, 1, tmp_path)
    with (
        jax.default_matmul_precision("bfloat16"),
        pytest.raises(InputError, match=r"\n  precision of products bfloat16, was highest$"),
    ):
        runs(mlp, 2, tmp_path)


KILLED = """
import pathlib
import jax
from tests.helpers.training import runs
with jax.default_matmul_precision("highest"):
    runs(None, 15, pathlib.Path({folder!r}))
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bits(mlp: Ensemble, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = KILLED.format(folder=str(folder))
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env={**os.environ})
    deadline = time.monotonic() + 200
    while not (folder / "2").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert 2 <= done < 15
    got, history = runs(mlp, 15, folder)
    expected, _ = runs(mlp, 15, None)
    same_bits(got, expected)
    assert len(history) == 15


def test_callbacks_are_called_after_every_epoch_and_stop_the_run(mlp: Ensemble, tmp_path: Path) -> None:
    calls: list[Any] = []

    def small(epoch: int, state: Any, history: History) -> Any:
        return history.loss[epoch].max() < jnp.float32(0)

    def note(epoch: int, state: Any, history: History) -> None:
        calls.append((epoch, len(history), int(state.steps), state.ensemble))

    def stop(epoch: int, state: Any, history: History) -> Any:
        return np.asarray(epoch == 2)

    state, history = runs(mlp, 6, tmp_path, callbacks=[small, stop, note])
    assert [call[:3] for call in calls] == [(0, 1, 4), (1, 2, 8), (2, 3, 12)] and len(history) == 3
    assert calls[-1][3].eval()(data()[0]).shape == (3, 12, 2)
    again, history = runs(mlp, 6, tmp_path, callbacks=[stop, note])  # has stopped, and stays so
    same_bits(again, state)
    assert len(calls) == len(history) == 3
    _, history = runs(mlp, 4, tmp_path)
    assert len(history) == 4


def test_an_epoch_whose_callback_failed_is_made_once_more(mlp: Ensemble, tmp_path: Path) -> None:
    def fail(epoch: int, state: Any, history: History) -> None:
        if epoch == 1:
            raise RuntimeError("no such disk")

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="no such disk"):
        runs(mlp, 3, tmp_path, callbacks=[fail])
    got, _ = runs(mlp, 3, tmp_path, callbacks=[lambda epoch, state, history: calls.append(epoch)])
    same_bits(got, runs(mlp, 3, None)[0])
    assert calls == [1, 2]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (print, r"`callbacks` must be a list of functions of \(epoch, state, history\)"),
        ([3], r"`callbacks` must be a list of functions"),
        ([lambda epoch: None], r"each of `callbacks` must be a function of \(epoch, state, history\); got .*\(epoch\)"),
        ([lambda epoch, state, history: history.loss.mean()], r"the callback .*<lambda> must return True to stop"),
        ([lambda epoch, state, history: jnp.ones(3, bool)], r"the callback .*<lambda> must return True to stop"),
    ],
)
def test_callbacks_that_are_none_are_refused(mlp: Ensemble, callbacks: Any, message: str) -> None:
    x, y = data()
    with pytest.raises(InputError, match=message):
        fit(state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4, callbacks=callbacks)


@pytest.mark.parametrize("interval", [0.0, 1000.0])
def test_progress_is_plain_lines_where_there_is_no_terminal(
    interval: float, mlp: Ensemble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # with which rich takes a file for a terminal
    monkeypatch.setattr(progress, "INTERVAL", interval)
    x, y = data()
    for wanted in (True, False):
        fit(state_of(mlp), x, y, loss=mean_square, epochs=4, batch=4, validation=(x, y), progress=wanted)
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == "" and captured.err.replace("\n", "").isprintable()
        shown = [] if not wanted else [1, 2, 3, 4] if interval == 0 else [1, 4]
        assert [line.partition(": ")[0] for line in lines] == [f"epoch {epoch} of 4" for epoch in shown]
        assert all(re.fullmatch(r".*: loss [0-9.]+, validation loss [0-9.]+", line) for line in lines)


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.shown(True, 20) as told:
        told(History(np.ones((1, 3))))
        told(History(np.ones((2, 3))))
    assert "epoch 2 of 20: loss 1" in stream.getvalue() and "\x1b[" in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    with progress.shown(True, 20) as told:
        told(History(np.ones((1, 3))))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as it is in a terminal: shells have what they start in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Ctrl-C pressed in the middle of JAX, after so many programs of steps."""
    made: list[int] = []
    through = minibatches.stepped_through

    def interrupted(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) > programs:
            jax.jit(lambda x: [signal.raise_signal(signal.SIGINT), x][1])(1.0)
        return through(*arguments, **options)

    monkeypatch.setattr(minibatches, "stepped_through", interrupted)


@pytest.mark.thinned
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("epochs", [0, 2])  # that were whole before the interruption, of two programs each
def test_an_interruption_says_where_the_checkpoint_is(
    epochs: int, mlp: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as error:
        interrupt_after(2 * epochs + 1, patch)
        runs(mlp, 4, tmp_path)
    assert str(error.value) == (
        f"training was interrupted after {epochs} of 4 epochs. {tmp_path / str(epochs)} is the checkpoint: the same "
        "call of `fit` goes on from there"
    )
    told = "".join(traceback.format_exception(error.value))
    assert "site-packages" not in told and len(told.splitlines()) < 15
    got, history = runs(mlp, 4, tmp_path)
    expected, whole = runs(mlp, 4, None)
    same_bits(got, expected)
    np.testing.assert_array_equal(history.loss, whole.loss)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_waits_until_the_checkpoint_is_written(
    mlp: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoints.Checkpoints._write

    def interrupted(self: Any, epoch: int, *arguments: Any) -> None:
        if epoch == 2:
            signal.raise_signal(signal.SIGINT)
        written(self, epoch, *arguments)

    monkeypatch.setattr(checkpoints.Checkpoints, "_write", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after 2 of 3 epochs\. .*2 is the checkpoint"):
        runs(mlp, 3, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_without_checkpoints_says_that_nothing_is_kept(
    mlp: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=r"after 1 of 4 epochs\. Nothing is kept.* `checkpoints`") as error:
        runs(mlp, 4, None)
    assert error.value.__context__ is None


def batches(epoch: int) -> Any:
    """Minibatches of 8, 8 and 5 rows, in another order every epoch."""
    x, y = data(21)
    order = np.random.default_rng(epoch).permutation(21)
    return [(x[order[rows]], y[order[rows]]) for rows in (slice(8), slice(8, 16), slice(16, 21))]


def test_minibatches_come_from_a_function_of_the_epoch(mlp: Ensemble) -> None:
    got, history = fit(state_of(mlp), batches, loss=mean_square, epochs=2, validation=data(21))
    state, losses = state_of(mlp), []
    for epoch in range(2):
        for x, y in batches(epoch):
            state, found = train_step(state, x, y, loss=mean_square)
            losses.append(found)
    same_bits(got, state)
    close(history.loss, np.array(losses).reshape(2, 3, 3).mean(1))
    assert history.validation["loss"].shape == (2, 3)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_of_a_stream_no_minibatch_is_lost(checkpointed: bool, mlp: Ensemble, tmp_path: Path) -> None:
    asked, drawn = [], []

    def stream() -> Any:
        for number in range(100):
            drawn.append(number)
            yield data(4)

    endless = stream()

    def three(epoch: int) -> Any:
        asked.append(epoch)
        return itertools.islice(endless, 3)

    place = tmp_path if checkpointed else None
    fit(state_of(mlp), three, loss=mean_square, epochs=2, validation=data(), checkpoints=place)
    assert asked == [0, 1] and drawn == list(range(6))


def noisy(key: jax.Array, batch: Any) -> Any:
    """Noise on the inputs, and rows mixed among themselves."""
    inputs, targets = batch
    noise, mixing = jax.random.split(key)
    share = jax.random.uniform(mixing, (len(inputs), 1))
    inputs = inputs + jax.random.normal(noise, inputs.shape)
    return share * inputs + (1 - share) * inputs[::-1], share * targets + (1 - share) * targets[::-1]


@pytest.mark.thinned
@pytest.mark.parametrize("given", ["rows", "batches"])
def test_augmentation_has_a_key_for_every_member_and_step_and_goes_on_to_the_same_bits(
    given: str, mlp: Ensemble, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def augment(key: jax.Array, batch: Any) -> Any:
        jax.debug.callback(lambda words: seen.append(tuple(np.asarray(words).tolist())), jax.random.key_data(key))
        return noisy(key, batch)

    def run(epochs: int, folder: Path | None, augment: Any = noisy) -> Any:
        options: Any = {"loss": mean_square, "epochs": epochs, "checkpoints": folder, "augment": augment}
        if given == "batches":
            return fit(state_of(mlp), batches, **options)
        return fit(state_of(mlp), *data(21), batch=8, shuffle="same", **options)

    expected, _ = run(3, None, augment)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 3 * 3 * 3  # members, steps, epochs
    run(1, tmp_path)
    got, _ = run(3, tmp_path)
    same_bits(got, expected)
    for other in (None, lambda key, batch: batch):
        with pytest.raises(InputError, match=r"(?s)checkpoints of another run.*the augmentation"):
            run(3, tmp_path, other)


def test_an_augmented_step_is_a_step_with_those_rows(mlp: Ensemble) -> None:
    """Also a few rows at a time, and of members that draw the same."""
    same = Ensemble.from_modules([mlp[0]] * 3)
    x, y = data(8)
    pixels = np.round(x * 10).astype("int8")

    def scaled(key: jax.Array, batch: Any) -> Any:  # from other data than the network takes
        inputs, targets = batch
        return (inputs[:, :3] / 10 + jax.random.normal(key, (len(inputs), 1)), targets)

    options: Any = {"loss": mean_square, "epochs": 1, "batch": 8, "shuffle": "never", "augment": scaled}
    found = {}
    for randomness in ("different", "same"):
        state = state_of(same, randomness=randomness)
        got, _ = fit(state, np.concatenate([pixels, pixels], 1), y, **options)
        parts, _ = fit(state, np.concatenate([pixels, pixels], 1), y, plan=Plan(rows=3, members=2), **options)
        close(got.ensemble.params, parts.ensemble.params)
        keys = [jax.random.fold_in(jax.random.fold_in(key, 2**32 - 3), 0) for key in state.keys]
        inputs = np.stack([scaled(key, (pixels, y))[0] for key in keys])
        expected, _ = train_step(state, inputs, np.stack([y] * 3), loss=mean_square, each=True)
        close(got.ensemble.params, expected.ensemble.params)
        found[randomness] = len({leaf.tobytes() for leaf in np.asarray(got.ensemble.params["fc1"]["kernel"])})
    assert found == {"different": 3, "same": 1}


OTHER_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "a loader": ({"inputs": [data()]}, r"`targets` are missing; minibatches, as of a DataLoader, are given by a fun"),
    "both": ({"inputs": batches, "batch": 3, "shuffle": "same"}, r"`batch`, `shuffle` cannot be given beside a func"),
    "no minibatches": ({"inputs": lambda epoch: iter([])}, "gave no minibatches for epoch 0"),
    "nothing": ({"inputs": lambda epoch: None}, "must give minibatches; got NoneType"),
    "no pair": ({"inputs": lambda epoch: [data()[0]]}, r"a minibatch must be a pair, \(inputs, targets\); got ndarray"),
    "no function": ({"augment": 3}, r"`augment` must be a function of \(key, \(inputs, targets\)\)"),
    "a failure": ({"augment": lambda key, batch: batch.x}, r"cannot be called with a key and .*float32\[5,3\]"),
    "inputs alone": ({"augment": lambda key, batch: batch[0]}, r"must give back a pair.*got one array, float32\[5,3\]"),
    "no epoch": ({"inputs": lambda: [data()]}, r"(?s)of an epoch must be a function of \(epoch\); got .*<lambda>\(\)"),
    "more inputs": ({"augment": lambda key, batch: ((batch[0], 1), batch[1])}, "must give back inputs that nest as"),
    "other rows": ({"augment": lambda key, batch: (batch[0], batch[1][:2])}, "does not fit: targets must begin"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_DATA)
def test_data_and_augmentation_that_do_not_fit_are_refused(case: str, mlp: Ensemble) -> None:
    options, message = OTHER_DATA[case]
    x, y = data(5)
    arrays: Any = {} if "inputs" in options else {"inputs": x, "targets": y, "batch": 5, "shuffle": "never"}
    with pytest.raises(InputError, match=message):
        fit(state_of(mlp), loss=mean_square, epochs=1, **arrays, **options)


FOREIGN: dict[str, Any] = {
    "Python's numbers": lambda: random.random(),
    "numpy's numbers": lambda: np.random.normal(),
    "a generator of one's own": np.random.default_rng(0).random,
}


@pytest.mark.parametrize("case", FOREIGN)
def test_augmentation_by_other_random_numbers_than_the_key_s_is_refused(case: str, mlp: Ensemble) -> None:
    x, y = data(4)
    with pytest.raises(InputError, match="`augment` must draw its random numbers from `key`"):
        fit(
            state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4,
            augment=lambda key, batch: (batch[0] + FOREIGN[case](), batch[1]),
        )  # fmt: skip


def test_outputs_that_are_spread_over_targets_are_told() -> None:
    ensemble = Ensemble.from_modules([nnx.Linear(3, 1, rngs=nnx.Rngs(seed)) for seed in range(2)])
    state, x, y = state_of(ensemble), data(4)[0], np.ones(4, "float32")
    with pytest.warns(UserWarning, match=r"mean_square spreads outputs \[4, 1\] .* targets \[4\] .* to \[4, 4\]"):
        fit(state, x, y, loss=mean_square, epochs=1, batch=4)
    for loss, targets in ((mean_square, y[:, None]), (lambda a, b: mean_square(a[:, 0], b), y)):
        train_step(state, x, targets, loss=loss)  # where a warning would be an error


def test_a_run_goes_on_under_the_plan_it_began_with(
    mlp: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which otherwise follows from the memory that is free: another plan rounds otherwise."""
    expected, _ = runs(mlp, 4, None)
    runs(mlp, 2, tmp_path / "run")
    monkeypatch.setattr(steps, "free_memory", lambda device: 1e4)
    steps._chosen.cache_clear()
    got, _ = runs(mlp, 4, tmp_path / "run")
    steps._chosen.cache_clear()
    same_bits(got, expected)


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


@pytest.mark.parametrize("place", ["gs://bucket/run", __file__])
def test_checkpoints_are_kept_in_a_directory_here(mlp: Ensemble, place: str) -> None:
    x, y = data()
    with pytest.raises(InputError, match="`checkpoints` must be a directory of this machine"):
        fit(state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4, checkpoints=place)


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
