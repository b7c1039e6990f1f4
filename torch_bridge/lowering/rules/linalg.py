"""Linear algebra: equations, inverses, determinants, powers, distances.

Matrices are stored as PyTorch sees them. PyTorch raises an error for a singular matrix. A compiled program cannot: it
gives infinities and NaNs.
"""

import math
from collections.abc import Callable, Sequence

import torch

from jaxensemble.network.network import Arg, Ref
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import axis_of, relabel_dims, settled_value, stored_order
from torch_bridge.lowering.rules.factors import check_unused, result_parts
from torch_bridge.lowering.rules.index import index_select
from torch_bridge.lowering.rules.reduce import vector_norm
from torch_bridge.lowering.rules.shape import expand_to, reshape_to
from torch_bridge.lowering.table import refuse, register
from torch_bridge.lowering.values import Operand, Value, sizes


def _of_matrices(target: str) -> Callable[..., Value]:
    """The rule of a function of matrices."""

    def rule(b: Builder, x: Value) -> Value:
        if 0 in b.value(x).shape:
            raise b.unsupported("a matrix without elements; leave it out")
        return b.new(b.emit(target, b.plain(x).expr))

    return rule


register("aten.linalg_det.default", "aten.det.default")(_of_matrices("jnp.linalg.det"))
register("aten.linalg_inv.default", "aten.inverse.default")(_of_matrices("jnp.linalg.inv"))
register("aten.matrix_exp.default", "aten.linalg_matrix_exp.default")(_of_matrices("jax.scipy.linalg.expm"))
register("aten.trace.default")(_of_matrices("jnp.trace"))


@register("aten.linalg_inv_ex.default")
def inv_ex(b: Builder, x: Value, *, check_errors: bool = False) -> tuple[Value, None]:
    check_unused(b, "info", advice=_INFO)
    return b.new(b.emit("jnp.linalg.inv", b.plain(x).expr)), None


_INFO = "XLA gives infinities and NaNs where a matrix is singular: use torch.isfinite of the result"


@register("aten.linalg_slogdet.default", "aten.slogdet.default")
def slogdet(b: Builder, x: Value) -> tuple[Value, ...]:
    return result_parts(b, b.emit("jnp.linalg.slogdet", b.plain(x).expr))


@register("aten.logdet.default")
def logdet(b: Builder, x: Value) -> Value:
    both = b.emit("jnp.linalg.slogdet", b.plain(x).expr)
    sign, size = b.new(b.emit("[]", both, 0)), b.new(b.emit("[]", both, 1))
    if b.dtype.is_complex:
        return b.elementwise("+", b.elementwise("jnp.log", sign), size)
    return b.elementwise("jnp.where", b.elementwise("<", sign, 0, dtype=torch.bool), math.nan, size)


@register("aten.linalg_matrix_power.default", "aten.matrix_power.default")
def matrix_power(b: Builder, x: Value, n: int) -> Value:
    return b.new(b.emit("jnp.linalg.matrix_power", b.plain(x).expr, n))


@register("aten.linalg_vander.default")
def vander(b: Builder, x: Value, *, N: int | None = None) -> Value:
    value = settled_value(b, x)
    value = b.plain(value if value.ndim else relabel_dims(value, ((),)))
    return b.new(b.emit("ops.vander", value.expr, b.size(b.result_shape[-1])))


# Equations


@register("aten.linalg_solve.default")
def solve(b: Builder, x: Operand, y: Operand, *, left: bool = True) -> Value:
    matrices, sides = b.value(x), b.value(y)
    if not _is_vectors(matrices, sides):
        return b.new(_solve(b, matrices, sides, left))
    sides = relabel_dims(b.plain(sides), (*b.plain(sides).layout.dims, ()))
    result = b.new(_solve(b, matrices, sides, left), (*b.result_shape, 1))
    return relabel_dims(result, result.layout.dims[:-1])


@register("aten.linalg_solve_ex.default")
def solve_ex(
    b: Builder, x: Operand, y: Operand, *, left: bool = True, check_errors: bool = False
) -> tuple[Value, None]:
    check_unused(b, "info", advice=_INFO)
    return solve(b, x, y, left=left), None


def _is_vectors(matrices: Value, sides: Value) -> bool:
    """Returns whether right-hand sides are vectors, `[..., n]`, rather than matrices, by PyTorch's criterion."""
    return sides.ndim == 1 or (sides.ndim == matrices.ndim - 1 and sides.shape == matrices.shape[:-1])


