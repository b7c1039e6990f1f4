"""Linear algebra that `jax.numpy` lacks."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Num

from jaxensemble.ops.annotations import AnyArray


def solve_triangular(
    a: Inexact[AnyArray, "*#batch n n"],
    b: Inexact[AnyArray, "*#batch rows columns"],
    *,
    lower: bool = False,
    left: bool = True,
    unit_diagonal: bool = False,
    transposed: bool = False,
) -> Inexact[Array, "*batch rows columns"]:
    """Solves `a @ x = b`, or `x @ a = b` if not `left`, for triangular matrices `[..., n, n]`; leading axes broadcast.

    With `transposed`, `a` is replaced by `a.T`.

    >>> solve_triangular(jnp.array([[2.0, 1.0], [0.0, 4.0]]), jnp.array([[4.0], [8.0]])).tolist()
    [[1.0], [2.0]]
    """
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = jnp.broadcast_to(a, (*batch, *a.shape[-2:]))
    b = jnp.broadcast_to(b, (*batch, *b.shape[-2:]))
    return lax.linalg.triangular_solve(
        a, b, left_side=left, lower=lower, unit_diagonal=unit_diagonal, transpose_a=transposed
    )


def vander(x: Num[AnyArray, "*shape"], n: int) -> Num[Array, "*shape {n}"]:
    """The powers of each element, from 0 to `n - 1`, along a new last axis.

    >>> vander(jnp.array([2.0, 3.0]), 3).tolist()
    [[1.0, 2.0, 4.0], [1.0, 3.0, 9.0]]
    """
    factors = jnp.broadcast_to(x[..., None], (*x.shape, n)).at[..., :1].set(1)
    return jnp.cumprod(factors, -1)


def bilinear(
    x: Num[AnyArray, "*#batch i"], y: Num[AnyArray, "*#batch j"], kernel: Num[AnyArray, "i j o"]
) -> Num[Array, "*batch o"]:
    """`sum(x[..., i] * kernel[i, j, o] * y[..., j])` over `i` and `j`.

    >>> bilinear(jnp.array([1.0, 2.0]), jnp.array([3.0]), jnp.ones((2, 1, 4))).tolist()
    [9.0, 9.0, 9.0, 9.0]
    """
    return jnp.einsum("...i,ijo,...j->...o", x, kernel, y)
