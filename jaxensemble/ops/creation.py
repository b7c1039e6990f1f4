"""Arrays made from numbers alone, as PyTorch makes them."""

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Num


def linspace(
    start: Num[ArrayLike, ""], end: Num[ArrayLike, ""], steps: int, dtype: DTypeLike = jnp.float32
) -> Num[Array, " {steps}"]:
    """Evenly spaced numbers: the first half is counted from `start`, the second half back from `end`.

    Source: `linspace_kernel` in aten/src/ATen/native. `jnp.linspace` rounds differently, which shows where results
    become integers.

    >>> linspace(0, 12, 3, "float32").tolist(), linspace(5, 12, 1).tolist()
    ([0.0, 6.0, 12.0], [5.0])
    """
    place = jnp.arange(steps, dtype=dtype)
    first, last = jnp.asarray(start, dtype), jnp.asarray(end, dtype)
    step = (last - first) / max(steps - 1, 1)
    is_early = place < max(steps // 2, 1)
    return jnp.where(is_early, first + step * place, last - step * (steps - 1 - place))
