"""Callbacks of `fit`, and the progress that it shows."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxensemble import Ensemble, History, InputError, fit
from jaxensemble.training import progress
from tests.helpers.training import data, mean_square, runs, same_bits, state_of


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
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take a file for a terminal
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
    with progress.show_progress(True, 20) as show:
        show(History(np.ones((1, 3))))
        show(History(np.ones((2, 3))))
    assert "epoch 2 of 20: loss 1" in stream.getvalue() and "\x1b[" in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    with progress.show_progress(True, 20) as show:
        show(History(np.ones((1, 3))))
