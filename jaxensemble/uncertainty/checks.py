"""Checks of probabilities, labels and quantile levels."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from jaxensemble.arrays import as_array, is_traced
from jaxensemble.compat import Tracer
from jaxensemble.devices.placement import gather
from jaxensemble.errors import InputError, NotANumberWarning, shorten_list

OPTIONS = {"classification": ("outputs_are", "class_axis"), "regression": (), "gaussian": ()}
"""The tasks, and the options of each."""

NOT_ONE = 0.05
"""The distance of a sum from 1 that shows logits: bfloat16 logarithms move that of 1,000 classes by 0.02."""


def as_floating(array: ArrayLike, name: str) -> Float[Array, "..."]:
    """The array in float32 or float64."""
    if isinstance(array, dict | tuple | list):
        raise InputError(
            f"`{name}` must be one array; got a {type(array).__name__} of {len(array)}. Of a network with several "
            "outputs choose the one to read: Prediction.from_outputs(ensemble(x)"
            f"[{next(iter(array), 'name') if isinstance(array, dict) else 0!r}])"
        )
    values = jnp.asarray(as_array(array, name))
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise InputError(f"`{name}` must be of a floating-point dtype; got {values.dtype} {values.shape}")
    return values.astype(jnp.float32) if values.dtype.itemsize < 4 else values


def require_rank(values: Float[Array, "..."], name: str, axes: str) -> None:
    layout = f"[{', '.join(axes)}, ...]"
    if values.ndim < len(axes):
        raise InputError(
            f"`{name}` must have at least {len(axes)} axes, {layout}; got shape {values.shape}. "
            "For one member or one example give an axis of length 1."
        )
    if values.shape[0] == 0:
        raise InputError(f"`{name}` must be {layout} with something along its first axis; got shape {values.shape}")


def find_class_axis(values: Float[Array, "..."], class_axis: int | None, name: str, axes: str) -> int:
    """`class_axis`, which does not count a members axis M, from the end. Of the axes that it counts, the first is N."""
    require_rank(values, name, axes)
    rank = values.ndim - axes.count("M")
    if class_axis is None and rank > 2:
        raise InputError(
            f"`{name}` of shape {values.shape} could have classes along several axes, so that `class_axis` has to be "
            f"given: 1 for [N, C, ...], as PyTorch's losses take it ({values.shape[1 - rank]} classes), -1 for "
            f"[N, ..., C] ({values.shape[-1]} classes)"
        )
    class_axis = -1 if class_axis is None else class_axis
    allowed = (*range(1, rank), *range(1 - rank, 0))
    if not isinstance(class_axis, int) or class_axis not in allowed:
        without = " without the members axis" if "M" in axes else ""
        raise InputError(
            f"`class_axis` must be one of {', '.join(map(str, allowed))} for `{name}` of shape {values.shape}, counted"
            f"{without} from the rows, which are axis 0; got {class_axis}"
        )
    axis = class_axis if class_axis < 0 else class_axis - rank
    if values.shape[axis] < 2:
        raise InputError(
            f"`{name}` must have at least two classes; got {values.shape[axis]} along class axis {class_axis} of shape "
            f"{values.shape}. A single sigmoid output x is the two logits 0 and x, the probabilities 1 - p and p. Of a "
            'quantity, what members predict is task="regression".'
        )
    return axis


def require_distribution(values: Float[Array, "..."], axis: int, name: str) -> None:
    if isinstance(values, Tracer):
        return
    with jax.ensure_compile_time_eval():  # known values can also be met while tracing something else
        sums = jnp.sum(values, axis)
        if jnp.any(values < 0) or jnp.any(jnp.abs(sums - 1) > NOT_ONE):
            raise InputError(
                f"`{name}` must be at least 0 and sum to 1 over the classes; got a least value of {values.min():g} "
                f"and sums from {sums.min():g} to {sums.max():g}"
            )


def warn_of_nan(lost: Bool[Array, "M N"]) -> None:
    """Warns of the members and rows that have a NaN, if there are any. Nothing is looked at while tracing.

    The class of such a row is an integer, which cannot be NaN itself.
    """
    if isinstance(lost, Tracer):
        return
    found = np.asarray(gather(lost))
    members, rows = (np.flatnonzero(found.any(axis)).tolist() for axis in (1, 0))
    warn_of_lost_rows(members, rows, found.shape[1], stacklevel=4)


def warn_of_lost_rows(members: Sequence[int], rows: Sequence[int], total: int, *, stacklevel: int) -> None:
    """Warns that members give NaN for some of all rows, if there are any."""
    if not members:
        return
    names = [str(member) for member in members]
    who = f"member {names[0]} gives" if len(names) == 1 else f"members {shorten_list(names)} give"
    warnings.warn(
        f"{who} NaN for {len(rows)} of {total} rows ({shorten_list([str(row) for row in rows])}): what is "
        "predicted of these, such as a class or votes, means nothing",
        NotANumberWarning,
        stacklevel=stacklevel,
    )


def check_options(task: Any, options: Collection[str], others: Sequence[str] = (), inputs: Sequence[str] = ()) -> None:
    """Checks that a task exists and has these options.

    The error also lists `others`, further arguments of the call, and `inputs`, the network's arguments by name.

    **Raises:** `InputError` for an unknown task or option.
    """
    if not isinstance(task, str) or task not in OPTIONS:
        raise InputError(f"`task` must be {', '.join(map(repr, OPTIONS))}; got {task!r}")
    unknown = [f"`{name}`" for name in options if name not in OPTIONS[task]]
    if unknown:
        known = [*OPTIONS[task], *others, *inputs]
        raise InputError(
            f"{', '.join(unknown)}: no such argument; with task={task!r} there are {', '.join(known) or 'none'}"
        )


def labelled_rows(
    array: ArrayLike, labels: ArrayLike | Sequence[int], class_axis: int | None, name: str
) -> tuple[Float[Array, "R C"], Integer[Array, " R"]]:
    """One row per label: `[R, C]` and `[R]`."""
    values = as_floating(array, name)
    answers = jnp.asarray(labels if isinstance(labels, Sequence) else as_array(labels, "labels"))
    if class_axis is None and answers.ndim != values.ndim - 1:
        class_axis = -1  # the labels fit no axis, which is what the error has to say
    axis = find_class_axis(values, class_axis, name, "NC")
    rows, classes = jnp.moveaxis(values, axis, -1), values.shape[axis]
    if answers.shape != rows.shape[:-1] or not jnp.issubdtype(answers.dtype, jnp.integer):
        raise InputError(
            f"`labels` must be class numbers of shape {rows.shape[:-1]}, for `{name}` of shape {values.shape}; "
            f"got {answers.dtype} {answers.shape}"
        )
    if answers.size == 0:
        raise InputError(f"`labels` must hold at least one label; got shape {answers.shape}")
    require_labels(answers, classes)
    return rows.reshape(-1, classes), answers.reshape(-1)


def require_labels(labels: Integer[Array, "..."], classes: int) -> None:
    if isinstance(labels, Tracer):
        return
    with jax.ensure_compile_time_eval():
        if labels.min() < 0 or labels.max() >= classes:
            raise InputError(f"`labels` must be from 0 to {classes - 1}; got {labels.min()} to {labels.max()}")


def quantile_levels(q: ArrayLike | Sequence[ArrayLike], name: str, dtype: DTypeLike) -> Float[Array, "*Q"]:
    traced = is_traced(q)
    known = None if traced else np.asarray(q, dtype)
    levels = jnp.asarray(q if known is None else known, dtype)
    if levels.ndim > 1:
        raise InputError(f"`{name}` must be a number or one axis of numbers; got shape {levels.shape}")
    if known is not None and not ((known >= 0) & (known <= 1)).all():
        raise InputError(f"`{name}` must be from 0 to 1; got {known.tolist()}")
    return levels
