"""Losses: functions from one member's outputs and targets to a number."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer, Shaped

from jaxensemble.compat import Tracer
from jaxensemble.errors import InputError, JaxEnsembleError, describe_error
from jaxensemble.programs.rewrite import equations
from jaxensemble.programs.rows import Axes
from jaxensemble.training.data import map_along_axes

Loss = Callable[[Any, Any], jax.Array]


def name_of(function: Any) -> str:
    return getattr(function, "__name__", "`loss`")


def check_function(function: Any, name: str) -> None:
    """Checks that a loss or metric is a function of JAX.

    **Raises:** `InputError` for objects that cannot be called, and functions of PyTorch."""
    inner = function.func if isinstance(function, functools.partial) else function
    homes = (str(getattr(place, "__module__", "")) for place in (inner, type(inner)))
    theirs = any(home.partition(".")[0] == "torch" for home in homes)
    if not callable(function) or theirs:
        raise InputError(
            f"`{name}` must be a function of (outputs, targets) made of JAX's operations, for example "
            "optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean(); got "
            f"{getattr(inner, '__qualname__', type(inner).__name__)}{' of PyTorch' if theirs else ''}"
        )


def number_of(function: Loss, outputs: Any, targets: Any) -> jax.Array:
    """The loss, or a metric, of one member.

    **Raises:** `InputError` if the function cannot be called, or gives anything except a number."""
    try:
        number = function(outputs, targets)
    except JaxEnsembleError:
        raise
    except Exception as error:  # JAX's text names neither the function nor the targets
        shapes = " and ".join(str(jax.tree.map(jax.typeof, tree)) for tree in (outputs, targets))
        raise InputError(
            f"{name_of(function)} cannot be called with outputs and targets {shapes}: {describe_error(error)}",
            details=str(error),
        ) from error
    leaves = jax.tree.leaves(number)
    single = len(leaves) == 1 and leaves[0] is number and not isinstance(number, str) and jnp.shape(number) == ()
    if not single or not jnp.issubdtype(jnp.result_type(number), jnp.floating):
        got = number if isinstance(number, str) else jax.tree.map(jax.typeof, number)
        raise InputError(
            f"{name_of(function)} must give one floating-point number, the mean over a minibatch; got {got}"
        )
    return number


def warn_of_pairs(function: Loss, outputs: Any, targets: Any) -> None:
    """Warns of a loss that takes every output with every target, where their shapes differ by axes of length 1.

    Of outputs `[N, 1]` and targets `[N]`, `outputs - targets` is `[N, N]`. A loss that reshapes them gets no warning.
    """
    shapes = [leaf.shape for tree in (outputs, targets) for leaf in jax.tree.leaves(tree)]
    if len(shapes) != 2 or len({tuple(size for size in shape if size != 1) for shape in shapes}) != 1:
        return
    try:
        pairs = np.broadcast_shapes(*shapes)
    except ValueError:
        return
    if pairs in shapes:
        return
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (outputs, targets))
    steps = equations(jax.make_jaxpr(function)(*given))
    if any(getattr(var.aval, "shape", None) == pairs for step in steps for var in step.outvars):
        warnings.warn(
            f"{name_of(function)} spreads outputs {list(shapes[0])} of a member and targets {list(shapes[1])} over "
            f"each other, to {list(pairs)}: it compares every output with every target. Give targets of the outputs' "
            "shape, or reshape the outputs in the loss",
            stacklevel=2,
        )


LABELS = (*range(1, 16), -1, -100, 255)
"""Integers that one row has where the others have zeros: classes, and numbers used for padding."""


def check_is_mean(loss: Loss, outputs: Any, targets: Any, axes: Axes, rows: int, why: str) -> None:
    """Checks that the loss of all rows is the mean of the losses of both halves.

    `outputs` and `targets` are shapes and dtypes, `axes` their batch axes; `why` begins the error. The check uses
    made-up numbers, smaller in one half, so that a mask, or weights by class, differ between both. A loss that closes
    over traced values cannot be checked and passes.

    **Raises:** `InputError` for any other loss.
    """
    few = min(rows, 2)
    leaves, tree = jax.tree.flatten((outputs, targets))
    pairs = list(zip(leaves, axes, strict=True))

    @jax.jit
    def of_whole_and_halves(label: Any) -> Float[Array, "3"]:
        whole = tree.unflatten([_made_up(leaf, axis, few, seed, label) for seed, (leaf, axis) in enumerate(pairs)])
        halves = (map_along_axes(whole, axes, lambda leaf, axis: jnp.split(leaf, 2, axis)[k]) for k in range(2))  # noqa: B023
        return jnp.stack([number_of(loss, *data).astype(jnp.float32) for data in (whole, *halves)])

    with jax.ensure_compile_time_eval(), np.errstate(invalid="ignore"):
        for label in LABELS if any(not _is_inexact(leaf) for leaf in leaves) else LABELS[:1]:
            found = of_whole_and_halves(label)
            if isinstance(found, Tracer):
                return
            at_once, *parts = np.asarray(found, np.float64)
            largest = max(filter(np.isfinite, map(abs, (at_once, *parts))), default=0.0)
            if not np.allclose(at_once, np.mean(parts), rtol=0, atol=1e-3 * largest, equal_nan=True):
                raise InputError(
                    f"{why}, but {name_of(loss)} is not the plain mean over the rows: of {2 * few} "
                    f"rows it is {at_once:.6g}, of their halves {parts[0]:.6g} and {parts[1]:.6g}. The gradient of a "
                    "sum, of a mean weighted by class, or of anything else that is no plain mean, is not the mean of "
                    "the gradients of parts: leave `rows` out, or give the plain mean."
                )


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _made_up(leaf: Any, axis: int | None, rows: int, seed: int, label: Integer[ArrayLike, ""]) -> Shaped[Array, "..."]:
    """Made-up numbers for one array, with `2 * rows` rows along its batch axis, in float32 at least."""
    shape = tuple(2 * rows if k == axis else size for k, size in enumerate(leaf.shape))
    last = np.ones(())
    if axis is not None:
        last = (np.arange(2 * rows) >= rows).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    if _is_inexact(leaf):
        uniform = jax.random.uniform(jax.random.key(seed), shape, minval=0.1)
        parts = 1 + 0.5j if jnp.iscomplexobj(leaf) else 1
        return (parts * uniform * np.where(last, 1, 0.25)).astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return jnp.broadcast_to(jnp.where(last, label, 0).astype(leaf.dtype), shape)
