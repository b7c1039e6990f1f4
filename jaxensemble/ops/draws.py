"""Draws from distributions that `jax.random` lacks or defines differently."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxensemble.ops.annotations import AnyArray


def exponential(key: PRNGKeyArray, shape: Sequence[int], dtype: Any) -> Float[Array, "..."]:
    """Draws from the exponential distribution of rate 1, none of which is 0, as in PyTorch: every draw has a logarithm.

    `jax.random.exponential` gives 0 once in some millions of draws.

    >>> bool((exponential(jax.random.key(0), (1000,), jnp.float32) > 0).all())
    True
    """
    return -jnp.log(jax.random.uniform(key, shape, dtype, minval=jnp.finfo(dtype).tiny))


def multinomial(
    key: PRNGKeyArray, weights: Float[AnyArray, "*batch K"], count: int, *, replacement: bool = False
) -> Int[Array, "*batch {count}"]:
    """`torch.multinomial`: `count` places of each row of `weights` `[..., K]`, drawn in proportion to them.

    Without `replacement` no place is drawn twice: the places of the largest weights are taken, each weight multiplied
    by a random number (https://arxiv.org/abs/1903.06059).

    **Returns:** integers, `[..., count]`.

    >>> multinomial(jax.random.key(0), jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), 1).tolist()
    [[1], [0]]
    """
    logits = jnp.log(weights)
    if replacement:
        drawn = jax.random.categorical(key, logits[..., None, :], shape=(*weights.shape[:-1], count))
    else:
        _, drawn = jax.lax.top_k(logits + jax.random.gumbel(key, weights.shape, logits.dtype), count)
    return drawn.astype(int)
