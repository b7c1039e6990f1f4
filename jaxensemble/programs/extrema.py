"""Maxima and minima whose gradients do not depend on bitwise equality.

JAX sends a gradient to the operand that equals the result. A compiler may compute the operand once for the result and
once more for this comparison, and round differently: nothing is equal, and the gradient is lost (`jnp.maximum`) or
divided by zero (`jnp.max`). XLA does so on GPUs (github.com/jax-ml/jax/issues/40564) and, under some of its options, on
CPUs. Here two operands are compared with each other, and the first largest of many always has a share.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Step = Callable[..., jax.Array]


def _extreme_of_two(step: Step, beyond: Callable[[Any, Any], Any]) -> Step:
    """`lax.max` or `lax.min`; operands that are equal get half of the gradient each, as in JAX and PyTorch."""

    @jax.custom_jvp
    def chosen(x: jax.Array, y: jax.Array) -> jax.Array:
        return step(x, y)

    @chosen.defjvp
    def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        (x, y), (slope_x, slope_y) = primals, tangents
        neither = slope_x / 2 + slope_y / 2
        return chosen(x, y), jnp.where(beyond(x, y), slope_x, jnp.where(beyond(y, x), slope_y, neither))

    return lambda x, y: chosen(x, y) if _has_gradient(x) else step(x, y)


def _extreme_of_many(reduce: Step, primitive: Any, index: Step) -> Step:
    """`lax.reduce_max` or `lax.reduce_min`; equal values share the gradient, as in JAX and PyTorch's `amax`.

    Where the result is NaN, so is the gradient.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
    def extreme(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return reduce(x, axes)

    @extreme.defjvp
    def _(axes: tuple[int, ...], primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
        best = extreme(primals[0], axes)
        (x, axis), (slope, _) = _merge_axes(primals[0], axes), _merge_axes(tangents[0], axes)
        place, value = (jnp.expand_dims(found, axis) for found in (index(x, axis, jnp.int32), best))
        first = (lax.broadcasted_iota(jnp.int32, x.shape, axis) == place) & ~jnp.isnan(value)
        taken = ((x == value) | first).astype(slope.dtype)
        return best, (slope * taken).sum(axis) / taken.sum(axis)

    def run(x: jax.Array, *, axes: tuple[int, ...], **options: Any) -> jax.Array:
        sharded = any(option is not None for option in options.values())
        if sharded or not axes or not _has_gradient(x) or not x.size:
            return primitive.bind(x, axes=axes, **options)
        return extreme(x, axes)

    return run


def _has_gradient(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _merge_axes(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, int]:
    """The array with these axes merged into one, and the place of that axis."""
    if tuple(axes) != tuple(range(axes[0], axes[-1] + 1)):
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        x, axes = x.transpose(*kept, *axes), range(len(kept), x.ndim)
    return lax.collapse(x, axes[0], axes[-1] + 1), axes[0]


EXTREMES = {
    "max": _extreme_of_two(lax.max, operator.gt),
    "min": _extreme_of_two(lax.min, operator.lt),
    "reduce_max": _extreme_of_many(lax.reduce_max, lax.reduce_max_p, lax.argmax),
    "reduce_min": _extreme_of_many(lax.reduce_min, lax.reduce_min_p, lax.argmin),
}
"""Replacements of XLA's steps in every network, for `jaxensemble.programs.rewrite.rewrite_steps`.

>>> from jaxensemble.programs.rewrite import rewrite_steps
>>> largest = rewrite_steps(lambda x: jnp.max(x, axis=-1), EXTREMES)
>>> x = jnp.array([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
>>> largest(x).tolist(), jax.grad(lambda x: largest(x).sum())(x).tolist()
([3.0, 2.0], [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
"""
