"""Tensors made from sizes.

Only those whose sizes depend on the batch size have rules: all others are constants.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import settled_value, shape_argument
from torch_bridge.lowering.dtypes import dtype_argument
from torch_bridge.lowering.layouts.layout import Size
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value, size


def _full(b: Builder, target: str, shape: Sequence[Size], *args: Arg) -> Value:
    """A call that fills a shape."""
    return b.new(b.emit(target, shape_argument(b, shape), *args, dtype=dtype_argument(b, b.dtype)), shape)


def _full_rule(target: str) -> Callable[..., Value]:
    """A rule for `zeros` and the like."""
    return lambda b, shape, **_: _full(b, target, shape)


def _new_full_rule(target: str) -> Callable[..., Value]:
    """A rule for `new_zeros` and the like."""
    return lambda b, x, shape, **_: _full(b, target, shape)


register("aten.zeros.default", "aten.empty.memory_format")(_full_rule("jnp.zeros"))
register("aten.ones.default")(_full_rule("jnp.ones"))
register("aten.new_zeros.default", "aten.new_empty.default")(_new_full_rule("jnp.zeros"))
register("aten.new_ones.default")(_new_full_rule("jnp.ones"))


@register("aten.full.default")
def full(b: Builder, size: Sequence[Size], fill_value: Any, **_: Any) -> Value:
    return _full(b, "jnp.full", size, fill_value)


@register("aten.new_full.default")
def new_full(b: Builder, x: Value, size: Sequence[Size], fill_value: Any, **_: Any) -> Value:
    return _full(b, "jnp.full", size, fill_value)


def _like_rule(target: str) -> Callable[..., Value]:
    """A rule for `zeros_like` and the like."""

    def rule(b: Builder, x: Value, *args: Any, **_: Any) -> Value:
        value = settled_value(b, x)
        options: dict[str, Arg] = {} if value.dtype == b.dtype else {"dtype": dtype_argument(b, b.dtype)}
        return b.laid(b.emit(target, value.expr, *args, **options), value.layout)

    return rule


register("aten.zeros_like.default", "aten.empty_like.default")(_like_rule("jnp.zeros_like"))
register("aten.ones_like.default")(_like_rule("jnp.ones_like"))
register("aten.full_like.default")(_like_rule("jnp.full_like"))


@register("aten.arange.default")
def arange(b: Builder, end: Any, **_: Any) -> Value:
    return arange_from(b, 0, end)


@register("aten.arange.start", "aten.arange.start_step")
def arange_from(b: Builder, start: Any, end: Any, step: Any = 1, **_: Any) -> Value:
    bounds: list[Arg] = [entry if isinstance(entry, float) else b.size(entry) for entry in (start, end, step)]
    bounds = bounds[:2] if step == 1 else bounds
    bounds = bounds[1:] if start == 0 and step == 1 else bounds
    options: dict[str, Arg] = {} if b.dtype == torch.int64 else {"dtype": dtype_argument(b, b.dtype)}
    return b.new(b.emit("jnp.arange", *bounds, **options))


@register("torch_bridge.linspace.default")
def linspace(b: Builder, start: Any, end: Any, steps: Any, **_: Any) -> Value:
    """Evenly spaced numbers, whose count depends on the batch size."""
    bounds = [b.number(entry) for entry in (start, end)]
    return b.new(b.emit("ops.linspace", *bounds, b.size(steps), dtype=dtype_argument(b, b.dtype)))


@register("aten.eye.default")
def eye(b: Builder, n: Size, **_: Any) -> Value:
    return b.new(b.emit("jnp.eye", b.size(n), dtype=dtype_argument(b, b.dtype)))


@register("aten.eye.m")
def eye_of(b: Builder, n: Size, m: Size, **_: Any) -> Value:
    return b.new(b.emit("jnp.eye", b.size(n), b.size(m), dtype=dtype_argument(b, b.dtype)))


@register("aten.scalar_tensor.default")
def scalar_tensor(b: Builder, value: Any, **_: Any) -> Value:
    """A number that depends on the batch size."""
    return b.new(b.emit("jnp.asarray", b.size(size(value)), dtype=dtype_argument(b, b.dtype)), ())
