"""Checkpoints of `fit`: a run goes on from them to the same bits, also one that was killed or interrupted."""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxensemble import Ensemble, InputError, fit
from jaxensemble.training import checkpoints, minibatches, planning
from tests.helpers.training import data, mean_square, runs, same_bits, state_of


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
    """Another precision gives other bits. Programs that this process traced before must not be used."""
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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restores Ctrl-C as in a terminal: shells make background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presses Ctrl-C in the middle of JAX, after a number of programs of steps."""
    made: list[int] = []
    through = minibatches.run_steps

    def interrupted(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) > programs:
            jax.jit(lambda x: [signal.raise_signal(signal.SIGINT), x][1])(1.0)
        return through(*arguments, **options)

    monkeypatch.setattr(minibatches, "run_steps", interrupted)


@pytest.mark.thinned
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("epochs", [0, 2])  # complete epochs before the interruption, of two programs each
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
    shown = "".join(traceback.format_exception(error.value))
    assert "site-packages" not in shown and len(shown.splitlines()) < 15
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


def test_a_run_goes_on_under_the_plan_it_began_with(
    mlp: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan depends on free memory, and another plan rounds differently."""
    expected, _ = runs(mlp, 4, None)
    runs(mlp, 2, tmp_path / "run")
    monkeypatch.setattr("jaxensemble.running.workload.free_memory", lambda device: 1e4)
    planning._choose_plan.cache_clear()
    got, _ = runs(mlp, 4, tmp_path / "run")
    planning._choose_plan.cache_clear()
    same_bits(got, expected)


@pytest.mark.parametrize("place", ["gs://bucket/run", __file__])
def test_checkpoints_are_kept_in_a_directory_here(mlp: Ensemble, place: str) -> None:
    x, y = data()
    with pytest.raises(InputError, match="`checkpoints` must be a directory on this machine"):
        fit(state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4, checkpoints=place)
