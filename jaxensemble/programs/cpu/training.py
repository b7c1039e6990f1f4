"""Replacements of XLA's convolutions and maxima for training on CPUs, where their gradients are slow."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxensemble.ops.pooling import lowest
from jaxensemble.programs.cpu.convolutions import ConvolutionSizes, convolution_of_products, sizes_of


def convolution_for_training(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """XLA's convolution, whose gradients are convolutions in the one order of axes that Eigen runs.

    JAX's own gradients swap the meaning of axes instead of the axes. XLA puts this right where it can, but runs a plain
    loop over all numbers where it cannot, as within a loop over members. Convolutions with strides, dilations or groups
    stay products of matrices.

    >>> x, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
    >>> numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    >>> options = {"window_strides": (1, 1), "padding": [(1, 1)] * 2, "dimension_numbers": numbers}
    >>> slope = jax.grad(lambda kernel: convolution_for_training(x, kernel, **options).sum())(kernel)
    >>> slope.shape, float(slope[1, 1, 0, 0]), float(slope[0, 0, 0, 0])
    ((3, 3, 3, 4), 50.0, 32.0)
    """
    sizes = sizes_of(lhs, rhs, **params)
    is_wide = lhs.dtype == rhs.dtype and lhs.dtype in (jnp.float32, jnp.float64)
    if sizes is None or not is_wide or params.get("preferred_element_type") or not _has_plain_gradient(sizes):
        return convolution_of_products(lhs, rhs, **params)
    numbers, precision = params["dimension_numbers"], params.get("precision")
    strides = (1,) * len(sizes.window)

    def run(x: jax.Array, kernel: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
        options = {"dimension_numbers": numbers, "precision": precision}
        return lax.conv_general_dilated(x, kernel, strides, pads, **options)

    @jax.custom_vjp
    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return run(x, kernel, sizes.pads)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return convolved(x, kernel), (x, kernel)

    def backward(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = kept
        spatial = range(len(sizes.window))
        turned = jnp.swapaxes(lax.rev(kernel, [*spatial]), -2, -1)
        pads = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(sizes.window, sizes.pads, strict=True)]
        rows, slopes = jnp.swapaxes(x, 0, -1), jnp.moveaxis(slope, 0, -2)
        turned, rows, slopes = lax.optimization_barrier((turned, rows, slopes))  # or XLA would swap meanings back
        return run(slope, turned, pads), jnp.moveaxis(run(rows, slopes, sizes.pads), 0, -2)

    convolved.defvjp(forward, backward)
    return convolved(lhs, rhs)


def _has_plain_gradient(sizes: ConvolutionSizes) -> bool:
    """Returns whether both gradients are convolutions of the same kind, large enough to be worth one."""
    once = sizes.groups == 1 and not sizes.is_strided and all(step == 1 for step in sizes.dilation)
    within = all(max(pads) < k for k, pads in zip(sizes.window, sizes.pads, strict=True))
    return once and within and sizes.taps > 1 and math.prod(sizes.out) > 4


def maxima(
    x: jax.Array,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> jax.Array:
    """The largest value of every window, as in max pooling.

    If windows tile the array, the gradient is a few comparisons. It goes to the first of equal values, as XLA's does.

    >>> options = {"padding": [(0, 0)], "base_dilation": [1], "window_dilation": [1]}
    >>> pooled = lambda x: maxima(x, window_dimensions=[2], window_strides=[2], **options)
    >>> x = jnp.array([3.0, 1.0, 2.0, 2.0])
    >>> pooled(x).tolist(), jax.grad(lambda x: pooled(x).sum())(x).tolist()
    ([3.0, 2.0], [1.0, 0.0, 1.0, 0.0])
    """
    options = {"window_dilation": tuple(window_dilation), "base_dilation": tuple(base_dilation)}
    window = tuple(window_dimensions)
    tiles = tuple(window_strides) == window and all(
        size % width == 0 for size, width in zip(x.shape, window, strict=True)
    )
    plain = not any(map(any, padding)) and all(step == 1 for step in (*base_dilation, *window_dilation))
    if not (tiles and plain and math.prod(window) <= _MOST and jnp.issubdtype(x.dtype, jnp.floating)):
        return lax.reduce_window(x, lowest(x.dtype), lax.max, window, tuple(window_strides), tuple(padding), **options)
    halves = [part for size, width in zip(x.shape, window, strict=True) for part in (size // width, width)]
    x = x.reshape(halves)
    taps = [_tap(x, at) for at in itertools.product(*map(range, window))]
    return functools.reduce(lambda a, b: jnp.where((a >= b) | jnp.isnan(a), a, b), taps)


_MOST = 16
"""The most values of a window that are compared one by one."""


def _tap(x: jax.Array, at: Sequence[int]) -> jax.Array:
    """One value of every window: `at` is its place along each axis, of which `x` has two, tiles and places."""
    for axis, place in enumerate(at):
        x = lax.index_in_dim(x, place, axis + 1, keepdims=False)
    return x
