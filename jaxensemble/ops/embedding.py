"""Rows of a table: looked up, and gathered into bags."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact, Integer

from jaxensemble.ops.annotations import AnyArray


def embed(
    embedding: Inexact[AnyArray, "count features"],
    indices: Integer[AnyArray, "*shape"],
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Inexact[Array, "*shape features"]:
    """The rows of `embedding`, `[count, features]`, at `indices`, `[...]`: `[..., features]`.

    - `padding_idx`: the row of this index gets no gradient.
    - `scale_grad_by_freq`: the gradient of each row is divided by how often its index occurs in `indices`.

    An index out of range gives NaN.

    >>> embed(jnp.eye(3), jnp.array([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    >>> jax.grad(lambda e: embed(e, jnp.array([0, 1, 1]), padding_idx=0).sum())(jnp.ones((2, 1))).tolist()
    [[0.0], [2.0]]
    """
    rows = jnp.take(embedding, indices, axis=0)
    if padding_idx is None and not scale_grad_by_freq:
        return rows
    share = jnp.ones(indices.shape, rows.dtype)
    if scale_grad_by_freq:
        counts = jnp.zeros(embedding.shape[0], rows.dtype).at[indices].add(1)
        share = 1 / counts[indices]
    if padding_idx is not None:
        share = jnp.where(indices == padding_idx, 0, share)
    fixed = lax.stop_gradient(rows)
    return fixed + (rows - fixed) * share[..., None]


def bags(
    rows: Inexact[AnyArray, "n features"],
    offsets: Integer[AnyArray, " offsets"],
    mode: Literal["sum", "mean", "max"] = "mean",
    *,
    weights: Inexact[AnyArray, " n"] | None = None,
    mask: Bool[AnyArray, " n"] | None = None,
    include_last_offset: bool = False,
) -> Inexact[Array, "{offsets.shape[0]-include_last_offset} features"]:
    """Rows `[n, features]` gathered into bags: bag `k` is the rows from `offsets[k]` up to the next offset.

    - `weights`: a factor for each row, `[n]`.
    - `mask`: False for rows that count as absent, `[n]`.
    - `include_last_offset`: the last offset ends the last bag and begins none.

    An empty bag is zero. Equal largest elements share the gradient.

    >>> bags(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([0, 2, 3]), "mean").tolist()
    [[1.5], [3.0], [0.0]]
    """
    count = offsets.shape[0] - include_last_offset
    which = jnp.searchsorted(offsets, jnp.arange(rows.shape[0]), side="right") - 1
    which = which if mask is None else jnp.where(mask, which, count)  # beyond the last bag: dropped
    rows = rows if weights is None else rows * weights[:, None]
    size = jax.ops.segment_sum(jnp.ones_like(which), which, count)[:, None]
    if mode == "max":
        return jnp.where(size == 0, 0, jax.ops.segment_max(rows, which, count))
    total = jax.ops.segment_sum(rows, which, count)
    return total if mode == "sum" else total / jnp.maximum(size, 1)
