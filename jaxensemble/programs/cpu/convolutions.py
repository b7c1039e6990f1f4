"""Convolutions in the form that suits a device: built in, or as dot products and multiply-adds.

All forms compute the same sums; they differ in how fast XLA runs them. `jax.vmap` over the kernels of several members
turns a built-in convolution into a grouped one, which XLA runs slowly on CPUs; dot products stay fast. Forms are
chosen for a whole program, whether Flax's layers, functions or users wrote its convolutions.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Form = Literal["built-in", "grouped", "shifted", "im2col"]
FORMS: tuple[Form, ...] = ("built-in", "grouped", "shifted", "im2col")


CACHED = 1 << 15
"""Weights of a grouped convolution that are read again for every pixel: beyond this they come from slower caches."""


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    choose: Callable[["ConvolutionSizes"], Form],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` in the form that `choose` names; to rounding the same numbers, and gradients.

    Channels-last arrays only: `[N, spatial..., C]` and kernels `[spatial..., C // groups, features]`. Anything else,
    and whatever a form does not cover, is run by `jax.lax` itself.

    >>> x, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
    >>> numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    >>> y = convolution(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, choose=lambda sizes: "im2col")
    >>> y.shape, float(y[0, 2, 2, 0])
    ((2, 5, 5, 4), 27.0)
    """
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    sizes = sizes_of(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        out_sharding=out_sharding,
    )
    form = "built-in" if sizes is None else choose(sizes)
    if sizes is None or form == "built-in":
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            **options,
            out_sharding=out_sharding,
        )
    dtype = preferred_element_type or lhs.dtype
    if dtype in (jnp.bfloat16, jnp.float16):
        options["preferred_element_type"] = jnp.float32  # the sums; XLA's own convolutions round once, too
    return _FORMS[form](sizes, lhs, rhs, options).astype(dtype)


class ConvolutionSizes:
    """The sizes of one channels-last convolution."""

    def __init__(
        self,
        shape: Sequence[int],
        kernel: Sequence[int],
        strides: Sequence[int],
        pads: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
    ):
        self.batch, *self.spatial, self.channels = shape
        *self.window, self.depth, self.features = kernel
        self.strides, self.pads, self.dilation, self.groups = tuple(strides), tuple(pads), tuple(dilation), groups
        self.taps = math.prod(self.window)
        self.out = tuple(
            (size + low + high - (width - 1) * dilated - 1) // stride + 1
            for size, (low, high), width, dilated, stride in zip(
                self.spatial, self.pads, self.window, self.dilation, self.strides, strict=True
            )
        )

    @property
    def has_narrow_groups(self) -> bool:
        """Returns whether groups are too narrow for products of matrices, and all weights fit into a core's cache."""
        return self.groups > 1 and (self.depth == 1 or self.taps * self.depth * self.features <= CACHED)

    @property
    def is_strided(self) -> bool:
        return any(stride > 1 for stride in self.strides)


def form_under_vmap(sizes: ConvolutionSizes) -> Form:
    """The form that CPUs run fastest under `jax.vmap` over kernels. `make bench-lowering` measures all forms."""
    if sizes.groups > 1:
        return _form_of_groups(sizes)
    if sizes.taps == 1 or sizes.is_strided or sizes.channels < 16 or math.prod(sizes.out) <= 4:
        return "im2col"
    return "shifted"


def form_alone(sizes: ConvolutionSizes) -> Form:
    """The form that CPUs run fastest with one kernel."""
    if sizes.groups > 1:
        return _form_of_groups(sizes)
    return "im2col" if sizes.taps == 1 or math.prod(sizes.out) <= 4 else "built-in"


def form_of_products(sizes: ConvolutionSizes) -> Form:
    """Products of matrices, whose gradients are such products; narrow groups stay multiply-adds."""
    if sizes.groups > 1:
        return _form_of_groups(sizes)
    return "im2col"


def _form_of_groups(sizes: ConvolutionSizes) -> Form:
    return "grouped" if sizes.has_narrow_groups else "built-in"


convolution_alone = functools.partial(convolution, choose=form_alone)
convolution_under_vmap = functools.partial(convolution, choose=form_under_vmap)
convolution_of_products = functools.partial(convolution, choose=form_of_products)


def sizes_of(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    out_sharding: Any = None,
    **_: Any,
) -> ConvolutionSizes | None:
    """The sizes of a channels-last convolution of an input that is not dilated; None for any other."""
    if batch_group_count > 1 or out_sharding is not None:
        return None
    n = lhs.ndim
    last = lax.ConvDimensionNumbers(
        (0, n - 1, *range(1, n - 1)), (n - 1, n - 2, *range(n - 2)), (0, n - 1, *range(1, n - 1))
    )
    if dimension_numbers != last or any(d != 1 for d in lhs_dilation or ()) or 0 in (*lhs.shape, *rhs.shape):
        return None
    dilation = rhs_dilation or (1,) * (n - 2)
    if isinstance(padding, str):
        window = [(width - 1) * d + 1 for width, d in zip(rhs.shape, dilation, strict=False)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], window, window_strides, padding)
    if any(low < 0 or high < 0 for low, high in padding):
        return None
    sizes = ConvolutionSizes(
        lhs.shape, rhs.shape, window_strides, [(low, high) for low, high in padding], dilation, feature_group_count
    )
    return sizes if all(size > 0 for size in sizes.out) else None


