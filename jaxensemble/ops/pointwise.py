"""Functions of one element at a time that differ from `jax.numpy`'s in a value, or in the gradient at some point.

Gradients follow PyTorch's (`tools/autograd/derivatives.yaml` in its source): they are what training sees at the zeros
that a ReLU or a padding leaves behind.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import special
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float, Num

from jaxensemble.ops.annotations import AnyArray


def abs(x: Num[ArrayLike, "*shape"]) -> Num[Array, "*shape"]:
    """The absolute value; its gradient at 0 is 0.

    >>> float(jax.grad(abs)(0.0)), float(abs(-2.0))
    (0.0, 2.0)
    """
    x = jnp.asarray(x)
    return jnp.sign(x) * x


def clamp(
    x: Num[ArrayLike, "*#shape"],
    min: Num[ArrayLike, "*#shape"] | None = None,
    max: Num[ArrayLike, "*#shape"] | None = None,
) -> Num[Array, "*shape"]:
    """`x` kept within bounds; at a bound the whole gradient goes to `x`, where `jnp.clip` gives half.

    Where `min` exceeds `max`, the result is `max`.

    >>> clamp(jnp.array([-2.0, 0.5, 3.0]), -1.0, 1.0).tolist()
    [-1.0, 0.5, 1.0]
    >>> jax.vmap(jax.grad(lambda x: clamp(x, -1.0, 1.0)))(jnp.array([-2.0, -1.0, 1.0])).tolist()
    [0.0, 1.0, 1.0]
    """
    result = jnp.asarray(x)
    if min is not None:
        result = jnp.where(result < min, min, result)
    if max is not None:
        result = jnp.where(result > max, max, result)
    return result


def clamp_open(x: Num[ArrayLike, "*shape"], min: float | None = None, max: float | None = None) -> Num[Array, "*shape"]:
    """`x` kept within bounds that are numbers; at a bound the gradient is 0, as in PyTorch 2.15.

    >>> clamp_open(jnp.array([-2.0, 0.5, 3.0]), -1.0, 1.0).tolist()
    [-1.0, 0.5, 1.0]
    >>> jax.vmap(jax.grad(lambda x: clamp_open(x, -1.0, 1.0)))(jnp.array([-1.0, 0.5, 1.0])).tolist()
    [0.0, 1.0, 0.0]
    """
    result = jnp.asarray(x)
    if min is not None:
        result = jnp.where(result <= min, min, result)
    if max is not None:
        result = jnp.where(result >= max, max, result)
    return result


def clamp_shared(
    x: Num[ArrayLike, "*#shape"],
    min: Num[ArrayLike, "*#shape"] | None = None,
    max: Num[ArrayLike, "*#shape"] | None = None,
) -> Num[Array, "*shape"]:
    """`x` kept within bounds that are arrays; `x` and a bound equal to it get half the gradient each.

    Between two equal bounds `x` gets all of it. PyTorch 2.15 shares the gradient in this way.

    >>> clamp_shared(jnp.array([-2.0, 0.5, 3.0]), -1.0, 1.0).tolist()
    [-1.0, 0.5, 1.0]
    >>> [grad.tolist() for grad in jax.grad(clamp_shared, (0, 1, 2))(1.0, 0.0, 1.0)]
    [0.5, 0.0, 0.5]
    >>> [grad.tolist() for grad in jax.grad(clamp_shared, (0, 1, 2))(1.0, 1.0, 1.0)]
    [1.0, 0.0, 0.0]
    """
    x = result = jnp.asarray(x)
    if min is not None:
        result = _shared(result, min, jnp.where(result < min, min, result))
    if max is not None:
        above = jnp.where(result > max, max, result)
        result = jnp.where(x == max, _shared(result, max, above), above)
    if min is not None and max is not None:
        result = jnp.where((x == min) & (x == max), x, result)
    return result


def fmax_shared(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Num[Array, "*shape"]:
    """The larger of two numbers, or the number that is not NaN; equal get half the gradient each, as in PyTorch 2.15.

    >>> fmax_shared(jnp.array([1.0, jnp.nan]), jnp.array([0.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    return _shared(x, y, fmax(x, y))


def fmin_shared(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Num[Array, "*shape"]:
    """The smaller of two numbers, or the number that is not NaN; equal get half the gradient each, as in PyTorch 2.15.

    >>> fmin_shared(jnp.array([1.0, jnp.nan]), jnp.array([0.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    return _shared(x, y, fmin(x, y))


def _shared(
    x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"], chosen: Num[AnyArray, "*shape"]
) -> Num[Array, "*shape"]:
    """One of two numbers; where they are equal, half of each."""
    return jnp.where(jnp.asarray(x) == y, 0.5 * jnp.asarray(x) + 0.5 * jnp.asarray(y), chosen)


def fmax(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Num[Array, "*shape"]:
    """The larger of two numbers, or the number that is not NaN; of equal numbers `x`, which gets the gradient.

    >>> fmax(jnp.array([1.0, jnp.nan]), jnp.array([0.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    return jnp.where((jnp.asarray(x) >= y) | jnp.isnan(y), x, y)


def fmin(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Num[Array, "*shape"]:
    """The smaller of two numbers, or the number that is not NaN; of equal numbers `x`, which gets the gradient.

    >>> fmin(jnp.array([1.0, jnp.nan]), jnp.array([0.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    return jnp.where((jnp.asarray(x) <= y) | jnp.isnan(y), x, y)


def complex_of(real: Num[ArrayLike, "*#shape"], imaginary: Num[ArrayLike, "*#shape"]) -> Complex[Array, "*shape"]:
    """Complex numbers with these parts, which broadcast.

    >>> complex_of(jnp.array([1.0, 2.0]), jnp.array(3.0)).tolist()
    [(1+3j), (2+3j)]
    """
    return lax.complex(*jnp.broadcast_arrays(jnp.asarray(real), jnp.asarray(imaginary)))


@jax.custom_jvp
def nextafter(x: Float[AnyArray, "*#shape"], y: Float[AnyArray, "*#shape"]) -> Float[Array, "*shape"]:
    """The next number after `x` on the way to `y`, with the gradient of `x`.

    >>> (nextafter(jnp.float32(1), jnp.float32(2)) - 1).item()
    1.1920...e-07
    """
    return jnp.nextafter(x, y)


@nextafter.defjvp
def _nextafter_jvp(primals: tuple[AnyArray, Array], tangents: tuple[AnyArray, Array]) -> tuple[Array, Array]:
    following = nextafter(*primals)
    return following, jnp.broadcast_to(tangents[0], following.shape)


def truncated_divide(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Num[Array, "*shape"]:
    """`x / y` rounded towards zero.

    >>> truncated_divide(jnp.array([-7, 7]), 2).tolist(), truncated_divide(jnp.array([-7.0]), 2).tolist()
    ([-3, 3], [-3.0])
    """
    x, y = jnp.broadcast_arrays(*_alike(x, y))
    return lax.div(x, y) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.trunc(x / y)


def _alike(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    dtype = jnp.result_type(x, y)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def power(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Num[Array, "*shape"]:
    """`x ** y` for arrays; at `0 ** 0` both gradients are 0. Complex powers of 0 are 0 where the exponent is positive.

    >>> power(jnp.array([2.0, 0.0]), jnp.array([3.0, 0.0])).tolist(), power(jnp.array([0j]), 1 + 1j).tolist()
    ([8.0, 1.0], [0j])
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if not jnp.iscomplexobj(x) and not jnp.iscomplexobj(y):
        return jnp.power(jnp.where((x == 0) & (y == 0), 1, x), y)
    vanishing = (x == 0) & (jnp.real(y) > 0)
    return jnp.where(vanishing, 0, jnp.power(jnp.where(vanishing, 1, x), y))


def lerp(
    start: Num[ArrayLike, "*#shape"], end: Num[ArrayLike, "*#shape"], weight: Num[ArrayLike, "*#shape"]
) -> Num[Array, "*shape"]:
    """`start + weight * (end - start)`, computed from the end that is nearer.

    >>> lerp(jnp.array([0.0, 10.0]), jnp.array([1.0, 20.0]), 0.25).tolist()
    [0.25, 12.5]
    """
    start, end, weight = jnp.asarray(start), jnp.asarray(end), jnp.asarray(weight)
    step = end - start
    return jnp.where(jnp.abs(weight) < 0.5, start + weight * step, end - step * (1 - weight))


def arctan2(y: Num[ArrayLike, "*#shape"], x: Num[ArrayLike, "*#shape"]) -> Float[Array, "*shape"]:
    """The angle of the point `(x, y)`; at the origin the gradient is 0.

    >>> jax.grad(arctan2)(0.0, 0.0).item(), round(arctan2(1.0, 1.0).item(), 4)
    (0.0, 0.7854)
    """
    y, x = jnp.asarray(y), jnp.asarray(x)
    origin = (y == 0) & (x == 0)
    return jnp.where(origin, lax.stop_gradient(jnp.arctan2(y, x)), jnp.arctan2(y, jnp.where(origin, 1, x)))


def copysign(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Num[Array, "*shape"]:
    """The magnitude of `x` with the sign of `y`; the gradient at `x = 0` is 0.

    >>> copysign(jnp.array([1.0, -2.0]), -1.0).tolist()
    [-1.0, -2.0]
    """
    magnitude = abs(x)
    return jnp.where(jnp.signbit(y), -magnitude, magnitude)


def xlogy(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Float[Array, "*shape"]:
    """`x * log(y)`, and 0 where `x` is 0; there the gradient is `log(y)` for positive `y`, else 0.

    >>> xlogy(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0])).tolist()
    [0.0, 0.0]
    """
    return _times_log(x, y, jnp.log, 0)


def xlog1py(x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"]) -> Float[Array, "*shape"]:
    """`x * log(1 + y)`, and 0 where `x` is 0; there the gradient is `log(1 + y)` for `y > -1`, else 0.

    >>> xlog1py(jnp.array([0.0, 2.0]), jnp.array([-1.0, 0.0])).tolist()
    [0.0, 0.0]
    """
    return _times_log(x, y, jnp.log1p, -1)


def _times_log(
    x: Num[ArrayLike, "*#shape"], y: Num[ArrayLike, "*#shape"], log: Callable[[Array], Array], pole: int
) -> Float[Array, "*shape"]:
    x, y = jnp.asarray(x), jnp.asarray(y)
    vanishing = (x == 0) & ((y <= pole) | jnp.isinf(y))
    return x * log(jnp.where(vanishing, pole + 1, y))


def entr(x: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """`-x * log(x)`: 0 at 0, `-inf` below.

    >>> entr(jnp.array([1.0, -1.0])).tolist()
    [-0.0, -inf]
    """
    return special.entr(x)


def normal_cdf(x: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """The distribution function of the standard normal distribution.

    >>> normal_cdf(0.0).item()
    0.5
    """
    return (1 + lax.erf(jnp.asarray(x) * math.sqrt(0.5))) / 2


def normal_quantile(p: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """The inverse of `normal_cdf`.

    >>> normal_quantile(0.5).item()
    0.0
    """
    return special.ndtri(p)


def bessel_i0(x: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """The modified Bessel function of the first kind, of order 0; its gradient at 0 is 0.

    >>> round(bessel_i0(0.0).item(), 4), jax.grad(bessel_i0)(0.0).item()
    (1.0, 0.0)
    """
    x = jnp.asarray(x)
    return jnp.exp(abs(x)) * lax.bessel_i0e(x)


def bessel_i1(x: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """The modified Bessel function of the first kind, of order 1.

    >>> bessel_i1(0.0).item(), jax.grad(bessel_i1)(0.0).item()
    (0.0, 0.5)
    """
    x = jnp.asarray(x)
    return jnp.exp(abs(x)) * lax.bessel_i1e(x)
