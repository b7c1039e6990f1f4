"""Sums, means, products, norms and other reductions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import axis_argument, named_dims, relabel_dims, result_with_dims, settled_value
from torch_bridge.lowering.dtypes import cast
from torch_bridge.lowering.layouts.layout import Group, Layout, atoms_of
from torch_bridge.lowering.table import refuse, register
from torch_bridge.lowering.values import Operand, Value

Dims = int | Sequence[int] | None


def reduce_dims(
    b: Builder,
    target: str,
    x: Operand,
    dims: Dims,
    keepdim: bool,
    *args: Arg,
    dtype: torch.dtype | None = None,
    options: Mapping[str, Arg] | None = None,
) -> Value:
    """A reduction that does not depend on the order of elements: `target(x, *args, axis=..., **options)`.

    A dimension that is stored in several axes is reduced over these axes. Nothing is rearranged for that.
    """
    value, axes = _axes(b, settled_value(b, x), named_dims(dims, settled_value(b, x).ndim))
    gone = set(named_dims(dims, value.ndim))
    whole = len(gone) == value.ndim and not keepdim
    rank = len(value.layout.axes)
    where: dict[str, Arg] = {}
    if not whole:
        where = {"axis": axis_argument(axes[0], rank) if len(axes) == 1 else axes}
        where |= {"keepdims": True} if keepdim else {}
    expr = b.emit(target, value.expr, *args, **where, **(options or {}))
    if whole:
        return b.new(expr, (), dtype)
    empty: list[Group] = [()] if keepdim else []
    new_dims = [part for k, group in enumerate(value.layout.dims) for part in (empty if k in gone else [group])]
    new_axes = [part for k, group in enumerate(value.layout.axes) for part in (empty if k in axes else [group])]
    return b.laid(expr, Layout(tuple(new_dims), tuple(new_axes)), dtype)


def _axes(b: Builder, value: Value, dims: Sequence[int]) -> tuple[Value, tuple[int, ...]]:
    """The value, arranged if need be so that some axes hold just these dimensions, and these axes."""
    atoms = set(atoms_of([value.layout.dims[dim] for dim in dims]))
    if atoms and all(set(axis) <= atoms or not set(axis) & atoms for axis in value.layout.axes):
        return value, tuple(k for k, axis in enumerate(value.layout.axes) if set(axis) & atoms)
    tidy = b.tidy(value)
    return tidy, tuple(sorted(tidy.axis(dim) for dim in dims))


# Sums and extremes


def _sum(target: str) -> Callable[..., Value]:
    """The rule of a reduction that PyTorch computes in the dtype of the result."""

    def rule(
        b: Builder, x: Value, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> Value:
        return reduce_dims(b, target, cast_for_sum(b, x), dim, keepdim)

    return rule


def cast_for_sum(b: Builder, x: Any) -> Value:
    """The operand in the dtype of the result. JAX's sums of integers and truth values have this dtype anyway."""
    widened = b.dtype == torch.int64 and x.dtype in (torch.bool, torch.int32, torch.int16, torch.int8)
    return b.value(x if widened else cast(b, x, b.dtype))


register("aten.sum.dim_IntList")(_sum("jnp.sum"))
register("aten.mean.dim")(_sum("jnp.mean"))
register("aten.prod.dim_int")(_sum("jnp.prod"))
register("aten.nansum.default")(_sum("jnp.nansum"))
register("aten.nanmean.default")(_sum("jnp.nanmean"))


def _sum_of_all(target: str) -> Callable[..., Value]:
    """The rule of such a reduction over all dimensions."""
    return lambda b, x, dtype=None: reduce_dims(b, target, cast_for_sum(b, x), None, False)


register("aten.sum.default")(_sum_of_all("jnp.sum"))
register("aten.mean.default")(_sum_of_all("jnp.mean"))
register("aten.prod.default")(_sum_of_all("jnp.prod"))


def _plain_reduction(target: str) -> Callable[..., Value]:
    """The rule of a reduction that keeps the dtype."""
    return lambda b, x, dim=None, keepdim=False: reduce_dims(b, target, x, dim, keepdim)


register("aten.amax.default")(_plain_reduction("jnp.max"))
register("aten.amin.default")(_plain_reduction("jnp.min"))
register("aten.max.default")(_plain_reduction("jnp.max"))
register("aten.min.default")(_plain_reduction("jnp.min"))
register("aten.logsumexp.default")(
    lambda b, x, dim, keepdim=False: reduce_dims(b, "jax.nn.logsumexp", cast_for_sum(b, x), dim, keepdim)
)
register("aten.count_nonzero.default", "aten.count_nonzero.dim_IntList")(
    lambda b, x, dim=None: reduce_dims(b, "jnp.count_nonzero", x, dim, False)
)


