"""Dropout that Flax lacks: for SELU networks, and with a rate for each member. All other dropout is `nnx.Dropout`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Inexact, PRNGKeyArray

from jaxensemble.errors import InputError
from jaxensemble.ops.annotations import AnyArray

SATURATION = 1.7580993408473766
"""Minus the least value of a SELU: its scale times its alpha."""


class AlphaDropout(nnx.Module):
    """Alpha dropout, https://arxiv.org/abs/1706.02515, which keeps the mean and variance of a SELU's output.

    Elements are dropped with probability `rate` and become the value a SELU saturates at; then all are scaled and
    shifted. With `broadcast_dims`, axes that share one mask, whole channels are dropped
    (`torch.nn.FeatureAlphaDropout`). Named as `nnx.Dropout`; `deterministic` passes the input through.

    **Raises:** `InputError` for a rate outside of [0, 1].

    >>> layer = AlphaDropout(0.5, deterministic=True)
    >>> layer(jnp.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    >>> len(set(AlphaDropout(0.5, rngs=nnx.Rngs(0))(jnp.ones(100)).tolist()))
    2
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | None = None,
    ):
        if not 0 <= rate <= 1:
            raise InputError(f"`rate` must be a probability; expected 0 to 1, got {rate}")
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rngs = nnx.data(None) if rngs is None else rngs[rng_collection].fork()

    def __call__(self, x: Float[AnyArray, "*shape"], *, deterministic: bool | None = None) -> Float[AnyArray, "*shape"]:
        if (self.deterministic if deterministic is None else deterministic) or self.rate == 0:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        shape = [1 if k in {d % x.ndim for d in self.broadcast_dims} else n for k, n in enumerate(x.shape)]
        kept = jax.random.bernoulli(draw_key(self.rngs), 1 - self.rate, shape)
        scale = 1 / math.sqrt((SATURATION**2 * self.rate + 1) * (1 - self.rate))
        return jnp.where(kept, scale * x, -SATURATION * scale) + SATURATION * scale * self.rate


class Rate(nnx.Variable):
    """The rate of a dropout layer, a number for each member."""


class MemberDropout(nnx.Dropout):
    """`nnx.Dropout` whose `rate` is a variable of each member instead of the network's.

    >>> layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    >>> MemberDropout.take_over(layer)
    >>> layer.rate[...] = 0.25
    >>> sorted(set(layer(jnp.ones(100)).tolist())) == [0.0, float(jnp.float32(1) / 0.75)]
    True
    """

    rate: Rate  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def take_over(cls, layer: nnx.Dropout) -> None:
        """Turns a layer into a `MemberDropout` in place."""
        rate = layer.rate
        layer.__class__ = cls
        layer.rate = nnx.data(Rate(jnp.float32(rate)))  # type: ignore[assignment]

    def __call__(
        self, inputs: Inexact[AnyArray, "*shape"], *, deterministic: bool | None = None, rngs: Any = None
    ) -> Inexact[AnyArray, "*shape"]:
        if self.deterministic if deterministic is None else deterministic:
            return inputs
        together = {dim % inputs.ndim for dim in self.broadcast_dims}
        shape = [1 if k in together else n for k, n in enumerate(inputs.shape)]
        keep = 1 - self.rate[...].astype(jnp.promote_types(inputs.dtype, jnp.float32))
        key = rngs if isinstance(rngs, jax.Array) else draw_key(self.rngs if rngs is None else rngs)
        kept = jax.random.bernoulli(key, keep, shape)
        return jnp.where(kept, inputs / jnp.where(keep > 0, keep, 1).astype(inputs.dtype), 0)


def draw_key(rngs: nnx.RngStream | None) -> PRNGKeyArray:
    """The next key of a layer's stream. **Raises:** `InputError` if the layer was made without one."""
    if rngs is None:
        raise InputError("this layer draws random numbers; construct it with rngs=nnx.Rngs(...), or call .eval()")
    return rngs()
