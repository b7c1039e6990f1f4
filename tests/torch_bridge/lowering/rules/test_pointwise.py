"""Arithmetic, comparison, logic, rounding, special functions, casts and activations, and gradients of them all."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import assert_close, assert_ports
from torch_bridge.compat import ties_share_gradients
from torch_bridge.graph.capture import capture
from torch_bridge.lowering import OPERATIONS, lower
from torch_bridge.porting.port import to_flax

KINKS = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, -0.5, 2.5, -2.5, 0.3, -0.7, 7.3, 20.0, 25.0, -25.0, 1e-3]


class Call(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Call2(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def kinks() -> Tensor:
    return torch.tensor(KINKS).reshape(3, 6)


def positive() -> Tensor:
    return torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 3.7]).repeat(2).reshape(3, 4)


def fractions() -> Tensor:
    return torch.linspace(-0.9, 0.9, 12).reshape(3, 4)


def integers() -> Tensor:
    return torch.tensor([[-7, -3, -1, 1], [2, 3, 5, 8], [9, 4, -4, 6]])


# Functions of one array

UNARY = {
    "signs": (lambda x: (x.abs(), torch.absolute(x), torch.sign(x), torch.sgn(x), -x, torch.negative(x), +x), kinks),
    "rounding": (
        lambda x: (x.ceil(), x.floor(), x.round(), x.trunc(), x.frac(), torch.fix(x), x.round(decimals=1)),
        kinks,
    ),
    "rounding to tens": (lambda x: (x * 7).round(decimals=-1) + torch.round(x, decimals=0), kinks),
    "special rounding": (lambda x: torch.special.round(x * 7, decimals=1) + torch.special.round(x), kinks),
    "exponentials": (lambda x: (x.exp(), x.exp2(), x.expm1(), torch.special.expit(x)), fractions),
    "logarithms": (lambda x: (x.log(), x.log2(), x.log10(), x.log1p(), torch.special.entr(x)), positive),
    "roots": (lambda x: (x.sqrt(), x.rsqrt(), x.square(), x.reciprocal(), 1 / x), positive),
    "trigonometry": (lambda x: (x.sin(), x.cos(), x.tan(), x.asin(), x.acos(), x.atan(), torch.sinc(x)), fractions),
    "hyperbolic": (lambda x: (x.sinh(), x.cosh(), x.tanh(), x.asinh(), (x + 2).acosh(), x.atanh()), fractions),
    "degrees": (lambda x: (torch.deg2rad(x), torch.rad2deg(x), torch.arctan(x)), fractions),
    "error functions": (lambda x: (x.erf(), x.erfc(), x.erfinv(), torch.special.ndtr(x)), fractions),
    "gamma functions": (lambda x: (x.lgamma(), torch.special.gammaln(x)), positive),
    "bessel functions": (
        lambda x: (torch.special.i0(x), torch.special.i0e(x), torch.special.i1(x), torch.special.i1e(x)),
        kinks,
    ),
    "quantile": (lambda x: torch.special.ndtri(x), lambda: torch.linspace(0.05, 0.95, 12).reshape(3, 4)),
    "logit": (lambda x: (torch.logit(x, eps=0.25), torch.logit(x.clamp(0.01, 0.99))), fractions),
    "powers": (lambda x: (x**2, x**3.0, x**1, x**0, torch.pow(x, 2), x.pow(-1), x**-2), fractions),
    "powers of positives": (lambda x: (x**0.5, x**1.7, x**-0.5, 2**x, 0.5**x, torch.float_power(x, 2)), positive),
    "arithmetic with numbers": (lambda x: (x + 1, 1 - x, x - 2, 2 * x, x / 4, 3 / (x + 30), x % 0.7), kinks),
    "division with rounding": (
        lambda x: (
            torch.div(x.detach(), 0.7, rounding_mode="trunc"),
            torch.div(x.detach(), 0.7, rounding_mode="floor"),
            x.detach() // 0.4,
            torch.div(x, 0.7, rounding_mode=None),
            torch.fmod(x, 0.7),
            torch.remainder(x, -0.7),
        ),
        kinks,
    ),
    "alpha": (
        lambda x: (torch.add(x, 2, alpha=3), torch.sub(x, x * x, alpha=2), torch.rsub(x, 2, alpha=0.5)),
        fractions,
    ),
    "clamp": (lambda x: (x.clamp(-1, 3), x.clamp(min=0.5), x.clip(max=0.5), x.clamp_min(1), x.clamp_max(1)), kinks),
    "clamp with crossed bounds": (lambda x: x.clamp(3, -1), kinks),
    "masked": (lambda x: (x.masked_fill(x > 0, -1.0), torch.where(x > 0.5, x, 0.0), torch.where(x < 0, 1, x)), kinks),
    "masked by tensors": (
        lambda x: (x.masked_fill(x > 0, torch.tensor(2.5)), torch.where(x > 0, x, torch.tensor(2.0))),
        kinks,
    ),
    "copysign by a number": (lambda x: (torch.copysign(x, -1.0), torch.signbit(x)), kinks),
    "xlogy": (lambda x: (torch.xlogy(x, 2.0), torch.xlogy(2.0, x.abs() + 1)), kinks),
    "in place": (lambda x: (x * 1).add_(1).mul_(2).sub_(0.5).div_(3).sigmoid_(), kinks),
    "fill": (lambda x: (x.clone().fill_(2.0) + x, torch.zero_(x.clone()) + x), kinks),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_array(name: str) -> None:
    function, example = UNARY[name]
    assert_ports(Call(function), example(), batches=())


# Functions of several arrays

BINARY = {
    "arithmetic": lambda x, y: (x + y, x - y, x * y, x / (y + 30), torch.add(x, y, alpha=2), torch.sub(x, y, alpha=-1)),
    "division": lambda x, y: (x.detach() // (y + 30.5).detach(), x % (y + 30.5), torch.fmod(x, y + 30.5)),
    "extremes": lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), torch.max(x, y), torch.min(x, y)),
    "extremes without NaN": lambda x, y: (torch.fmax(x, y), torch.fmin(x, y)),
    "bounds": lambda x, y: (torch.clamp(x, min=y), torch.clamp(x, max=y), torch.clamp(x, y - 1, y + 1)),
    "crossed bounds": lambda x, y: torch.clamp(x, y + 1, y - 1),
    "interpolation": lambda x, y: (torch.lerp(x, y, 0.3), torch.lerp(x, y, 0.8), torch.lerp(x, y, (x * y).sigmoid())),
    "fused": lambda x, y: (torch.addcmul(x, x, y, value=0.5), torch.addcdiv(x, x, y + 30, value=-2)),
    "angles": lambda x, y: (torch.atan2(x, y), torch.hypot(x + 40, y)),
    "logarithms": lambda x, y: (torch.logaddexp(x, y), torch.logaddexp2(x, y), torch.xlogy(x, y.abs() + 0.1)),
    "more logarithms": lambda x, y: torch.special.xlog1py(x, y.abs()),
    "powers": lambda x, y: (x.abs() + 0.5) ** (y / 10),
    "signs": lambda x, y: torch.copysign(x, y),
    "choices": lambda x, y: (torch.where(x > y, x, y), torch.where((x > 0) & (y > 0), x, y)),
    "comparisons": lambda x, y: (x == y, x != y, x < y, x <= y, x > y, x >= y, torch.isclose(x, y)),
    "logic": lambda x, y: (
        torch.logical_and(x, y),
        torch.logical_or(x > 0, y),
        torch.logical_xor(x, y),
        torch.logical_not(x),
        ~(x > 0) | (y > 0) ^ (x > y),
    ),
    "aliases": lambda x, y: (torch.multiply(x, y), torch.subtract(x, y), torch.divide(x, 2), torch.greater(x, y)),
    "heaviside": lambda x, y: torch.heaviside(x, y).detach(),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_arrays(name: str) -> None:
    x = kinks()
    y = torch.tensor(KINKS[5:] + KINKS[:5]).reshape(3, 6)
    y[0, 0] = x[0, 0]
    y[1, :2] = x[1, :2]
    assert_ports(Call2(BINARY[name]), x, y, batches=())


def test_equal_bounds() -> None:
    if not ties_share_gradients():
        pytest.skip("this PyTorch, as 2.13, gives an equal bound below no gradient")
    assert_ports(Call2(lambda x, y: torch.clamp(x, y, y)), kinks(), kinks().flip(0), batches=())


def test_gradients_at_the_origin() -> None:
    """`atan2(0, 0)`, `0 * log(0)`, `0 ** 0`, `abs(0)`: PyTorch's gradients are 0, JAX's own NaN or 1."""
    zero = torch.zeros(2, 3)
    first_only = lambda x, y: (torch.xlogy(x, y.detach()), torch.special.xlog1py(x, y.detach() - 1))  # noqa: E731
    assert_ports(Call2(lambda x, y: (torch.atan2(x, y), x.abs(), x**y, *first_only(x, y))), zero, zero, batches=())


def test_broadcasting() -> None:
    x, y = torch.randn(2, 4, 3, 5), torch.randn(3, 1)
    assert_ports(Call2(lambda x, y: x * y + x[:, :1] - y * torch.linspace(0, 1, 5)), x, y, batches=())


# Dtypes

INTEGERS = {
    "division": lambda i: (i / 2, i / i, i // 2, i % 3, i // i, torch.div(i, 3, rounding_mode="trunc")),
    "negative divisors": lambda i: (i // -2, i % -3, torch.fmod(i, -3), torch.remainder(i, 3), torch.fmod(i, 4)),
    "with floats": lambda i: (i * 0.1, i + 0.3, i > 2.5, i == 2.0, 0.7 - i, i**0, i**2, torch.where(i > 1, i, 0.3)),
    "functions": lambda i: (i.float().exp(), (i / 9).exp(), torch.sigmoid(i), torch.sqrt(i * i), i.abs(), -i, i.sign()),
    "rounding": lambda i: (i.floor(), i.round(), i.ceil(), torch.square(i), i.clamp(0, 3), i.clamp(0, 2.5)),
    "bits": lambda i: (i & 3, i | 4, i ^ i, ~i, i << 1, i >> 1, torch.bitwise_and(i, 6), torch.bitwise_not(i)),
    "bool arithmetic": lambda i: ((i > 2) + 1, (i > 2) * 0.3, (i > 2) * i, (i > 2) & (i < 6), (i > 2) + (i > 3)),
    "where of numbers": lambda i: (torch.where(i > 2, 0.1, 0.7), torch.where(i > 2, 1, 0)),
    "casts": lambda i: (i.float() / 3, i.to(torch.float64) / 3, i.bool(), i.int(), i.to(torch.uint8), (i / 4).long()),
    "divisors": lambda i: (torch.gcd(i, i + 2), torch.lcm(i, i + 2)),
    "isnan": lambda i: (torch.isnan(i), torch.isfinite(i), torch.nan_to_num(i)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    """PyTorch's dtypes and values, in float32 where PyTorch computes in float32."""
    model, i = Call(INTEGERS[name]), integers()
    with jax.enable_x64(True):
        outputs = to_flax(model, (i,))(jnp.asarray(i.numpy()))
        for got, want in zip(outputs, model(i), strict=True):
            assert np.asarray(got).dtype.name == str(want.dtype).removeprefix("torch.")
            assert_close(got, want, 1e-7 if want.dtype == torch.float32 else 1e-12)


