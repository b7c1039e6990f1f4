"""Fourier transforms and complex numbers: JAX's functions are PyTorch's."""

from collections.abc import Callable, Sequence

import torch

from jaxensemble.network import Arg
from torch_bridge.layout import Size
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import chosen
from torch_bridge.lowering.promotion import cast
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value

LINES = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
"""Transforms along one dimension."""

PLANES = ("fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn")
"""Transforms over several dimensions."""


def _line(name: str) -> Callable[..., Value]:
    def rule(b: Builder, x: Value, n: int | None = None, dim: int = -1, norm: str | None = None) -> Value:
        options: dict[str, Arg] = {} if n is None else {"n": n}
        options |= {} if dim in (-1, b.value(x).ndim - 1) else {"axis": dim}
        options |= {} if norm in (None, "backward") else {"norm": norm}
        return b.new(b.emit(f"jnp.fft.{name}", b.plain(x).expr, **options))

    return rule


def _plane(name: str) -> Callable[..., Value]:
    def rule(
        b: Builder,
        x: Value,
        s: Sequence[Size] | None = None,
        dim: Sequence[int] | None = None,
        norm: str | None = None,
    ) -> Value:
        value = b.plain(x)
        dims = tuple(dim) if dim is not None else (-2, -1) if name.endswith("2") else chosen(None, value.ndim)
        if s is not None and dim is None:
            dims = tuple(range(value.ndim - len(s), value.ndim))
        options: dict[str, Arg] = {} if s is None else {"s": tuple(b.size(size) for size in s)}
        options |= {"axes": dims} if dims != (-2, -1) or not name.endswith("2") else {}
        options |= {} if norm in (None, "backward") else {"norm": norm}
        return b.new(b.emit(f"jnp.fft.{name}", value.expr, **options))

    return rule


for _name in LINES:
    register(f"aten.fft_{_name}.default")(_line(_name))
for _name in PLANES:
    register(f"aten.fft_{_name}.default")(_plane(_name))


def _shift(name: str) -> Callable[..., Value]:
    def rule(b: Builder, x: Value, dim: Sequence[int] | None = None) -> Value:
        value = b.tidy(x)
        axes = tuple(value.axis(d) for d in chosen(dim, value.ndim))
        return b.laid(b.emit(f"jnp.fft.{name}", value.expr, axes=axes), value.layout)

    return rule


register("aten.fft_fftshift.default")(_shift("fftshift"))
register("aten.fft_ifftshift.default")(_shift("ifftshift"))


@register("aten.complex.default")
def complex_(b: Builder, real: Operand, imag: Operand) -> Value:
    part = torch.float64 if b.dtype == torch.complex128 else torch.float32
    return b.elementwise("ops.complex_of", cast(b, real, part), cast(b, imag, part))


@register("aten.polar.default")
def polar(b: Builder, size: Operand, angle: Operand) -> Value:
    parts = [b.elementwise("*", size, b.elementwise(f"jnp.{part}", angle)) for part in ("cos", "sin")]
    return b.elementwise("ops.complex_of", *parts)


@register("aten.view_as_real.default")
def view_as_real(b: Builder, x: Value) -> Value:
    value = b.plain(x)
    parts = [b.emit("jnp.real", value.expr), b.emit("jnp.imag", value.expr)]
    return b.new(b.emit("jnp.stack", parts, axis=-1))


@register("aten.view_as_complex.default")
def view_as_complex(b: Builder, x: Value) -> Value:
    value = b.plain(x)
    parts = [b.emit("[]", value.expr, (..., k)) for k in range(2)]
    return b.new(b.emit("lax.complex", *parts))
