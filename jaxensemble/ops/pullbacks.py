"""PyTorch's backward functions, for forwards that take derivatives. All of them are linear."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Inexact

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.convolution import conv
from jaxensemble.ops.pooling import adaptive_avg_pool, avg_pool
from jaxensemble.ops.windows import Ints


def conv_input_pullback(
    gradient: Inexact[AnyArray, "N ... out_features"],
    kernel: Inexact[AnyArray, "*window in_features_of_a_group out_features"],
    sizes: Sequence[int],
    **options: Any,
) -> Inexact[Array, "N ... _"]:
    """The gradient of a convolution's input `[N, *sizes, in_features]` from the gradient of its output.

    **Arguments:** `kernel` and `options` are those of `conv`.

    >>> import jax.numpy as jnp
    >>> conv_input_pullback(jnp.ones((1, 2, 1)), jnp.ones((2, 3, 1)), (3,))[0, :, 0].tolist()
    [1.0, 2.0, 1.0]
    """
    features = kernel.shape[-2] * options.get("feature_group_count", 1)
    x = jax.ShapeDtypeStruct((gradient.shape[0], *sizes, features), gradient.dtype)
    return jax.linear_transpose(lambda x: conv(x, kernel, **options), x)(gradient)[0]


def conv_kernel_pullback(
    gradient: Inexact[AnyArray, "N ... out_features"],
    x: Inexact[AnyArray, "N ... _"],
    window: Sequence[int],
    **options: Any,
) -> Inexact[Array, "... out_features"]:
    """The gradient of a convolution's kernel `[*window, in_features, out_features]` from the gradient of its output.

    **Arguments:** `x` and `options` are those of `conv`.

    >>> import jax.numpy as jnp
    >>> conv_kernel_pullback(jnp.ones((1, 2, 1)), jnp.ones((1, 3, 4)), (2,)).shape
    (2, 4, 1)
    """
    within = x.shape[-1] // options.get("feature_group_count", 1)
    kernel = jax.ShapeDtypeStruct((*window, within, gradient.shape[-1]), gradient.dtype)
    return jax.linear_transpose(lambda kernel: conv(x, kernel, **options), kernel)(gradient)[0]


def avg_pool_pullback(
    gradient: Inexact[AnyArray, "... C"],
    x: Inexact[AnyArray, "*shape C"],
    window_shape: Sequence[int],
    strides: Ints,
    **options: Any,
) -> Inexact[Array, "*shape C"]:
    """The gradient of the input `x` of `avg_pool` from the gradient of its output.

    >>> import jax.numpy as jnp
    >>> avg_pool_pullback(jnp.ones((2, 1)), jnp.ones((4, 1)), (2,), (2,))[:, 0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    return jax.linear_transpose(lambda x: avg_pool(x, window_shape, strides, **options), x)(gradient)[0]


def adaptive_avg_pool_pullback(
    gradient: Inexact[AnyArray, "... C"], x: Inexact[AnyArray, "*shape C"], output_size: Sequence[int]
) -> Inexact[Array, "*shape C"]:
    """The gradient of the input `x` of `adaptive_avg_pool` from the gradient of its output.

    >>> import jax.numpy as jnp
    >>> adaptive_avg_pool_pullback(jnp.ones((2, 1)), jnp.ones((4, 1)), (2,))[:, 0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    return jax.linear_transpose(lambda x: adaptive_avg_pool(x, output_size), x)(gradient)[0]