@register("aten.any.default", "aten.any.dim", "aten.any.dims")
def any_(b: Builder, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return cast(b, reduce_dims(b, "jnp.any", x, dim, keepdim, dtype=torch.bool), b.dtype)


@register("aten.all.default", "aten.all.dim", "aten.all.dims")
def all_(b: Builder, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return cast(b, reduce_dims(b, "jnp.all", x, dim, keepdim, dtype=torch.bool), b.dtype)


@register("aten.aminmax.default")
def aminmax(b: Builder, x: Value, *, dim: int | None = None, keepdim: bool = False) -> tuple[Value, Value]:
    return reduce_dims(b, "jnp.min", x, dim, keepdim), reduce_dims(b, "jnp.max", x, dim, keepdim)


# Spread


def variance(b: Builder, x: Value, dim: Dims, keepdim: bool, correction: float) -> Value:
    options: dict[str, Arg] = {"correction": correction} if correction else {}
    return reduce_dims(b, "jnp.var", _check_correction(b, x, dim, correction), dim, keepdim, options=options)


def deviation(b: Builder, x: Value, dim: Dims, keepdim: bool, correction: float) -> Value:
    options: dict[str, Arg] = {"correction": correction} if correction != 1 else {}
    return reduce_dims(b, "ops.std", _check_correction(b, x, dim, correction), dim, keepdim, options=options)


def _check_correction(b: Builder, x: Value, dim: Dims, correction: float) -> Value:
    """Checks that elements are left after the correction: else PyTorch divides by zero, and JAX gives NaN.

    **Raises:** `UnsupportedError` if none are left.
    """
    value = settled_value(b, x)
    count = math.prod((value.shape[k] for k in named_dims(dim, value.ndim)), start=1)
    if isinstance(count, int) and 1 < count <= correction:
        raise b.unsupported(f"the correction must be less than the number of elements, {count}; got {correction}")
    return value


def _add_mean(spread: Callable[..., Value]) -> Callable[..., tuple[Value, Value]]:
    """A function of both the spread and the mean."""

    def both(b: Builder, x: Value, dim: Dims, keepdim: bool, correction: float) -> tuple[Value, Value]:
        value = settled_value(b, x)
        return spread(b, value, dim, keepdim, correction), reduce_dims(
            b, "jnp.mean", value, dim, keepdim, dtype=x.dtype
        )

    return both


def _spread_rules(name: str, spread: Callable[..., Any]) -> None:
    """Registers the three ways in which PyTorch takes the correction."""

    @register(f"aten.{name}.default")
    def of_all(b: Builder, x: Value, unbiased: bool = True) -> Any:
        return spread(b, x, None, False, int(unbiased))

    @register(f"aten.{name}.dim")
    def over(b: Builder, x: Value, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> Any:
        return spread(b, x, dim, keepdim, int(unbiased))

    @register(f"aten.{name}.correction")
    def corrected(b: Builder, x: Value, dim: Dims = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        return spread(b, x, dim, keepdim, 1 if correction is None else correction)


_spread_rules("var", variance)
_spread_rules("std", deviation)
_spread_rules("var_mean", _add_mean(variance))
_spread_rules("std_mean", _add_mean(deviation))


# Norms


@register("aten.linalg_vector_norm.default")
def vector_norm(
    b: Builder, x: Value, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Value:
    value = x if x.dtype.is_complex else cast_for_sum(b, x)  # the result is real
    return reduce_dims(b, "ops.vector_norm", value, dim, keepdim, *([] if ord == 2 else [ord]))


@register("aten.norm.Scalar", "aten.norm.ScalarOpt_dim", "aten.frobenius_norm.dim")
def norm(b: Builder, x: Value, p: Any = 2, dim: Dims = None, keepdim: bool = False) -> Value:
    return vector_norm(b, x, 2 if p is None else p, dim, keepdim)


@register("aten.linalg_norm.default", "aten.linalg_norm.ord_str")
def linalg_norm(
    b: Builder, x: Value, ord: Any = None, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Value:
    rank = settled_value(b, x).ndim
    dims = tuple(range(rank)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if ord is None or len(dims) == 1:
        return vector_norm(b, x, 2 if ord is None else ord, dims, keepdim)
    return matrix_norm(b, x, ord, dims, keepdim)


@register("aten.linalg_matrix_norm.default", "aten.linalg_matrix_norm.str_ord")
def matrix_norm(
    b: Builder,
    x: Value,
    ord: Any = "fro",
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    value = b.value(x) if x.dtype.is_complex else cast_for_sum(b, x)
    rows, columns = (d % value.ndim for d in dim)
    if ord == "fro":
        return vector_norm(b, value, 2, (rows, columns), keepdim)
    if ord in (2, -2, "nuc"):
        tidy = b.tidy(value)
        axes = (tidy.axis(rows), tidy.axis(columns))
        expr = b.emit("jnp.linalg.norm", tidy.expr, ord=ord, axis=axes, keepdims=True)
        result = result_with_dims(b, tidy, expr, {rows: (), columns: ()})
    else:
        inner, outer = (rows, columns) if abs(ord) == 1 else (columns, rows)
        sums = reduce_dims(b, "jnp.sum", b.elementwise("jnp.abs", value), inner, True)
        result = reduce_dims(b, "jnp.max" if ord > 0 else "jnp.min", sums, outer, True)
    return keep_dims(result, (rows, columns), keepdim)


def keep_dims(value: Value, dims: Sequence[int], keepdim: bool) -> Value:
    """A result with its reduced dimensions, which have size one, or without them."""
    return value if keepdim else relabel_dims(value, [g for k, g in enumerate(value.layout.dims) if k not in dims])


# These assertions decide by values. From PyTorch 2.15 on, distributions validate their arguments by one.
refuse(
    "aten._is_all_true.default aten._is_any_true.default",
    "what follows decides by values, and XLA needs the same operations for all values; leave the assertion out of the "
    "forward; distributions take validate_args=False",
)
