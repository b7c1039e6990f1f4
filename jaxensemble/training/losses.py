"""Losses: functions of one member's outputs and the targets that give a number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.errors import InputError
from jaxensemble.rows import Axes
from jaxensemble.training.data import along

Loss = Callable[[Any, Any], jax.Array]


def name_of(function: Any) -> str:
    return getattr(function, "__name__", "`loss`")


def check_function(function: Any, name: str) -> None:
    """Raises `InputError` for what is no function, or one of PyTorch's."""
    theirs = type(function).__module__.startswith("torch.") or getattr(function, "__module__", "").startswith("torch.")
    if not callable(function) or theirs:
        raise InputError(
            f"`{name}` must be a function of (outputs, targets) made of JAX's operations, as of "
            "optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean(); got "
            f"{getattr(function, '__qualname__', type(function).__name__)}{' of PyTorch' if theirs else ''}"
        )


def number_of(function: Loss, outputs: Any, targets: Any) -> jax.Array:
    """The loss, or a metric, of one member. Raises `InputError` for anything but a number."""
    number = function(outputs, targets)
    leaves = jax.tree.leaves(number)
    single = len(leaves) == 1 and leaves[0] is number and jnp.shape(number) == ()
    if not single or not jnp.issubdtype(jnp.result_type(number), jnp.floating):
        got = jax.tree.map(jax.typeof, number)
        raise InputError(
            f"{name_of(function)} must give one floating-point number, the mean over a minibatch; got {got}"
        )
    return number


def check_is_mean(loss: Loss, outputs: Any, targets: Any, axes: Axes, rows: int) -> None:
    """Raises `InputError` for a loss of so many rows twice that is not the mean of those of either half.

    `outputs` and `targets` are shapes and dtypes, `axes` their batch axes. Made-up numbers take their places; integers
    are 0 in one half and 1 in the other, so that weights by class, or of what is no padding, are not the same.
    """
    leaves, tree = jax.tree.flatten((outputs, targets))
    pairs = zip(leaves, axes, strict=True)
    whole = tree.unflatten([_made_up(leaf, axis, rows, seed) for seed, (leaf, axis) in enumerate(pairs)])
    halves = [along(whole, axes, lambda leaf, axis: jnp.split(leaf, 2, axis)[k]) for k in range(2)]  # noqa: B023
    at_once, first, second = (float(number_of(loss, *data)) for data in (whole, *halves))
    if not np.allclose(at_once, (first + second) / 2, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise InputError(
            f"`plan` has rows={rows}, but {name_of(loss)} is not the plain mean over the rows: of {2 * rows} rows it "
            f"is {at_once:.6g}, of their halves {first:.6g} and {second:.6g}. Of sums, and of means weighted by class, "
            "the gradient is not the mean of that of parts: leave `rows` out, or give the plain mean."
        )


def _made_up(leaf: Any, axis: int | None, rows: int, seed: int) -> jax.Array:
    """Numbers for one array, twice as many rows along its batch axis."""
    shape = tuple(2 * rows if k == axis else size for k, size in enumerate(leaf.shape))
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jax.random.uniform(jax.random.key(seed), shape).astype(leaf.dtype)
    half = np.arange(2 * rows) // rows
    along_axis = half.reshape([-1 if k == axis else 1 for k in range(len(shape))]) if axis is not None else 0
    return jnp.broadcast_to(jnp.asarray(along_axis, leaf.dtype), shape)
