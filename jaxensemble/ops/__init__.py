"""Array functions with PyTorch's semantics that `jax.numpy`, `jax.nn` and Flax lack. Feature maps are channels-last."""

from jaxensemble.ops.convolution import conv
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
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "adaptive_max_pool_with_indices",
    "affine_grid",
    "avg_pool",
    "conv",
    "grid_sample",
    "max_pool",
    "max_pool_with_indices",
    "max_unpool",
    "overlap_add",
    "patches",
    "resize",
]