def _shifts(sizes: ConvolutionSizes, lhs: jax.Array) -> Iterator[jax.Array]:
    """The part of the padded input that each tap of the kernel reads, in order: `[N, out..., C]`."""
    padded = lhs
    if any(low or high for low, high in sizes.pads):
        # A barrier, or XLA would pad again within every tap.
        padded = lax.optimization_barrier(
            lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *((*p, 0) for p in sizes.pads), (0, 0, 0)])
        )
    for tap in itertools.product(*map(range, sizes.window)):
        start = [position * dilated for position, dilated in zip(tap, sizes.dilation, strict=True)]
        limit = [
            first + (size - 1) * step + 1 for first, size, step in zip(start, sizes.out, sizes.strides, strict=True)
        ]
        yield lax.slice(padded, (0, *start, 0), (sizes.batch, *limit, sizes.channels), (1, *sizes.strides, 1))


def _shifted(sizes: ConvolutionSizes, lhs: jax.Array, rhs: jax.Array, options: dict[str, Any]) -> jax.Array:
    """One dot product a tap, summed."""
    kernel = rhs.reshape(sizes.taps, sizes.depth, sizes.features)
    taps = [lax.slice_in_dim(kernel, k, k + 1) for k in range(sizes.taps)]  # indexing would be a gather under vmap
    parts = _shifts(sizes, lhs)
    return functools.reduce(jnp.add, (_dot(sizes, part, tap, options) for part, tap in zip(parts, taps, strict=True)))


def _im2col(sizes: ConvolutionSizes, lhs: jax.Array, rhs: jax.Array, options: dict[str, Any]) -> jax.Array:
    """One dot product with the parts that all taps read, side by side."""
    parts = [part.reshape(*part.shape[:-1], sizes.groups, sizes.depth) for part in _shifts(sizes, lhs)]
    columns = jnp.concatenate(parts, axis=-1)
    return _dot(sizes, columns.reshape(*columns.shape[:-2], -1), rhs.reshape(sizes.taps, sizes.depth, -1), options)


def _dot(sizes: ConvolutionSizes, columns: jax.Array, kernel: jax.Array, options: dict[str, Any]) -> jax.Array:
    """`[..., groups * taps * depth]` by `[taps, depth, features]`, group by group."""
    if sizes.groups == 1:
        flat = columns.reshape(-1, columns.shape[-1])  # of more axes, the gradient's product would be transposed first
        y = lax.dot_general(flat, kernel.reshape(-1, sizes.features), (((1,), (0,)), ((), ())), **options)
        return y.reshape(*columns.shape[:-1], sizes.features)
    columns = columns.reshape(*columns.shape[:-1], sizes.groups, -1)
    kernel = kernel.reshape(columns.shape[-1], sizes.groups, -1)
    return jnp.einsum("...gi,igo->...go", columns, kernel, **options).reshape(*columns.shape[:-2], sizes.features)


def _grouped(sizes: ConvolutionSizes, lhs: jax.Array, rhs: jax.Array, options: dict[str, Any]) -> jax.Array:
    """One multiplication for each tap and each input channel of a group, summed; groups are the last axis."""
    dtype = options["preferred_element_type"]
    features = sizes.features // sizes.groups
    x = jnp.swapaxes(lhs.reshape(*lhs.shape[:-1], sizes.groups, sizes.depth), -2, -1)
    kernel = jnp.swapaxes(rhs.reshape(sizes.taps, sizes.depth, sizes.groups, features), -2, -1)
    terms = []
    for tap, part in enumerate(_shifts(sizes, x.reshape(lhs.shape))):
        part = part.reshape(*part.shape[:-1], sizes.depth, 1, sizes.groups)
        part = part if dtype is None else part.astype(dtype)
        for k in range(sizes.depth):  # slices; indexing would be a gather under vmap
            weights = lax.index_in_dim(lax.index_in_dim(kernel, tap, keepdims=False), k, keepdims=False)
            terms.append(lax.index_in_dim(part, k, part.ndim - 3, keepdims=False) * weights)
    y = jnp.swapaxes(functools.reduce(jnp.add, terms), -2, -1)
    return y.reshape(*y.shape[:-2], sizes.features)


_FORMS: dict[Form, Callable[[ConvolutionSizes, jax.Array, jax.Array, dict[str, Any]], jax.Array]] = {
    "grouped": _grouped,
    "shifted": _shifted,
    "im2col": _im2col,
}
