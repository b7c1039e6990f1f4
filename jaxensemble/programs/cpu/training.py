"""Replacements of XLA's convolutions and maxima for training on CPUs, where their gradients are slow."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxensemble.ops.pooling import lowest
from jaxensemble.programs.cpu.convolutions import ConvolutionSizes, Form, convolution
from jaxensemble.programs.rewrite import CONVOLUTION, rewrite_steps

MAXIMA = "reduce_window_max"


def _products(sizes: ConvolutionSizes) -> Form:
    """Products of matrices, whose gradients are such products; narrow groups stay multiply-adds."""
    if sizes.groups > 1:
        return "grouped" if sizes.has_narrow_groups else "built-in"
    return "im2col"


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


def choose_training_forms(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a function of one member steps whose gradients CPUs compute fast, under `jax.vmap` too."""
    return rewrite_steps(function, {CONVOLUTION: functools.partial(convolution, choose=_products), MAXIMA: maxima})
