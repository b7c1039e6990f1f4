"""Progress of a run on standard error: a bar on a terminal, lines of plain text in a file."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

from jaxensemble.training.history import History

INTERVAL = 1.0
"""Least seconds between two lines, except the first and the last."""


@contextlib.contextmanager
def show_progress(wanted: bool, epochs: int) -> Iterator[Callable[[History], None]]:
    """Gives a function that shows how far a run of so many epochs is."""
    if not wanted or sys.stderr is None:  # None for a program without a console on Windows
        yield lambda history: None
        return
    console = Console(stderr=True)
    # Variables such as FORCE_COLOR make rich take a file for a terminal.
    if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("training", total=epochs)
            yield lambda history: progress.update(task, completed=len(history), description=epoch_line(history, epochs))
        return
    lines = _Lines(epochs)
    try:
        yield lines
    finally:
        lines.finish()


def epoch_line(history: History, epochs: int) -> str:
    """Returns a line about the last epoch, with the means over the members.

    >>> import numpy as np
    >>> validation = {"loss": np.array([[1.0, 2.0]]), "accuracy": np.array([[0.5, 0.7]])}
    >>> epoch_line(History(np.array([[0.5, 1.0]]), validation), 20)
    'epoch 1 of 20: loss 0.75, validation loss 1.5, accuracy 0.6'
    """
    if not len(history):
        return "training"
    validation = {"validation loss" if name == "loss" else name: rows for name, rows in history.validation.items()}
    means = (f"{name} {rows[-1].mean():.4g}" for name, rows in {"loss": history.loss, **validation}.items())
    return f"epoch {len(history)} of {epochs}: {', '.join(means)}"


@dataclasses.dataclass
class _Lines:
    """Lines for epochs, at most one in `INTERVAL` seconds."""

    epochs: int
    latest: float = -INTERVAL
    waiting: str | None = None

    def __call__(self, history: History) -> None:
        if not len(history):
            return
        self.waiting = epoch_line(history, self.epochs)
        if time.monotonic() >= self.latest + INTERVAL:
            self.finish()

    def finish(self) -> None:
        """Writes the waiting line, if there is one."""
        if self.waiting is not None:
            print(self.waiting, file=sys.stderr, flush=True)
            self.latest, self.waiting = time.monotonic(), None