def _solve(b: Builder, matrices: Value, sides: Value, left: bool) -> Ref:
    """A call that solves equations from the left or from the right."""
    if left:
        return b.emit("jnp.linalg.solve", b.plain(matrices).expr, b.plain(sides).expr)
    swapped = [
        b.plain(relabel_dims(b.plain(v), (*v.layout.dims[:-2], *v.layout.dims[:-3:-1]))) for v in (matrices, sides)
    ]
    return b.emit("jnp.matrix_transpose", b.emit("jnp.linalg.solve", *[value.expr for value in swapped]))


@register("aten.linalg_tensorinv.default")
def tensorinv(b: Builder, x: Value, ind: int = 2) -> Value:
    return b.new(b.emit("jnp.linalg.tensorinv", b.plain(x).expr, *([] if ind == 2 else [ind])))


@register("aten.linalg_tensorsolve.default")
def tensorsolve(b: Builder, x: Operand, y: Operand, dims: Sequence[int] | None = None) -> Value:
    value = settled_value(b, x)
    last = [dim % value.ndim for dim in dims or ()]
    order = [k for k in range(value.ndim) if k not in last] + last
    value = b.plain(relabel_dims(value, [value.layout.dims[k] for k in order]))
    sides = b.plain(reshape_to(b, b.plain(y), value.shape[: b.value(y).ndim]))  # PyTorch compares sizes alone
    return b.new(b.emit("jnp.linalg.tensorsolve", value.expr, sides.expr))


refuse(
    "aten.linalg_lstsq.default",
    "the size of its residuals depends on the rank; use torch.linalg.pinv(a) @ b, the solution of least norm",
)


@register("aten.linalg_solve_triangular.default")
def solve_triangular(
    b: Builder, x: Operand, y: Operand, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Value:
    options: dict[str, Arg] = {} if upper else {"lower": True}
    options |= {"left": False} if not left else {}
    options |= {"unit_diagonal": True} if unitriangular else {}
    return b.new(b.emit("ops.solve_triangular", b.plain(x).expr, b.plain(y).expr, **options))


@register("aten.triangular_solve.default")
def triangular_solve(
    b: Builder,
    y: Operand,
    x: Operand,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> tuple[Value, ...]:
    options: dict[str, Arg] = {} if upper else {"lower": True}
    options |= {"transposed": True} if transpose else {}
    options |= {"unit_diagonal": True} if unitriangular else {}
    solution = b.emit("ops.solve_triangular", b.plain(x).expr, b.plain(y).expr, **options)
    return b.new(solution), b.plain(expand_to(b, x, sizes(b.node.meta["val"][1].shape)))


@register("aten.linalg_multi_dot.default", "aten.chain_matmul.default")
def multi_dot(b: Builder, tensors: Sequence[Operand]) -> Value:
    return b.new(b.emit("jnp.linalg.multi_dot", [b.plain(tensor).expr for tensor in tensors]))


@register("aten.kron.default")
def kron(b: Builder, x: Operand, y: Operand) -> Value:
    return b.new(b.emit("jnp.kron", b.plain(x).expr, b.plain(y).expr))


@register("aten.linalg_cross.default", "aten.cross.default")
def cross(b: Builder, x: Operand, y: Operand, dim: int | None = -1) -> Value:
    (left, right), _ = b.align(*[expand_to(b, operand, b.result_shape) for operand in (x, y)])
    dim = next(k for k, size in enumerate(left.shape) if size == 3) if dim is None else dim
    tidy = b.tidy(left)
    other = b.arrange(right, tuple(right.layout.dims[k] for k in stored_order(tidy)))
    return b.laid(b.emit("jnp.cross", tidy.expr, other.expr, axis=axis_of(tidy, dim)), tidy.layout)


# Distances


@register("aten.cdist.default")
def cdist(b: Builder, x: Operand, y: Operand, p: float = 2.0, compute_mode: int | None = None) -> Value:
    args: list[Arg] = [b.plain(x).expr, b.plain(y).expr]
    return b.new(b.emit("ops.pairwise_distances", *args, *([] if p == 2 else [p])))


@register("aten.pdist.default", "aten._pdist_forward.default")
def pdist(b: Builder, x: Operand, p: float = 2.0) -> Value:
    value = b.plain(x)
    count = value.shape[0]
    if not isinstance(count, int):
        raise b.open_size_error("the number of pairs depends", count)
    first, second = (index_select(b, value, 0, places) for places in torch.triu_indices(count, count, 1))
    return vector_norm(b, b.elementwise("-", first, second), p, -1)


@register("aten.dist.default")
def dist(b: Builder, x: Operand, y: Operand, p: float = 2) -> Value:
    return vector_norm(b, b.elementwise("-", x, y), p)


@register("aten.renorm.default")
def renorm(b: Builder, x: Operand, p: float, dim: int, maxnorm: float) -> Value:
    value = b.tidy(x)
    return b.laid(b.emit("ops.renormalised", value.expr, p, axis_of(value, dim), maxnorm), value.layout)
