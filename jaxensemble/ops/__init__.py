"""Array functions with PyTorch's semantics that `jax.numpy`, `jax.nn` and Flax lack. Feature maps are channels-last."""

from jaxensemble.ops.activations import celu, hard_sigmoid, hard_tanh, leaky_relu, softplus
from jaxensemble.ops.convolution import conv
from jaxensemble.ops.normalization import batch_norm, cosine_similarity, norm, weight_norm
from jaxensemble.ops.pointwise import (
    abs,
    arctan2,
    bessel_i0,
    bessel_i1,
    clamp,
    copysign,
    entr,
    fmax,
    fmin,
    lerp,
    normal_cdf,
    normal_quantile,
    power,
    truncated_divide,
    xlog1py,
    xlogy,
)
from jaxensemble.ops.pooling import (
    adaptive_avg_pool,
    adaptive_max_pool,
    adaptive_max_pool_with_indices,
    avg_pool,
    max_pool,
    max_pool_with_indices,
    max_unpool,
)
from jaxensemble.ops.resize import resize
from jaxensemble.ops.sampling import affine_grid, grid_sample
from jaxensemble.ops.windows import overlap_add, patches

__all__ = [
    "abs",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "adaptive_max_pool_with_indices",
    "affine_grid",
    "arctan2",
    "avg_pool",
    "batch_norm",
    "bessel_i0",
    "bessel_i1",
    "celu",
    "clamp",
    "conv",
    "copysign",
    "cosine_similarity",
    "entr",
    "fmax",
    "fmin",
    "grid_sample",
    "hard_sigmoid",
    "hard_tanh",
    "leaky_relu",
    "lerp",
    "max_pool",
    "max_pool_with_indices",
    "max_unpool",
    "norm",
    "normal_cdf",
    "normal_quantile",
    "overlap_add",
    "patches",
    "power",
    "resize",
    "softplus",
    "truncated_divide",
    "weight_norm",
    "xlog1py",
    "xlogy",
]
