"""Functions that `fit` calls after every epoch."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxensemble.errors import InputError
from jaxensemble.training.history import History
from jaxensemble.training.state import TrainState

Callback = Callable[[int, TrainState, History], bool | None]


def check_callbacks(callbacks: Any) -> None:
    """Checks that `callbacks` is a sequence of functions of (epoch, state, history).

    **Raises:** `InputError` if it is not.
    """
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str) or not all(map(callable, callbacks)):
        raise InputError(
            f"`callbacks` must be a list of functions of (epoch, state, history); got {callbacks!r:.100}. They are "
            "called after every epoch, and stop the training by returning True"
        )
    for callback in callbacks:
        check_signature(callback, "each of `callbacks`", "epoch", "state", "history")


def check_signature(function: Callable[..., Any], name: str, *arguments: str) -> None:
    """Checks that a function takes these positional arguments.

    **Raises:** `InputError` if it cannot be called with so many.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        found = getattr(function, "__qualname__", type(function).__name__)
        raise InputError(f"{name} must be a function of ({', '.join(arguments)}); got {found}{signature}") from error


def run_callbacks(callbacks: Sequence[Callback], state: TrainState, history: History) -> bool:
    """Calls all callbacks, and returns whether any of them stops the training.

    **Raises:** `InputError` for answers other than True, False and None.
    """
    answers = [(callback, callback(len(history) - 1, state, history)) for callback in callbacks]
    for callback, answer in answers:
        if answer is not None and not _is_boolean(answer):
            raise InputError(
                f"the callback {getattr(callback, '__qualname__', type(callback).__name__)} must return True to stop "
                f"the training, and False or None to go on; got {answer!r:.100}"
            )
    return any(bool(answer) for _, answer in answers)


def _is_boolean(answer: Any) -> bool:
    """Returns whether an answer is one boolean, of Python, NumPy or JAX."""
    if isinstance(answer, np.ndarray | jax.Array):
        return answer.ndim == 0 and answer.dtype == np.bool_
    return isinstance(answer, bool | np.bool_)