def test_integers_without_x64() -> None:
    """64-bit integers are 32-bit ones; nothing warns."""
    model, i = Call(lambda i: (i.float().long() + 1, i * 0.5, i.bool().long(), (i > 1).to(torch.int64))), integers()
    outputs = to_flax(model, (i,))(jnp.asarray(i.numpy()))
    for got, want in zip(outputs, model(i), strict=True):
        assert_close(got, want, 1e-7)
    assert [str(np.asarray(got).dtype) for got in outputs] == ["int32", "float32", "int32", "int32"]


def test_float64_without_x64_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        to_flax(Call(lambda x: x.double() * 2), (torch.ones(2, 3),))


def test_scalars_do_not_widen() -> None:
    """A float64 tensor without dimensions leaves a float32 array as it is; an array widens it."""
    x, y = torch.linspace(0, 1, 6).reshape(2, 3), torch.tensor(0.1, dtype=torch.float64)
    model = Call2(lambda x, y: (x * y, x + y.float(), x.double() * y, x.half() + x))
    with jax.enable_x64(True):
        module = to_flax(model, (x, y), batch_axis=None)
        for got, want in zip(module(jnp.asarray(x.numpy()), jnp.asarray(y.numpy())), model(x, y), strict=True):
            assert str(np.asarray(got).dtype) == str(want.dtype).removeprefix("torch.")
            assert_close(got, want, 1e-6)


def test_casts() -> None:
    assert_ports(Call2(lambda x, y: (x.type_as(y), x.to(y.dtype), x.long(), x.bool(), x.int().to(x))), kinks(), kinks())


def test_questions() -> None:
    x = torch.tensor([[0.0, math.inf, -math.inf, math.nan, 1.0, -2.0]] * 2)
    functions = (torch.isnan, torch.isinf, torch.isfinite, torch.isposinf, torch.isneginf, torch.signbit)
    assert_ports(Call(lambda x: tuple(f(x) for f in functions)), x, gradients=False, batches=())


def test_nan_to_num() -> None:
    x = torch.tensor([[0.5, math.inf, -math.inf, math.nan]] * 2)
    assert_ports(Call(lambda x: (torch.nan_to_num(x), torch.nan_to_num(x, 2.0, 3.0, -4.0))), x, batches=())


def test_not_a_number_passes() -> None:
    """NaNs stay where PyTorch leaves them."""
    x = torch.tensor([[math.nan, 1.0, -1.0, 4.0]] * 2)
    functions = (
        torch.relu,
        F.relu6,
        F.hardtanh,
        F.leaky_relu,
        F.hardswish,
        F.softplus,
        lambda x: x.clamp(0, 1),
        lambda x: F.threshold(x, 0.5, 2.0),
        F.hardshrink,
        F.softshrink,
    )
    assert_ports(Call(lambda x: tuple(f(x) for f in functions)), x, gradients=False, batches=())


# Activations


class Branches(nn.Module):
    """Several modules on one input; the outputs by name."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"{k} {type(branch).__name__}": branch(x) for k, branch in enumerate(self.branches)}


ACTIVATIONS = {
    "rectified": (nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.LeakyReLU(0.3), nn.RReLU(0.1, 0.4), nn.Threshold(0.5, 2.0)),
    "exponential": (nn.ELU(), nn.ELU(0.7), nn.SELU(), nn.CELU(), nn.CELU(0.5), nn.CELU(0.7)),
    "gated by themselves": (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish()),
    "hard": (nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(-2.5, 3.0), nn.Hardtanh(), nn.Hardtanh(0, 6)),
    "shrinking": (nn.Hardshrink(0.3), nn.Softshrink(0.3), nn.Tanhshrink()),
    "soft": (nn.Softplus(), nn.Softplus(2.0, 5.0), nn.Softsign(), nn.LogSigmoid(), nn.Sigmoid(), nn.Tanh()),
    "over dimensions": (nn.GLU(), nn.Softmin(1), nn.Softmax(-1), nn.LogSoftmax(1)),
    "with weights": (nn.PReLU(), nn.PReLU(6)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    assert_ports(Branches(*ACTIVATIONS[name]), kinks(), batches=(1,))


FEATURE_MAPS = {
    "softmax": (nn.Softmax2d(), nn.Softmax(1), nn.Softmin(2), nn.LogSoftmax(-1), nn.LogSoftmax(-3)),
    "GLU": (nn.GLU(1), nn.GLU(-2)),
    "PReLU": (nn.PReLU(6), nn.PReLU()),
}


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_activations_of_feature_maps(name: str) -> None:
    """Behind a convolution the axes are stored in another order; nothing is transposed but input and output."""
    model, x = nn.Sequential(nn.Conv2d(2, 6, 3), *FEATURE_MAPS[name]), torch.randn(2, 2, 6, 8)
    assert_ports(model, x, batches=(1,))
    calls = lower(capture(model.eval(), (x,), OPERATIONS)).network.calls
    assert sum(call.target == "jnp.transpose" for call in calls) == 2


def test_softmax_over_the_batch() -> None:
    assert_ports(nn.Softmax(0), kinks())


FUNCTIONAL = {
    "in place": lambda x: F.leaky_relu_(x * 1) + F.hardtanh(x * 2, -2, 2, inplace=True) + F.relu(x * 2, inplace=True),
    "methods": lambda x: x.relu().sigmoid().tanh().softmax(1).log_softmax(0),
    "every other": lambda x: F.elu(F.selu(F.celu(F.gelu(F.silu(F.mish(x)))))) + F.logsigmoid(x) + F.softsign(x),
    "hard ones": lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.relu6(x) + F.hardshrink(x) + F.softshrink(x),
    "special softmax": lambda x: torch.special.softmax(x, 1) + torch.special.log_softmax(x, 0),
    "softmax with dtype": lambda x: F.softmax(x, 1, dtype=torch.float64),
    "rrelu outside of training": lambda x: F.rrelu(x, 0.1, 0.3, training=False),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_activations(name: str) -> None:
    assert_ports(Call(FUNCTIONAL[name]), kinks(), batches=())


def test_shared_prelu_weight() -> None:
    """One parameter in two modules: both use it, and it is stored once."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.PReLU(3), nn.PReLU(3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + 0.1) + F.prelu(x, self.first.weight * 2)

    assert_ports(Shared(), torch.randn(2, 3, 4))


def test_rrelu_draws_in_training() -> None:
    """Slopes are drawn between the bounds in training, and fixed at their middle in evaluation."""
    module = to_flax(nn.RReLU(0.2, 0.4).eval(), (torch.ones(2, 3),))
    x = -np.ones((50, 40), "float32")
    np.testing.assert_allclose(module(x), -0.3, rtol=1e-6)
    module.train()
    slopes = -np.asarray(module(x))
    assert 0.2 <= slopes.min() < 0.205 and 0.395 < slopes.max() <= 0.4
    assert abs(slopes.mean() - 0.3) < 0.005
    assert np.array_equal(np.asarray(module(-x)), -x)


def test_gelu_is_not_the_approximation() -> None:
    """Flax's default is the tanh form: 1e-4 off."""
    (call,) = lower(capture(nn.GELU(), (torch.randn(2, 3),), OPERATIONS)).network.calls
    assert call.kwargs == {"approximate": False}
