"""Convolution with a kernel that is computed, not stored: weight norm, hypernetworks, fixed filters."""

from collections.abc import Sequence

from jax import lax
from jaxtyping import Array, Inexact

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.windows import Ints, each

Pairs = Sequence[tuple[int, int]]


def conv(
    x: Inexact[AnyArray, "... in_features"],
    kernel: Inexact[AnyArray, "*window in_features_of_a_group out_features"],
    strides: Ints = 1,
    *,
    padding: str | int | Pairs = "VALID",
    input_dilation: Ints = 1,
    kernel_dilation: Ints = 1,
    feature_group_count: int = 1,
) -> Inexact[Array, "... out_features"]:
    """The convolution of `nnx.Conv` as a function of the kernel.

    **Arguments:**

    - `x`: `[..., *spatial, in_features]`, any number of leading axes.
    - `kernel`: `[*window, in_features // feature_group_count, out_features]`, of the dtype of `x`.
    - `padding`: `"VALID"`, a number of zeros on every side, or a pair of numbers for each spatial axis; negative
      numbers crop.
    - `input_dilation`: with a convolution's strides here and its kernel flipped, the result is the transpose.

    **Returns:** `[..., *spatial, out_features]`.

    >>> import jax.numpy as jnp
    >>> conv(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)), 2).shape
    (1, 2, 2, 4)
    """
    spatial = kernel.ndim - 2
    pads = padding if isinstance(padding, str) else _pairs(padding, spatial)
    axes = "DHW"[-spatial:]
    lead = x.shape[: -spatial - 1]
    y = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[-spatial - 1 :]),
        kernel,
        each(strides, spatial),
        pads,
        each(input_dilation, spatial),
        each(kernel_dilation, spatial),
        (f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count,
    )
    return y.reshape(*lead, *y.shape[1:])


def _pairs(padding: int | Pairs, spatial: int) -> Pairs:
    return ((padding, padding),) * spatial if isinstance(padding, int) else padding
