"""Factors of matrices, read and differentiated as PyTorch does.

PyTorch reads one triangle of a symmetric matrix; `jax.numpy` takes the mean of both. Where factors are unique except
for signs, the signs are LAPACK's, which both frameworks call on the CPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact, Integer, Num

from jaxensemble.ops.annotations import AnyArray


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def mirrored(x: Inexact[AnyArray, "*batch n n"], lower: bool = True) -> Inexact[Array, "*batch n n"]:
    """The symmetric (Hermitian) matrices with one triangle of `x` `[..., n, n]`; gradients are symmetric, as PyTorch's.

    >>> mirrored(jnp.array([[1.0, 9.0], [2.0, 3.0]])).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    part, strict = (jnp.tril(x), jnp.tril(x, -1)) if lower else (jnp.triu(x), jnp.triu(x, 1))
    return part + jnp.conj(jnp.matrix_transpose(strict))


@mirrored.defjvp
def _mirrored_jvp(lower: bool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return mirrored(primals[0], lower), (tangents[0] + _adjoint(tangents[0])) / 2


def cholesky(x: Inexact[AnyArray, "*batch n n"], *, upper: bool = False) -> Inexact[Array, "*batch n n"]:
    """`L` with `L @ L.T = x`, from the lower triangle of `x` `[..., n, n]`; or its transpose, from the upper one.

    NaN where `x` is not positive definite.

    >>> cholesky(jnp.array([[4.0, 0.0], [2.0, 2.0]])).tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    factor = lax.linalg.cholesky(mirrored(x, not upper), symmetrize_input=False)
    return jnp.conj(jnp.matrix_transpose(factor)) if upper else factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def cholesky_solve(
    b: Inexact[AnyArray, "*#batch n k"], factor: Inexact[AnyArray, "*#batch n n"], upper: bool = False
) -> Inexact[Array, "*batch n k"]:
    """Solves `L @ L.T @ x = b` for `b` `[..., n, k]`, or `U.T @ U @ x = b` if `upper`; leading axes broadcast.

    The gradient reaches all of the factor, as in PyTorch. Source: `cholesky_solve_backward` in
    torch/csrc/autograd/FunctionsManual.cpp.

    >>> cholesky_solve(jnp.array([[4.0], [4.0]]), jnp.array([[2.0, 0.0], [1.0, 1.0]])).tolist()
    [[0.0], [2.0]]
    """
    return _solve(b, factor, upper)


def _solve(
    b: Inexact[AnyArray, "*#batch n k"], factor: Inexact[AnyArray, "*#batch n n"], upper: bool
) -> Inexact[Array, "*batch n k"]:
    batch = jnp.broadcast_shapes(factor.shape[:-2], b.shape[:-2])
    factor = jnp.broadcast_to(factor, (*batch, *factor.shape[-2:]))
    b = jnp.broadcast_to(b, (*batch, *b.shape[-2:]))
    for transposed in (upper, not upper):
        b = lax.linalg.triangular_solve(
            factor, b, left_side=True, lower=not upper, transpose_a=transposed, conjugate_a=transposed
        )
    return b


@cholesky_solve.defjvp
def _cholesky_solve_jvp(
    upper: bool, primals: tuple[AnyArray, Array], tangents: tuple[AnyArray, Array]
) -> tuple[Array, Array]:
    (b, factor), (b_dot, factor_dot) = primals, tangents
    x = cholesky_solve(b, factor, upper)
    half = _adjoint(factor_dot) @ factor if upper else factor_dot @ _adjoint(factor)
    return x, _solve(b_dot - (half + _adjoint(half)) @ x, factor, upper)


def cholesky_inverse(factor: Inexact[AnyArray, "*batch n n"], *, upper: bool = False) -> Inexact[Array, "*batch n n"]:
    """The inverse of `L @ L.T`, or of `U.T @ U` if `upper`, for a factor `[..., n, n]`.

    >>> cholesky_inverse(jnp.array([[2.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.25, 0.0], [0.0, 1.0]]
    """
    return cholesky_solve(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor, upper)


class Eigen(NamedTuple):
    """Eigenvalues `[..., n]` in ascending order, and eigenvectors as columns `[..., n, n]`."""

    values: Float[Array, "*batch n"]
    vectors: Inexact[Array, "*batch n n"]


def eigh(x: Inexact[AnyArray, "*batch n n"], *, lower: bool = True) -> Eigen:
    """Eigenvalues and eigenvectors of symmetric matrices `[..., n, n]`, of which one triangle is read.

    >>> eigh(jnp.array([[2.0, 9.0], [0.0, 3.0]])).values.tolist()
    [2.0, 3.0]
    """
    vectors, values = lax.linalg.eigh(mirrored(x, lower), symmetrize_input=False)
    return Eigen(values, vectors)


def eigvalsh(x: Inexact[AnyArray, "*batch n n"], *, lower: bool = True) -> Float[Array, "*batch n"]:
    """The eigenvalues of symmetric matrices `[..., n, n]`, in ascending order: see `eigh`.

    >>> eigvalsh(jnp.array([[2.0, 9.0], [0.0, 3.0]])).tolist()
    [2.0, 3.0]
    """
    return eigh(x, lower=lower).values


def svd(
    x: Inexact[AnyArray, "*batch m n"], *, full_matrices: bool = True
) -> tuple[Inexact[Array, "*batch m _"], Float[Array, "*batch rank"], Inexact[Array, "*batch _ n"]]:
    """`U` `[..., m, m]`, singular values, `V.T` `[..., n, n]`; unless full, the first `min(m, n)` columns and rows.

    Gradients go by way of these alone, as in PyTorch.

    >>> [part.shape for part in svd(jnp.ones((3, 2)))]
    [(3, 3), (2,), (2, 2)]
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    if not full_matrices or x.shape[-2] == x.shape[-1]:
        return u, s, vt
    whole_u, _, whole_vt = jnp.linalg.svd(lax.stop_gradient(x), full_matrices=True)
    rank = s.shape[-1]
    return (
        jnp.concatenate([u, whole_u[..., rank:]], -1),
        s,
        jnp.concatenate([vt, whole_vt[..., rank:, :]], -2),
    )


def pinv(
    x: Inexact[AnyArray, "*batch m n"],
    atol: Num[ArrayLike, "..."] = 0.0,
    rtol: Num[ArrayLike, "..."] = 0.0,
    *,
    hermitian: bool = False,
) -> Inexact[Array, "*batch n m"]:
    """Pseudo-inverses of `x` `[..., m, n]`: singular values up to `max(atol, rtol * largest)` count as zero.

    With `hermitian`, only the lower triangle of `x` is read. The gradient is that of a constant rank.

    >>> pinv(jnp.array([[2.0, 0.0], [0.0, 0.0]]), rtol=1e-6).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    size = jnp.linalg.svd(lax.stop_gradient(mirrored(x) if hermitian else x), compute_uv=False)
    largest = jnp.max(size, -1, initial=0)
    return _pinv(x, lax.stop_gradient(jnp.maximum(jnp.asarray(atol), jnp.asarray(rtol) * largest)), hermitian)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pinv(
    x: Inexact[AnyArray, "*batch m n"], cutoff: Float[AnyArray, "*#batch"], hermitian: bool
) -> Inexact[Array, "*batch n m"]:
    u, s, vt = jnp.linalg.svd(mirrored(x) if hermitian else x, full_matrices=False)
    inverse = jnp.where(s > cutoff[..., None], 1 / s, 0).astype(x.dtype)
    return _adjoint(vt) @ (inverse[..., None] * _adjoint(u))


@_pinv.defjvp
def _pinv_jvp(
    hermitian: bool, primals: tuple[AnyArray, Array], tangents: tuple[AnyArray, Array]
) -> tuple[Array, Array]:
    """Golub and Pereyra: `pinv_jvp` in torch/csrc/autograd/FunctionsManual.cpp."""
    (x, cutoff), (x_dot, _) = primals, tangents
    p = _pinv(x, cutoff, hermitian)
    left = p @ _adjoint(p) @ _adjoint(x_dot)
    right = _adjoint(x_dot) @ _adjoint(p) @ p
    return p, left - left @ x @ p - p @ x_dot @ p + right - p @ x @ right


def lu(
    x: Inexact[AnyArray, "*batch m n"],
) -> tuple[Inexact[Array, "*batch m m"], Inexact[Array, "*batch m rank"], Inexact[Array, "*batch rank n"]]:
    """`P`, `L`, `U` with `P @ L @ U = x` for `x` `[..., m, n]`.

    >>> [part.tolist() for part in lu(jnp.array([[0.0, 2.0], [1.0, 3.0]]))]
    [[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 3.0], [0.0, 2.0]]]
    """
    return lu_unpack(*lu_factor(x))


def lu_factor(
    x: Inexact[AnyArray, "*batch m n"],
) -> tuple[Inexact[Array, "*batch m n"], Integer[Array, "*batch rank"]]:
    """`L` below the diagonal and `U` in one array, and the row that each was exchanged with, counted from 1.

    >>> [part.tolist() for part in lu_factor(jnp.array([[0.0, 2.0], [1.0, 3.0]]))]
    [[[1.0, 3.0], [0.0, 2.0]], [2, 2]]
    """
    both, pivots, _ = lax.linalg.lu(x)
    return both, pivots + 1


def lu_unpack(
    both: Inexact[AnyArray, "*batch m n"], pivots: Integer[AnyArray, "*batch rank"]
) -> tuple[Inexact[Array, "*batch m m"], Inexact[Array, "*batch m rank"], Inexact[Array, "*batch rank n"]]:
    """`P`, `L`, `U` of what `lu_factor` gives.

    >>> lu_unpack(jnp.array([[1.0, 3.0], [0.5, 2.0]]), jnp.array([1, 2]))[1].tolist()
    [[1.0, 0.0], [0.5, 1.0]]
    """
    rows, columns = both.shape[-2:]
    rank = min(rows, columns)
    order = lax.linalg.lu_pivots_to_permutation(pivots - 1, rows)
    permutation = (order[..., None, :] == jnp.arange(rows)[:, None]).astype(both.dtype)
    lower = jnp.tril(both[..., :, :rank], -1) + jnp.eye(rows, rank, dtype=both.dtype)
    return permutation, lower, jnp.triu(both[..., :rank, :])


def lu_solve(
    both: Inexact[AnyArray, "*#batch n n"],
    pivots: Integer[AnyArray, "*#batch n"],
    b: Inexact[AnyArray, "*#batch rows columns"],
    *,
    left: bool = True,
    adjoint: bool = False,
) -> Inexact[Array, "*batch rows columns"]:
    """Solves `a @ x = b`, or `x @ a = b` if not `left`, with what `lu_factor` gives of `a`, or of its adjoint.

    >>> lu_solve(*lu_factor(jnp.array([[0.0, 2.0], [1.0, 3.0]])), jnp.array([[2.0], [4.0]])).tolist()
    [[1.0], [1.0]]
    """
    if not left:  # x @ a = b: a.T @ x.T = b.T
        return _adjoint(lu_solve(both, pivots, _adjoint(b), adjoint=not adjoint))
    batch = jnp.broadcast_shapes(both.shape[:-2], b.shape[:-2])
    both = jnp.broadcast_to(both, (*batch, *both.shape[-2:]))
    b = jnp.broadcast_to(b, (*batch, *b.shape[-2:]))
    order = jnp.broadcast_to(lax.linalg.lu_pivots_to_permutation(pivots - 1, b.shape[-2]), b.shape[:-1])[..., None]
    solve = functools.partial(lax.linalg.triangular_solve, both, left_side=True)
    if not adjoint:
        b = solve(jnp.take_along_axis(b, order, -2), lower=True, unit_diagonal=True)
        return solve(b, lower=False)
    b = solve(b, lower=False, transpose_a=True, conjugate_a=True)
    b = solve(b, lower=True, unit_diagonal=True, transpose_a=True, conjugate_a=True)
    return jnp.take_along_axis(b, jnp.argsort(order, -2), -2)


def householder_product(
    x: Inexact[AnyArray, "*batch m n"], tau: Inexact[AnyArray, "*batch k"]
) -> Inexact[Array, "*batch m n"]:
    """The first `n` columns of the product of reflections `1 - tau[k] * v @ v.T`, where `v` is column `k` of `x`.

    `x` is `[..., m, n]`, `tau` `[..., k]`. Of each column only what is below the diagonal is read; 1 is on it, and 0
    above.

    >>> householder_product(jnp.array([[0.0], [1.0]]), jnp.array([1.0])).tolist()
    [[0.0], [-1.0]]
    """
    rows, columns = x.shape[-2:]
    vectors = jnp.tril(x, -1) + jnp.eye(rows, columns, dtype=x.dtype)

    def reflect(k: Array, product: Array) -> Array:
        k = tau.shape[-1] - 1 - k
        v = lax.dynamic_index_in_dim(vectors, k, -1)
        factor = lax.dynamic_index_in_dim(tau, k, -1)[..., None]
        return product - factor * v @ (_adjoint(v) @ product)

    start = jnp.broadcast_to(jnp.eye(rows, columns, dtype=x.dtype), x.shape)
    if not tau.size:
        return start
    return lax.fori_loop(0, tau.shape[-1], reflect, start)


def _adjoint(x: Inexact[AnyArray, "*batch m n"]) -> Inexact[Array, "*batch n m"]:
    return jnp.conj(jnp.matrix_transpose(x))
