"""Fourier transforms."""

from collections.abc import Callable, Sequence

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import named_dims
from torch_bridge.lowering.layouts.layout import Size
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value

LINES = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
"""Transforms along one dimension."""

PLANES = ("fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn")
"""Transforms over several dimensions."""


def _line(name: str) -> Callable[..., Value]:
    """The rule of a transform along one dimension."""

    def rule(b: Builder, x: Value, n: int | None = None, dim: int = -1, norm: str | None = None) -> Value:
        options: dict[str, Arg] = {} if n is None else {"n": b.size(n)}
        options |= {} if dim in (-1, b.value(x).ndim - 1) else {"axis": dim}
        options |= {} if norm in (None, "backward") else {"norm": norm}
        return b.new(b.emit(f"jnp.fft.{name}", b.plain(x).expr, **options))

    return rule


def _plane(name: str) -> Callable[..., Value]:
    """The rule of a transform over several dimensions."""

    def rule(
        b: Builder,
        x: Value,
        s: Sequence[Size] | None = None,
        dim: Sequence[int] | None = None,
        norm: str | None = None,
    ) -> Value:
        value = b.plain(x)
        dims = tuple(dim) if dim is not None else (-2, -1) if name.endswith("2") else named_dims(None, value.ndim)
        if s is not None and dim is None and not name.endswith("2"):
            dims = tuple(range(value.ndim - len(s), value.ndim))
        if s is not None:
            s = tuple(value.shape[d] if size == -1 else size for size, d in zip(s, dims, strict=True))
        return _transform(b, name, value, s, dims, norm)

    return rule


def _transform(
    b: Builder, name: str, value: Value, s: Sequence[Size] | None, dims: Sequence[int], norm: str | None
) -> Value:
    """A call of a transform over several dimensions."""
    options: dict[str, Arg] = {} if s is None else {"s": tuple(b.size(size) for size in s)}
    options |= {"axes": tuple(dims)} if tuple(dims) != (-2, -1) or not name.endswith("2") else {}
    options |= {} if norm in (None, "backward") else {"norm": norm}
    # PyTorch's `fft2` may have one dimension.
    function = name if len(dims) == 2 or not name.endswith("2") else f"{name[:-1]}n"
    return b.new(b.emit(f"jnp.fft.{function}", value.expr, **options))


for _name in LINES:
    register(f"aten.fft_{_name}.default")(_line(_name))
for _name in PLANES:
    register(f"aten.fft_{_name}.default")(_plane(_name))


# Operations that PyTorch makes the others of


FORWARD = ("backward", "ortho", "forward")
"""The norms by PyTorch's numbers, for a forward transform: the divisor is 1, the root of the size, or the size."""

BACK = FORWARD[::-1]


@register("aten._fft_c2c.default")
def complex_to_complex(b: Builder, x: Value, dim: Sequence[int], normalization: int, forward: bool) -> Value:
    name, norms = ("fftn", FORWARD) if forward else ("ifftn", BACK)
    return _transform(b, name, b.plain(x), None, dim, norms[normalization])


@register("aten._fft_r2c.default")
def real_to_complex(b: Builder, x: Value, dim: Sequence[int], normalization: int, onesided: bool) -> Value:
    return _transform(b, "rfftn" if onesided else "fftn", b.plain(x), None, dim, FORWARD[normalization])


@register("aten._fft_c2r.default")
def complex_to_real(b: Builder, x: Value, dim: Sequence[int], normalization: int, last_dim_size: Size) -> Value:
    value = b.plain(x)
    s = (*(value.shape[d] for d in dim[:-1]), last_dim_size)
    return _transform(b, "irfftn", value, s, dim, BACK[normalization])


def _shift(name: str) -> Callable[..., Value]:
    """The rule of a shift of zero frequencies."""

    def rule(b: Builder, x: Value, dim: Sequence[int] | None = None) -> Value:
        value = b.tidy(x)
        axes = tuple(value.axis(d) for d in named_dims(dim, value.ndim))
        return b.laid(b.emit(f"jnp.fft.{name}", value.expr, axes=axes), value.layout)

    return rule


register("aten.fft_fftshift.default")(_shift("fftshift"))
register("aten.fft_ifftshift.default")(_shift("ifftshift"))
