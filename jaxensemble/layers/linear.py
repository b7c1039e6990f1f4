"""Dense layers of more than one input."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Num

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.linear import bilinear


class Bilinear(nnx.Module):
    """`sum(x[i] * kernel[i, j, o] * y[j]) + bias[o]`: `torch.nn.Bilinear`.

    >>> layer = Bilinear(2, 3, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((5, 2)), jnp.ones((5, 3))).shape
    (5, 4)
    """

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = in1_features**-0.5
        shape = (in1_features, in2_features, out_features)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else nnx.data(None)

    def __call__(
        self, x: Num[AnyArray, "*#batch in1_features"], y: Num[AnyArray, "*#batch in2_features"]
    ) -> Num[Array, "*batch out_features"]:
        """`x` is `[..., in1_features]`, `y` `[..., in2_features]`; gives `[..., out_features]`."""
        result = bilinear(x, y, self.kernel[...])
        return result if self.bias is None else result + self.bias[...]
