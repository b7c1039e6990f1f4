"""Random changes of a minibatch, separate for every member, within the compiled step."""

import random
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxensemble.compat import Program
from jaxensemble.errors import InputError, JaxEnsembleError, describe_error
from jaxensemble.training.fingerprint import is_same_program

Augment = Callable[[jax.Array, tuple[Any, Any]], tuple[Any, Any]]

AUGMENTATION = 2**32 - 3
"""Number that is folded into a member's key, before the number of the step."""


def check_augment(function: Any) -> None:
    """Checks that `augment` is a function.

    **Raises:** `InputError` if it is not.
    """
    if function is not None and not callable(function):
        raise InputError(
            "`augment` must be a function of (key, (inputs, targets)) made of JAX's operations, which returns "
            f"another such pair; got {type(function).__name__}"
        )


def check_draws(trace: Callable[[], Program]) -> None:
    """Checks that a function draws its random numbers from its key, not from Python or numpy.

    Otherwise every step would use the numbers that it was compiled with. `trace` traces the function. Two traces show
    generators of the function's own, which give different numbers the second time.

    **Raises:** `InputError` for a function that draws from Python, numpy or a generator of its own.
    """
    before = _generator_states()
    first, second = trace(), trace()
    if _generator_states() != before or not is_same_program(first, second):
        raise InputError(
            "`augment` must draw its random numbers from `key`, for example by jax.random.normal(key, "
            "inputs.shape): numbers of Python and numpy are drawn once, when `augment` is compiled, and would be the "
            "same at every step"
        )


def _generator_states() -> list[Any]:
    """Returns the states of the generators that Python and numpy share among all callers."""
    numbers: Any = np.random.get_state()
    return [random.getstate(), *(part.tobytes() if isinstance(part, np.ndarray) else part for part in numbers)]


def augment_minibatch(function: Augment, key: jax.Array, data: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the minibatch of one member after a function has changed it. The function gets a single input bare.

    **Raises:** `InputError` where the function fails, or returns anything but as many inputs, and targets.
    """
    inputs, targets = data
    alone = len(inputs) == 1
    given = (inputs[0] if alone else inputs, targets)
    try:
        found = function(key, given)
    except JaxEnsembleError:
        raise
    except Exception as error:  # the error of the function itself names neither `augment` nor its arguments
        raise InputError(
            f"`augment` cannot be called with a key and {jax.tree.map(jax.typeof, given)}: {describe_error(error)}",
            details=str(error),
        ) from error
    if not isinstance(found, tuple) or len(found) != 2:
        raise InputError(f"`augment` must return a pair, (inputs, targets); got {_description(found)}")
    after = ((found[0],) if alone else found[0], found[1])
    if jax.tree.structure(after[0]) != jax.tree.structure(inputs):
        raise InputError(
            f"`augment` must return inputs that nest as it got them, {jax.tree.structure(given[0])}; got "
            f"{jax.tree.structure(found[0])}"
        )
    return after


def _description(found: Any) -> str:
    return f"one array, {jax.typeof(found)}" if isinstance(found, jax.Array) else type(found).__name__


def augmentation_keys(keys: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns the keys `[M]` of one step, made from the members' keys `[M]`."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, AUGMENTATION), steps))(keys)
