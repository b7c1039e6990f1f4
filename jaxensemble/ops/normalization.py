"""Normalisation as functions of arrays: with given statistics, and by a norm."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.reductions import vector_norm


def batch_norm(
    x: Float[AnyArray, "*shape"],
    mean: Float[AnyArray, "..."],
    var: Float[AnyArray, "..."],
    scale: Float[AnyArray, " features"] | None = None,
    bias: Float[AnyArray, " features"] | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
) -> Float[Array, "*shape"]:
    """`(x - mean) / sqrt(var + epsilon) * scale + bias`, in float32 at least, in the dtype of `x`.

    `mean`, `var`, `scale` and `bias` are vectors along `axis`; `mean` and `var` may have all axes of `x` instead.

    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> batch_norm(x, jnp.array([2.0, 3.0]), jnp.array([1.0, 4.0]), epsilon=0.0).tolist()
    [[-1.0, -0.5], [1.0, 0.5]]
    """
    dtype = jnp.promote_types(jnp.result_type(x, mean, var), jnp.float32)

    def to_axis(vector: Array) -> Array:
        shape = [1] * x.ndim
        shape[axis] = -1
        return vector.astype(dtype).reshape(vector.shape if vector.ndim == x.ndim else shape)

    y = x.astype(dtype) - to_axis(mean)
    factor = lax.rsqrt(to_axis(var) + epsilon)
    y = y * (factor if scale is None else factor * to_axis(scale))
    return (y if bias is None else y + to_axis(bias)).astype(x.dtype)


def weight_norm(
    direction: Inexact[AnyArray, "*shape"], magnitude: Inexact[AnyArray, "..."], *, axis: int | None = 0
) -> Inexact[Array, "*shape"]:
    """`direction` scaled so that its norm along all axes but `axis` (None: along all) is `magnitude`.

    Weight normalisation, https://arxiv.org/abs/1602.07868. `magnitude` broadcasts against `direction`.

    >>> weight_norm(jnp.array([[3.0, 4.0]]), jnp.array([[10.0]])).tolist()
    [[6.0, 8.0]]
    """
    axes = tuple(k for k in range(direction.ndim) if axis is None or k != axis % direction.ndim)
    return direction * (magnitude / vector_norm(direction, axis=axes, keepdims=True))


def cosine_similarity(
    x: Inexact[AnyArray, "*#shape"], y: Inexact[AnyArray, "*#shape"], *, axis: int = 1, epsilon: float = 1e-8
) -> Inexact[Array, "..."]:
    """The cosine of the angle between vectors along `axis`; norms below `epsilon` count as `epsilon`.

    >>> cosine_similarity(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]), axis=0).round(4).item()
    0.707099974155426
    """
    x, y = jnp.broadcast_arrays(x, y)
    return jnp.sum(_unit(x, axis, epsilon) * _unit(y, axis, epsilon), axis)


def _unit(x: Inexact[AnyArray, "*shape"], axis: int, epsilon: float) -> Inexact[Array, "*shape"]:
    """`x` over its norm. The bound on the norm is no part of the gradient, as in PyTorch."""
    length = vector_norm(x, axis=axis, keepdims=True)
    return x / (length + lax.stop_gradient(jnp.maximum(length, epsilon) - length))
