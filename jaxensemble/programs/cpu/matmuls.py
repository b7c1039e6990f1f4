"""Products of matrices in the form that CPUs compute exactly and fast: a program is rewritten, product by product.

XLA's CPU code adds up the terms of a product in long runs, with an error that grows with their number, and for
weights of several members by one shared minibatch it first transposes all weights, which takes longer than the product
itself where that minibatch has a row or a few. Neither shows in one layer's code, and no layer knows whether
`jax.vmap` is around it. So the traced program of all members is rewritten.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxensemble.compat import JaxprEqn

Numbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

LONGEST = 896
"""The most terms that a product sums up at once."""

BLOCK = 512
"""The most terms of a block of a longer product: the error is 1.6 times PyTorch's, in nearly the same time."""

BLOCK_OF_VECTORS = 128
"""The same where one operand is a vector, whose products XLA sums up term by term."""

_WRITTEN_OUT = 64
"""The most blocks whose sum is written out."""

FEW = 8
"""The most rows of a shared minibatch that each member gets apart: with more, transposed weights cost little."""


def product(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Numbers, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` in the form that suits a CPU; to rounding the same numbers.

    A product of more than `LONGEST` terms is summed up in blocks. The product of a few rows by the
    weights of many members (`[N, K]` by `[M, K, F]`, as `jax.vmap` leaves them) becomes one product for each member.

    >>> from jaxensemble.programs.rewrite import PRODUCT, rewrite_steps
    >>> x, kernel = jnp.ones((2, 2048)), jnp.ones((2048, 3))
    >>> float(rewrite_steps(jnp.dot, {PRODUCT: product})(x, kernel)[0, 0])
    2048.0
    """
    if not _is_covered(lhs, rhs) or options.get("out_sharding") is not None:
        return lax.dot_general(lhs, rhs, dimension_numbers, **options)
    ((over_lhs, over_rhs), (batch_lhs, _)) = dimension_numbers
    free = [axis for axis in range(lhs.ndim) if axis not in (*over_lhs, *batch_lhs)]
    rows = math.prod(lhs.shape[axis] for axis in free)
    of_members = rhs.ndim == 3 and tuple(over_rhs) == (1,) and not batch_lhs
    if of_members and rows > FEW:  # the weights of all members side by side, as one wide kernel
        rhs, over_rhs = jnp.moveaxis(rhs, 1, 0), (0,)
        return _sum_blocks(lhs, rhs, ((over_lhs, over_rhs), ((), ())), options)
    if not of_members:
        return _sum_blocks(lhs, rhs, dimension_numbers, options)
    lhs = jnp.broadcast_to(lhs, (rhs.shape[0], *lhs.shape))
    numbers = (((over_lhs[0] + 1,), (1,)), ((0,), (0,)))
    return jnp.moveaxis(_sum_blocks(lhs, rhs, numbers, options), 0, len(free))


def is_long(step: JaxprEqn) -> bool:
    """Returns whether a product of a program has more terms than are summed up at once."""
    (over, _), _ = step.params["dimension_numbers"]
    return math.prod(step.invars[0].aval.shape[axis] for axis in over) > LONGEST  # type: ignore[attr-defined]


def _is_covered(lhs: jax.Array, rhs: jax.Array) -> bool:
    """Returns whether both operands have one floating dtype of at least 16 bits, and known sizes other than zero."""
    is_floating = jnp.issubdtype(lhs.dtype, jnp.floating) and lhs.dtype.itemsize > 1
    sizes = (*lhs.shape, *rhs.shape)
    return is_floating and lhs.dtype == rhs.dtype and all(isinstance(size, int) and size for size in sizes)


def _sum_blocks(lhs: jax.Array, rhs: jax.Array, numbers: Numbers, options: dict[str, Any]) -> jax.Array:
    """The product as a sum over blocks, if it has many terms; blocks are one more batch axis."""
    ((over_lhs, over_rhs), (batch_lhs, batch_rhs)) = numbers
    terms = math.prod(lhs.shape[axis] for axis in over_lhs)
    sides = [
        x.size // terms // math.prod(x.shape[axis] for axis in batch)
        for x, batch in ((lhs, batch_lhs), (rhs, batch_rhs))
    ]
    longest, block = (BLOCK_OF_VECTORS, BLOCK_OF_VECTORS) if 1 in sides else (LONGEST, BLOCK)
    if terms <= longest:
        return lax.dot_general(lhs, rhs, numbers, **options)
    at_lhs, at_rhs = max(zip(over_lhs, over_rhs, strict=True), key=lambda pair: lhs.shape[pair[0]])
    count = _block_count(lhs.shape[at_lhs], -(-terms // block))
    dtype = options["preferred_element_type"] or lhs.dtype
    parts = lax.dot_general(
        _split_axis(lhs, at_lhs, count),
        _split_axis(rhs, at_rhs, count),
        (
            (_shift_axes(over_lhs, at_lhs), _shift_axes(over_rhs, at_rhs)),
            ((*_shift_axes(batch_lhs, at_lhs), at_lhs), (*_shift_axes(batch_rhs, at_rhs), at_rhs)),
        ),
        **dict(options, preferred_element_type=jnp.promote_types(dtype, jnp.float32)),
    )
    axis = len(batch_lhs)
    if count > _WRITTEN_OUT:
        return parts.sum(axis).astype(dtype)
    blocks = [lax.index_in_dim(parts, k, axis, keepdims=False) for k in range(count)]
    return functools.reduce(jnp.add, blocks).astype(dtype)  # XLA's own sum over an axis takes longer than the product


def _shift_axes(axes: Sequence[int], at: int) -> tuple[int, ...]:
    """The places of axes after another axis is inserted at `at`."""
    return tuple(axis + (axis >= at) for axis in axes)


def _block_count(size: int, least: int) -> int:
    """The number of blocks of an axis: equal blocks, unless that takes twice as many."""
    return next((count for count in range(least, min(2 * least, size) + 1) if size % count == 0), min(least, size))


def _split_axis(x: jax.Array, axis: int, count: int) -> jax.Array:
    """Splits an axis into `count` blocks of equal size, the last filled with zeros."""
    size = -(-x.shape[axis] // count)
    missing = count * size - x.shape[axis]
    if missing:
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, missing if k == axis else 0, 0) for k in range(x.ndim)])
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
