"""Calls with any number of rows by programs for a few numbers: rows are added before, and cut off after."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxensemble.errors import InputError
from jaxensemble.programs.rows import Axes, MixedRows
from jaxensemble.running.workload import Workload

LARGEST = 256
"""The largest power of two among the compiled numbers of rows; above it, they are its multiples."""


class RowsMayMix(InputError):
    """Rows cannot be added to a minibatch, since the network may mix its rows."""


def compiled_rows(rows: int) -> int:
    """Returns the number of rows that a program is compiled for.

    >>> [compiled_rows(rows) for rows in (0, 1, 3, 64, 65, 256, 257, 600)]
    [1, 1, 4, 64, 128, 256, 512, 768]
    """
    return max(1, 1 << (rows - 1).bit_length() if 0 < rows <= LARGEST else -(-rows // LARGEST) * LARGEST)


def prove_padding(workload: Workload) -> Axes:
    """Returns the batch axes of the outputs of one member, if added rows change no other row.

    The program is compared with the programs for one row, and for one row less.

    **Raises:** `InputError` for inputs without a batch axis, `RowsMayMix` for a network that may mix rows.
    """
    rows = workload.rows
    if rows is None:
        raise InputError(
            "rows cannot be added: no input has a batch axis, which all inputs of a Flax module must share"
        )
    try:
        first, *others = (workload.rows_out(other) for other in ({1, rows - 1} if rows > 2 else {3 - rows}))
        if any(axes != first for axes in others):
            raise MixedRows("an output has another batch axis for one row")
    except MixedRows as error:
        raise RowsMayMix(
            f"rows cannot be added, since the network may mix the rows of a minibatch ({error}): call the ensemble, "
            "which compiles each number of rows. For example, BatchNorm in training mode mixes rows."
        ) from error
    return first


def count_rows(inputs: Any, axes: Axes, ahead: int) -> int:
    """Returns the number of rows of inputs, whose batch axes are counted after `ahead` others.

    **Raises:** `InputError` for inputs of different numbers of rows, or none.
    """
    leaves = jax.tree.leaves(inputs)
    fits = len(leaves) == len(axes) and all(
        a is None or a + ahead < jnp.ndim(x) for x, a in zip(leaves, axes, strict=True)
    )
    rows = {x.shape[a + ahead] for x, a in zip(leaves, axes, strict=True) if a is not None} if fits else set()
    if len(rows) != 1:
        raise InputError(
            "inputs must have one number of rows; got " + ", ".join(jax.typeof(leaf).str_short() for leaf in leaves)
        )
    return rows.pop()


@functools.partial(jax.jit, static_argnames=("axes", "ahead", "rows"))
def pad_rows(inputs: Any, axes: Axes, ahead: int, rows: int) -> Any:
    """Returns inputs with more rows: copies of the first row, or zeros if there is none."""

    def pad(leaf: jax.Array, axis: int | None) -> jax.Array:
        if axis is None:
            return leaf
        axis, missing = axis + ahead, rows - leaf.shape[axis + ahead]
        shape = [missing if k == axis else size for k, size in enumerate(leaf.shape)]
        first = lax.slice_in_dim(leaf, 0, 1, axis=axis) if leaf.shape[axis] else jnp.zeros((), leaf.dtype)
        return jnp.concatenate([leaf, jnp.broadcast_to(first, shape)], axis)

    leaves, tree = jax.tree.flatten(inputs)
    return jax.tree.unflatten(tree, list(map(pad, leaves, axes)))


@functools.partial(jax.jit, static_argnames=("axes", "rows"))
def cut_rows(outputs: Any, axes: Sequence[int | None], rows: int) -> Any:
    """Returns the first rows of the outputs of all members. Outputs without a batch axis stay as they are."""
    leaves, tree = jax.tree.flatten(outputs)
    cut = [x if a is None else lax.slice_in_dim(x, 0, rows, axis=a + 1) for x, a in zip(leaves, axes, strict=True)]
    return jax.tree.unflatten(tree, cut)


class PaddedEnsemble:
    """An ensemble that runs any number of rows by a few compiled programs: `Ensemble.padded` makes it.

    It is called as the ensemble is, and returns the same outputs, except for rounding. Programs are compiled for 1, 2,
    4, ... 256 rows, and for multiples of 256, when a call needs them; for a least number of rows, if one was given.

    >>> from flax import nnx
    >>> from jaxensemble import Ensemble
    >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)])
    >>> run = ensemble.padded()
    >>> run(jnp.ones((7, 3))).shape, run.each(jnp.ones((5, 6, 3))).shape
    ((5, 7, 2), (5, 6, 2))
    """

    def __init__(self, run: Callable[..., Any], predict: Callable[..., Any], axes: Callable[..., Axes], name: str):
        self._run, self._predict, self._axes, self._name = run, predict, axes, name

    def __call__(
        self, *inputs: Any, key: Any = None, randomness: Any = "different", plan: Any = None, **named: Any
    ) -> Any:
        """The outputs of all members for the same inputs, as a call of the ensemble returns them.

        **Raises:** `InputError` for a network that may mix rows, and the errors of a call.
        """
        return self._run(inputs, named, key, plan, randomness=randomness)

    def each(self, *inputs: Any, key: Any = None, randomness: Any = "different", plan: Any = None, **named: Any) -> Any:
        """The outputs of every member for inputs of its own, as `Ensemble.each` returns them.

        **Raises:** `InputError` for a network that may mix rows, and the errors of a call.
        """
        return self._run(inputs, named, key, plan, randomness=randomness, each=True)

    def predict(self, *inputs: Any, **options: Any) -> Any:
        """The prediction of the members for the same inputs, as `Ensemble.predict` returns it.

        **Raises:** `InputError` for a network that may mix rows, or whose outputs have no rows or not first, and the
        errors of a call.
        """
        return self._predict(inputs, options)

    def output_axes(self, *inputs: Any, key: Any = None, **named: Any) -> Axes:
        """The batch axis of every output array of one member, in the order of `jax.tree.leaves`; None for one without.

        **Raises:** `InputError` for a network that may mix rows, and the errors of a call.
        """
        return self._axes(inputs, named, key)

    def __repr__(self) -> str:
        return f"PaddedEnsemble({self._name})"
