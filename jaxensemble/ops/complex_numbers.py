"""Functions of complex numbers with PyTorch's gradients at 0, and on either side of where they are cut.

`jax.numpy` takes -2 - 0j for -2 + 0j, whose roots are each other's conjugates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Inexact, Num

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.pointwise import arctan2


def polar(size: Num[ArrayLike, "*#shape"], angle: Num[ArrayLike, "*#shape"]) -> Complex[Array, "*shape"]:
    """The complex numbers of these sizes and angles.

    >>> polar(2.0, jnp.pi / 2).imag.item()
    2.0
    """
    size, angle = jnp.asarray(size), jnp.asarray(angle)
    return lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))


def angle(x: Num[ArrayLike, "*shape"]) -> Num[Array, "*shape"]:
    """The angle of complex numbers, whose gradient at 0 is 0; of real ones 0, and pi below 0.

    >>> angle(jnp.array([-1.0, 2.0])), angle(jnp.array([1 + 1j]))
    (Array([3.1415927, 0.       ], dtype=float32), Array([0.7853982], dtype=float32))
    """
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        return arctan2(jnp.imag(x), jnp.real(x))
    return lax.stop_gradient(jnp.where(jnp.isnan(x), x, jnp.where(x < 0, jnp.pi, 0).astype(x.dtype)))


def sqrt(x: Inexact[AnyArray, "*shape"]) -> Inexact[Array, "*shape"]:
    """The square root of complex numbers.

    >>> sqrt(jnp.array([complex(-4, 0.0), complex(-4, -0.0)])).tolist()
    [2j, -2j]
    """
    return _conjugate_below(jnp.sqrt, x)


def arcsin(x: Inexact[AnyArray, "*shape"]) -> Inexact[Array, "*shape"]:
    """The inverse sine of complex numbers.

    >>> jnp.sign(arcsin(jnp.array([complex(2, 0.0), complex(2, -0.0)])).imag).tolist()
    [1.0, -1.0]
    """
    return _conjugate_below(jnp.arcsin, x)


def arccos(x: Inexact[AnyArray, "*shape"]) -> Inexact[Array, "*shape"]:
    """The inverse cosine of complex numbers.

    >>> jnp.sign(arccos(jnp.array([complex(2, 0.0), complex(2, -0.0)])).imag).tolist()
    [-1.0, 1.0]
    """
    return _conjugate_below(jnp.arccos, x)


def arccosh(x: Inexact[AnyArray, "*shape"]) -> Inexact[Array, "*shape"]:
    """The inverse hyperbolic cosine of complex numbers, with the right gradient where their real part is negative.

    >>> jnp.sign(arccosh(jnp.array([complex(0, 0.0), complex(0, -0.0)])).imag).tolist()
    [1.0, -1.0]
    """
    return _conjugate_below(_arccosh, x)


@jax.custom_jvp
def _arccosh(x: Inexact[AnyArray, "*shape"]) -> Inexact[Array, "*shape"]:
    return jnp.arccosh(x)


@_arccosh.defjvp
def _arccosh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (slope,) = primals, tangents
    return _arccosh(x), slope / (jnp.sqrt(x - 1) * jnp.sqrt(x + 1))  # JAX's own takes the root of the product


def _conjugate_below(function: Callable[[Array], Array], x: Inexact[AnyArray, "*shape"]) -> Inexact[Array, "*shape"]:
    """A function that gives the conjugate for a conjugate, also for the two that differ in the sign of a zero alone."""
    below = (jnp.imag(x) == 0) & jnp.signbit(jnp.imag(x))
    y = function(jnp.where(below, jnp.conj(x), x))
    return jnp.where(below, jnp.conj(y), y)


def sgn(x: Inexact[AnyArray, "*shape"]) -> Inexact[Array, "*shape"]:
    """The complex number of size 1 with the same angle; 0 at 0, with gradient 0.

    >>> sgn(jnp.array([0j, 2j])).tolist()
    [0j, 1j]
    """
    size = jnp.abs(x)
    return jnp.where(size == 0, 0, x / jnp.where(size == 0, 1, size))
