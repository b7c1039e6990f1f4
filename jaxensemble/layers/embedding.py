"""Embeddings whose gradients are PyTorch's."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Inexact, Integer

from jaxensemble.errors import InputError
from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.embedding import embed


class Embed(nnx.Embed):
    """`nnx.Embed` with two options that change nothing but gradients.

    - `padding_idx`: the row of this index gets no gradient.
    - `scale_grad_by_freq`: the gradient of each row is divided by how often its index occurs in the call.

    Input: integers of any shape; output `[..., features]`. An index out of range raises in PyTorch and gives NaN here.

    >>> layer = Embed(3, 2, padding_idx=0, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([0, 2])).shape
    (2, 2)
    >>> nnx.grad(lambda m: m(jnp.array([0, 2])).sum())(layer)["embedding"][...].tolist()
    [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_embeddings, features, param_dtype=param_dtype, rngs=rngs)
        self.padding_idx = padding_idx
        self.scale_grad_by_freq = scale_grad_by_freq

    def __call__(
        self, inputs: Integer[AnyArray, "*shape"], out_sharding: Any = None
    ) -> Inexact[Array, "*shape features"]:
        if out_sharding is not None:
            raise InputError("`out_sharding` is for nnx.Embed; expected None")
        return embed(
            self.embedding[...], inputs, padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )
