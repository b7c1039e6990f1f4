"""Functions that change a minibatch at random, for every member on its own, within the compiled step."""

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
"""What is folded into a member's key, before the number of the step is."""


def check_augment(function: Any) -> None:
    """Raises `InputError` for what is no function."""
    if function is not None and not callable(function):
        raise InputError(
            "`augment` must be a function of (key, (inputs, targets)) made of JAX's operations, which gives back such "
            f"a pair; got {type(function).__name__}"
        )


def check_draws(trace: Callable[[], Program]) -> None:
    """Raises `InputError` for a function that draws from Python or numpy, and not by its key.

    Every step would have the numbers that it was compiled with. `trace` traces it anew: numbers of a generator of
    one's own are others at the second time.
    """
    before = _generator_states()
    first, second = trace(), trace()
    if _generator_states() != before or not is_same_program(first, second):
        raise InputError(
            "`augment` must draw its random numbers from `key`, as by jax.random.normal(key, inputs.shape): those of "
            "Python and numpy are drawn once, when it is compiled, and would be the same at every step"
        )


def _generator_states() -> list[Any]:
    """Of the generators that Python and numpy share among all callers."""
    numbers: Any = np.random.get_state()
    return [random.getstate(), *(part.tobytes() if isinstance(part, np.ndarray) else part for part in numbers)]


def augment_minibatch(function: Augment, key: jax.Array, data: tuple[Any, Any]) -> tuple[Any, Any]:
    """The minibatch of one member as a function changes it; a single input stands by itself there.

    Raises `InputError` where the function fails, or gives back anything but inputs, as many, and targets.
    """
    inputs, targets = data
    alone = len(inputs) == 1
    given = (inputs[0] if alone else inputs, targets)
    try:
        found = function(key, given)
    except JaxEnsembleError:
        raise
    except Exception as error:  # which function it was, and of what, says this alone
        raise InputError(
            f"`augment` cannot be called with a key and {jax.tree.map(jax.typeof, given)}: {describe_error(error)}",
            details=str(error),
        ) from error
    if not isinstance(found, tuple) or len(found) != 2:
        raise InputError(f"`augment` must give back a pair, (inputs, targets); got {_description(found)}")
    after = ((found[0],) if alone else found[0], found[1])
    if jax.tree.structure(after[0]) != jax.tree.structure(inputs):
        raise InputError(
            f"`augment` must give back inputs that nest as it got them, {jax.tree.structure(given[0])}; got "
            f"{jax.tree.structure(found[0])}"
        )
    return after


def _description(found: Any) -> str:
    return f"one array, {jax.typeof(found)}" if isinstance(found, jax.Array) else type(found).__name__


def augmentation_keys(keys: jax.Array, steps: jax.Array) -> jax.Array:
    """The keys of a step for members with these keys, `[M]`."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, AUGMENTATION), steps))(keys)
