"""Convolutions of modules that others map: `jax.vmap` over kernels runs them one after the other on CPUs.

`jax.vmap` turns the convolutions of several members into one grouped convolution, which XLA runs slowly on CPUs. An
ensemble rewrites the traced program of its call. A function that a user maps may not be traced as a whole, since it may
read values. So the convolution itself says how it is mapped, by the argument of `nnx.Conv` for a convolution.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jaxensemble.programs.cpu.convolutions import convolution, convolution_alone


def mapped_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    out_sharding: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for CPUs, to rounding the same numbers and gradients.

    Under `jax.vmap` over the kernels they run one after the other, in the form that is fast for one; gradients are
    products of matrices.

    >>> x, kernels = jnp.ones((2, 5, 5, 3)), jnp.ones((7, 3, 3, 3, 4))
    >>> numbers = lax.conv_dimension_numbers(x.shape, kernels.shape[1:], ("NHWC", "HWIO", "NHWC"))
    >>> jax.vmap(lambda kernel: mapped_convolution(x, kernel, (1, 1), "SAME", dimension_numbers=numbers))(kernels).shape
    (7, 2, 5, 5, 4)
    """
    if out_sharding is not None:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, out_sharding=out_sharding, **options)
    padding = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    return _kind(tuple(window_strides), padding, tuple(sorted(options.items())))(lhs, rhs)


@functools.lru_cache(maxsize=1024)
def _kind(strides: tuple[int, ...], padding: Any, options: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
    """The function of one kind of convolution: one object, so that what is compiled of it is found again."""
    settings: dict[str, Any] = {"window_strides": strides, "padding": padding, **dict(options)}
    alone = functools.partial(convolution_alone, **settings)
    products = functools.partial(convolution, choose=lambda sizes: "im2col", **settings)
    apart, in_turn = custom_vmap(functools.partial(lax.conv_general_dilated, **settings)), custom_vmap(alone)

    @functools.partial(jax.jit, static_argnames="shared")  # one program also where nothing around it is compiled
    def one_by_one(lhs: jax.Array, rhs: jax.Array, *, shared: bool) -> jax.Array:
        if shared:
            return lax.map(lambda kernel: in_turn(lhs, kernel), rhs)
        return lax.map(lambda pair: in_turn(*pair), (lhs, rhs))

    def mapped(size: int, is_mapped: Sequence[bool], lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, bool]:
        if is_mapped[1]:
            return one_by_one(lhs, rhs, shared=not is_mapped[0]), True
        result = apart(lax.collapse(lhs, 0, 2), rhs)  # an `nnx.Conv` has its rows first
        return result.reshape(size, -1, *result.shape[1:]), True

    apart.def_vmap(mapped)
    in_turn.def_vmap(mapped)
    run = jax.custom_jvp(apart)

    def jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        (lhs, rhs), (slope_lhs, slope_rhs) = primals, tangents
        result = run(lhs, rhs)
        slopes = [] if isinstance(slope_lhs, SymbolicZero) else [products(slope_lhs, rhs)]
        slopes += [] if isinstance(slope_rhs, SymbolicZero) else [products(lhs, slope_rhs)]
        return result, functools.reduce(jnp.add, slopes) if slopes else jnp.zeros_like(result)

    run.defjvp(jvp, symbolic_zeros=True)
    return run
