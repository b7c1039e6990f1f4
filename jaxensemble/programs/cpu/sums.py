"""Long sums on CPUs, where XLA may add numbers one after another."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LONG, _LONG_ROW = 32, 128
"""Sums of fewer numbers stay as they are. Sums along the last axis alone, where XLA makes good loops, are slower by
halves, and their rounding shows only if they are longer."""

_HALVINGS = 4


def total(x: jax.Array, *, axes: tuple[int, ...], out_sharding: Any = None) -> jax.Array:
    """XLA's `reduce_sum`, except that long sums of float32 first add one half to the other.

    The rounding error of a sum grows with the number of additions in a row, which is a sixteenth then (N. J. Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, chapter 4). The statistics of normalisations show it.

    >>> x = jnp.linspace(0.1, 3.1, 3 * 1001, dtype=jnp.float32).reshape(3, 1001)
    >>> bool(jnp.allclose(total(x, axes=(1,)), jnp.sum(x, 1)))
    True
    """
    count = math.prod(x.shape[axis] for axis in axes)
    row = axes == (x.ndim - 1,)
    plain = x.dtype != jnp.float32 or out_sharding is not None
    if plain or count < (_LONG_ROW if row else _LONG):
        return lax.reduce_sum(x, axes, out_sharding=out_sharding)
    return _sum_by_halves(x, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_by_halves(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    run = max(_runs(axes), key=lambda run: math.prod(x.shape[axis] for axis in run))
    x = lax.collapse(x, run[0], run[-1] + 1)
    others = [axis - (len(run) - 1 if axis > run[-1] else 0) for axis in axes if axis not in run]
    odd = []
    for _ in range(_HALVINGS):
        half, rest = divmod(x.shape[run[0]], 2)
        if rest:
            odd.append(lax.slice_in_dim(x, 2 * half, 2 * half + 1, axis=run[0]))
        x = lax.slice_in_dim(x, 0, half, axis=run[0]) + lax.slice_in_dim(x, half, 2 * half, axis=run[0])
    summed = tuple(sorted([run[0], *others]))
    first, *rests = (lax.reduce_sum(part, summed) for part in (x, *odd))
    return sum(rests, start=first)


@_sum_by_halves.defjvp
def _(axes: tuple[int, ...], primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    return _sum_by_halves(primals[0], axes), lax.reduce_sum(tangents[0], axes)


def _runs(axes: tuple[int, ...]) -> list[list[int]]:
    """Axes in groups of consecutive ones: `(1, 2, 4)` as `[[1, 2], [4]]`."""
    runs: list[list[int]] = []
    for axis in axes:
        if runs and runs[-1][-1] == axis - 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs
