"""Random numbers.

They come from the same distributions as in PyTorch, by keys of JAX. Each module that draws has a layer that gives a key
for each draw. JAX cannot reproduce the numbers that PyTorch would draw: in a proof, PyTorch gets JAX's numbers, see
`torch_bridge.parity.draws`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jaxensemble.network.network import Arg, Ref
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dtypes import dtype_argument
from torch_bridge.lowering.layouts.layout import Size
from torch_bridge.lowering.table import refuse, register
from torch_bridge.lowering.values import Operand, Value

NAMES = frozenset(
    """
    bernoulli binomial cauchy exponential geometric log_normal multinomial normal normal_functional poisson rand
    rand_like randint randint_like randn randn_like random randperm uniform
    """.split()
)
"""The operations of ATen that draw random numbers and do nothing else."""


def is_draw(operation: Any) -> bool:
    """Returns whether an operation draws random numbers, in place or not."""
    return getattr(operation, "namespace", "") == "aten" and operation._opname.rstrip("_") in NAMES


def _shape(b: Builder) -> tuple[Arg, ...]:
    """The shape of a draw. Open sizes are read from the arrays that gave them."""
    near = [(value.expr, value.layout.stored_shape) for value in b.size_sources]
    return tuple(b.size(entry, near) for entry in b.result_shape)


def _emit_draw(b: Builder, name: str, *args: Arg, dtype: bool = True) -> Ref:
    """Emits a draw, in the dtype of the result where the function takes a dtype."""
    options: dict[str, Arg] = {"dtype": dtype_argument(b, b.dtype)} if dtype else {}
    return b.emit(f"jax.random.{name}", b.random_key(), *args, **options)


def _standard_rule(name: str) -> Callable[..., Value]:
    """A rule for operations that draw from one distribution. All arguments except the shape are ignored."""
    return lambda b, *_, **__: b.new(_emit_draw(b, name, _shape(b)))


register("aten.rand.default", "aten.rand_like.default")(_standard_rule("uniform"))
register("aten.randn.default", "aten.randn_like.default")(_standard_rule("normal"))


def _scale_and_shift(b: Builder, drawn: Ref, scale: Operand, offset: Operand) -> Value:
    """`drawn * scale + offset`, without a scale of 1 and an offset of 0."""
    value = b.new(drawn)
    if not _is_number(scale, 1):
        value = b.elementwise("*", value, scale)
    return value if _is_number(offset, 0) else b.elementwise("+", value, offset)


def _is_number(operand: Operand, number: int) -> bool:
    """Returns whether an operand is this Python number."""
    return isinstance(operand, int | float) and operand == number


@register("aten.normal_functional.default")
def normal_in_place(b: Builder, x: Value, mean: float = 0.0, std: float = 1.0, **_: Any) -> Value:
    return _scale_and_shift(b, _emit_draw(b, "normal", _shape(b)), std, mean)


@register(
    "aten.normal.Tensor_float", "aten.normal.float_Tensor", "aten.normal.Tensor_Tensor", "aten.normal.float_float"
)
def normal(b: Builder, mean: Operand, std: Operand = 1.0, *_: Any, **__: Any) -> Value:
    """A normal distribution, without gradients by the mean and the deviation, as in PyTorch."""
    value = _scale_and_shift(b, _emit_draw(b, "normal", _shape(b)), std, mean)
    return b.laid(b.emit("lax.stop_gradient", value.expr), value.layout)


@register("aten.log_normal.default")
def log_normal(b: Builder, x: Value, mean: float = 1.0, std: float = 2.0, **_: Any) -> Value:
    return b.elementwise("jnp.exp", _scale_and_shift(b, _emit_draw(b, "normal", _shape(b)), std, mean))


@register("aten.cauchy.default")
def cauchy(b: Builder, x: Value, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Value:
    return _scale_and_shift(b, _emit_draw(b, "cauchy", _shape(b)), sigma, median)


@register("aten.uniform.default")
def uniform(b: Builder, x: Value, low: float = 0.0, high: float = 1.0, **_: Any) -> Value:
    options: dict[str, Arg] = {} if (low, high) == (0, 1) else {"minval": low, "maxval": high}
    dtype = dtype_argument(b, b.dtype)
    return b.new(b.emit("jax.random.uniform", b.random_key(), _shape(b), dtype=dtype, **options))


@register("aten.exponential.default")
def exponential(b: Builder, x: Value, rate: float = 1.0, **_: Any) -> Value:
    """An exponential distribution that is never 0, as in PyTorch: `F.gumbel_softmax` takes its logarithm."""
    drawn = b.emit("ops.exponential", b.random_key(), _shape(b), dtype_argument(b, b.dtype))
    return _scale_and_shift(b, drawn, 1 / rate, 0)


@register("aten.geometric.default")
def geometric(b: Builder, x: Value, p: float, **_: Any) -> Value:
    drawn = b.emit("jax.random.geometric", b.random_key(), p, _shape(b))
    return b.new(b.emit(".astype", drawn, dtype_argument(b, b.dtype)))


def _bernoulli(b: Builder, p: Arg, *shape: Arg) -> Value:
    """A draw of zeros and ones in the dtype of the result."""
    drawn = b.emit("jax.random.bernoulli", b.random_key(), p, *shape)
    return b.new(drawn if b.dtype == torch.bool else b.emit(".astype", drawn, dtype_argument(b, b.dtype)))


@register("aten.bernoulli.p")
def bernoulli_of_number(b: Builder, x: Value, p: float, **_: Any) -> Value:
    return _bernoulli(b, p, _shape(b))


@register("aten.bernoulli.default")
def bernoulli(b: Builder, p: Value, **_: Any) -> Value:
    return _bernoulli(b, b.plain(p).expr)


@register("aten.bernoulli.Tensor")
def bernoulli_of_tensor(b: Builder, x: Value, p: Value, **_: Any) -> Value:
    return _bernoulli(b, b.plain(p).expr, _shape(b))


@register("aten.poisson.default")
def poisson(b: Builder, rate: Value, **_: Any) -> Value:
    drawn = b.emit("jax.random.poisson", b.random_key(), b.plain(rate).expr)
    return b.new(b.emit(".astype", drawn, dtype_argument(b, b.dtype)))


def _integers(b: Builder, low: Arg, high: Arg) -> Value:
    """A draw of integers in the dtype of the result."""
    if not b.dtype.is_floating_point:
        return b.new(_emit_draw(b, "randint", _shape(b), low, high))
    return b.new(
        b.emit(".astype", _emit_draw(b, "randint", _shape(b), low, high, dtype=False), dtype_argument(b, b.dtype))
    )


@register("aten.randint.default")
def randint(b: Builder, high: Size, shape: Sequence[Size], **_: Any) -> Value:
    return _integers(b, 0, b.size(high))


@register("aten.randint.low")
def randint_from(b: Builder, low: Size, high: Size, shape: Sequence[Size], **_: Any) -> Value:
    return _integers(b, b.size(low), b.size(high))


@register("aten.randint_like.default")
def randint_like(b: Builder, x: Value, high: Size, **_: Any) -> Value:
    return _integers(b, 0, b.size(high))


@register("aten.randint_like.low_dtype")
def randint_like_from(b: Builder, x: Value, low: Size, high: Size, **_: Any) -> Value:
    return _integers(b, b.size(low), b.size(high))


@register("aten.random.from")
def random_from(b: Builder, x: Value, low: int, high: int, **_: Any) -> Value:
    return _integers(b, low, high)


@register("aten.random.to")
def random_to(b: Builder, x: Value, high: int, **_: Any) -> Value:
    return _integers(b, 0, high)


@register("aten.randperm.default")
def randperm(b: Builder, n: Size, **_: Any) -> Value:
    drawn = b.emit("jax.random.permutation", b.random_key(), b.size(n))
    return b.new(drawn if b.dtype == torch.int64 else b.emit(".astype", drawn, dtype_argument(b, b.dtype)))


@register("aten.multinomial.default")
def multinomial(b: Builder, weights: Value, count: Size, replacement: bool = False, **_: Any) -> Value:
    given: dict[str, Arg] = {"replacement": True} if replacement else {}
    return b.new(b.emit("ops.multinomial", b.random_key(), b.plain(weights).expr, b.size(count), **given))


@register("aten.binomial.default")
def binomial(b: Builder, count: Value, probability: Value, **_: Any) -> Value:
    return b.new(_emit_draw(b, "binomial", b.plain(count).expr, b.plain(probability).expr, _shape(b)))


refuse(
    "aten._standard_gamma.default aten._sample_dirichlet.default aten.random.default",
    "it draws random numbers that JAX draws differently; make the draw an input of the forward",
)
