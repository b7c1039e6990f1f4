"""Predictions for more rows than memory holds: batch after batch, of which figures alone leave the device."""

import collections
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxensemble.devices.placement import gather
from jaxensemble.errors import InputError, NotANumberWarning, shorten_list
from jaxensemble.uncertainty.predictions import figures_of

IN_FLIGHT = 2
"""The batches that are on the device at once: one is computed while the results of the one before are read."""


def check_figures(names: Any, task: str) -> tuple[str, ...]:
    """Returns the names of figures.

    **Raises:** `InputError` for names that the prediction of a task does not have.
    """
    known = figures_of(task)
    names = (names,) if isinstance(names, str) else tuple(names)
    lost = [name for name in names if name not in known]
    if lost or not names:
        raise InputError(
            f"`figures` must be attributes of a prediction for {task}: {', '.join(known)}; got "
            f"{', '.join(map(repr, lost)) or 'none'}"
        )
    return names


def split_rows(arrays: Any, rows: int) -> Iterator[Any]:
    """Yields blocks of so many rows of an array, or of each array of a tree, such as a memory-mapped file; each copied.

    >>> [block.tolist() for block in split_rows(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    leaves = jax.tree.leaves(arrays)
    counts = {leaf.shape[0] if getattr(leaf, "shape", ()) else None for leaf in leaves}
    if len(counts) != 1 or None in counts:
        raise InputError("with `rows`, `batches` must be an array, or arrays with one number of rows")
    for first in range(0, counts.pop() or 0, rows):
        yield jax.tree.map(lambda leaf: np.array(leaf[first : first + rows]), arrays)  # noqa: B023


def run_batches(
    run: Callable[[tuple[Any, ...], Mapping[str, Any], int], tuple[Any, int]], batches: Iterable[Any]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the figures of each batch, in order. `run` starts a batch on the device, for a number of rows or more."""
    pending = collections.deque[tuple[Any, int]]()
    most = 0
    for batch in batches:
        named = batch if isinstance(batch, Mapping) else {}
        inputs = () if named else batch if isinstance(batch, tuple) else (batch,)
        pending.append(run(inputs, named, most))
        most = max(most, pending[-1][1])
        if len(pending) == IN_FLIGHT:
            yield _read(*pending.popleft())
    while pending:
        yield _read(*pending.popleft())


def _read(returned: Any, rows: int) -> dict[str, np.ndarray]:
    figures, (members, lost) = jax.tree.map(np.asarray, gather(returned))
    if lost[:rows].any():
        warnings.warn(
            f"members {shorten_list([str(k) for k in np.flatnonzero(members)])} give NaN for "
            f"{lost[:rows].sum()} of the {rows} rows of a batch: what is predicted of these means nothing",
            NotANumberWarning,
            stacklevel=4,
        )
    return {name: figure[:rows] for name, figure in figures.items()}
