"""Factors of matrices, eigenvalues and singular values.

The signs of QR are those of LAPACK's reflections, in PyTorch's build and in JAX's. On GPUs, where cuSOLVER replaces
LAPACK, they were not tried. The signs of eigenvectors and singular vectors are each library's own choice, and differ
even on the CPU: `torch_bridge.lowering.signs` refuses forwards that depend on them.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from jaxensemble.network.network import Arg, Ref
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.table import refuse, register
from torch_bridge.lowering.values import Operand, Value, sizes


def result_parts(b: Builder, expr: Ref) -> tuple[Value, ...]:
    """The results of a call that has several, with PyTorch's shapes and dtypes."""
    return tuple(
        b.new(b.emit("[]", expr, k), sizes(part.shape), part.dtype) for k, part in enumerate(b.node.meta["val"])
    )


def check_unused(b: Builder, *names: str, advice: str) -> None:
    """Checks that the last results of an operation, by these names, are not used.

    **Raises:** `UnsupportedError` naming those that are.
    """
    first = len(b.node.meta["val"]) - len(names)
    used = [node.args[1] for node in b.node.users if node.target is operator.getitem and node.users]
    taken = [f"`{name}`" for k, name in enumerate(names) if first + k in used]
    if taken:
        raise b.unsupported(f"{', '.join(taken)} cannot be carried over; {advice}")


_INFO = "XLA gives NaN where LAPACK would report a failure: use torch.isnan of the result"

# Cholesky


@register("aten.linalg_cholesky.default", "aten.cholesky.default")
def cholesky(b: Builder, x: Value, upper: bool = False) -> Value:
    options: dict[str, Arg] = {"upper": True} if upper else {}
    return b.new(b.emit("ops.cholesky", b.plain(x).expr, **options), b.result_shape)


@register("aten.linalg_cholesky_ex.default")
def cholesky_ex(b: Builder, x: Value, *, upper: bool = False, check_errors: bool = False) -> tuple[Value, None]:
    check_unused(b, "info", advice=_INFO)
    return cholesky(b, x, upper), None


@register("aten.cholesky_solve.default")
def cholesky_solve(b: Builder, x: Operand, factor: Operand, upper: bool = False) -> Value:
    return b.new(b.emit("ops.cholesky_solve", b.plain(x).expr, b.plain(factor).expr, *([True] if upper else [])))


@register("aten.cholesky_inverse.default")
def cholesky_inverse(b: Builder, factor: Value, upper: bool = False) -> Value:
    options: dict[str, Arg] = {"upper": True} if upper else {}
    return b.new(b.emit("ops.cholesky_inverse", b.plain(factor).expr, **options))


# QR and Householder reflections


@register("aten.linalg_qr.default")
def qr(b: Builder, x: Value, mode: str = "reduced") -> tuple[Value | Tensor, Value]:
    value = b.plain(x)
    if mode == "r":
        triangle = b.new(b.emit("jnp.linalg.qr", value.expr, mode="r"), sizes(b.node.meta["val"][1].shape))
        return torch.zeros(0, dtype=b.dtype), triangle
    q, r = result_parts(b, b.emit("jnp.linalg.qr", value.expr, **({} if mode == "reduced" else {"mode": mode})))
    return q, r


@register("aten.linalg_householder_product.default", "aten.orgqr.default")
def householder_product(b: Builder, x: Operand, tau: Operand) -> Value:
    return b.new(b.emit("ops.householder_product", b.plain(x).expr, b.plain(tau).expr))


# LU


@register("aten.linalg_lu.default")
def lu(b: Builder, x: Value, *, pivot: bool = True) -> tuple[Value, ...]:
    _check_pivots(b, pivot)
    return result_parts(b, b.emit("ops.lu", b.plain(x).expr))


@register("aten.linalg_lu_factor.default")
def lu_factor(b: Builder, x: Value, *, pivot: bool = True) -> tuple[Value, ...]:
    _check_pivots(b, pivot)
    both = b.emit("ops.lu_factor", b.plain(x).expr)
    factors, pivots = b.node.meta["val"][:2]
    return tuple(
        b.new(b.emit("[]", both, k), sizes(part.shape), part.dtype) for k, part in enumerate((factors, pivots))
    )


@register("aten.linalg_lu_factor_ex.default")
def lu_factor_ex(b: Builder, x: Value, *, pivot: bool = True, check_errors: bool = False) -> tuple[Value | None, ...]:
    check_unused(b, "info", advice=_INFO)
    return (*lu_factor(b, x, pivot=pivot), None)


def _check_pivots(b: Builder, pivot: bool) -> None:
    if not pivot:
        raise b.unsupported("LAPACK and XLA have no LU without pivots; leave `pivot` out")


@register("aten.lu_unpack.default")
def lu_unpack(
    b: Builder, both: Operand, pivots: Operand, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Value, ...]:
    if not unpack_data or not unpack_pivots:
        raise b.unsupported("`unpack_data` and `unpack_pivots` must be true; leave them out, and the results alone")
    return result_parts(b, b.emit("ops.lu_unpack", b.plain(both).expr, b.plain(pivots).expr))


@register("aten.linalg_lu_solve.default")
def lu_solve(
    b: Builder, both: Operand, pivots: Operand, x: Operand, *, left: bool = True, adjoint: bool = False
) -> Value:
    options: dict[str, Arg] = {} if left else {"left": False}
    options |= {"adjoint": True} if adjoint else {}
    return b.new(b.emit("ops.lu_solve", *[b.plain(operand).expr for operand in (both, pivots, x)], **options))


refuse(
    "aten.linalg_ldl_factor.default aten.linalg_ldl_factor_ex.default aten.linalg_ldl_solve.default",
    "XLA has no LDL factors; use torch.linalg.lu_factor and lu_solve, or cholesky where matrices are positive definite",
)

# Eigenvalues and singular values


@register("aten.linalg_eigh.default", "aten._linalg_eigh.default")
def eigh(b: Builder, x: Value, UPLO: str = "L", compute_v: bool = True) -> tuple[Value, ...]:
    return result_parts(b, b.emit("ops.eigh", b.plain(x).expr, **_triangle(UPLO)))


@register("aten.linalg_eigvalsh.default")
def eigvalsh(b: Builder, x: Value, UPLO: str = "L") -> Value:
    return b.new(b.emit("ops.eigvalsh", b.plain(x).expr, **_triangle(UPLO)))


def _triangle(uplo: str) -> dict[str, Arg]:
    return {} if uplo.upper() == "L" else {"lower": False}


@register("aten.linalg_eigvals.default", "aten._linalg_eigvals.default")
def eigvals(b: Builder, x: Value) -> Value:
    return b.new(b.emit("jnp.linalg.eigvals", b.plain(x).expr))


refuse(
    "aten.linalg_eig.default",
    "the signs and phases of eigenvectors of matrices that are not symmetric are PyTorch's own choice, and XLA's "
    "differ; use torch.linalg.eigvals, or torch.linalg.eigh for symmetric matrices",
)


@register("aten.linalg_svd.default", "aten._linalg_svd.default")
def svd(
    b: Builder, x: Value, full_matrices: bool = True, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Value, ...]:
    options: dict[str, Arg] = {} if full_matrices else {"full_matrices": False}
    return result_parts(b, b.emit("ops.svd", b.plain(x).expr, **options))


@register("aten.linalg_svdvals.default")
def svdvals(b: Builder, x: Value, *, driver: str | None = None) -> Value:
    return b.new(b.emit("jnp.linalg.svdvals", b.plain(x).expr))


@register("aten.linalg_pinv.default", "aten.linalg_pinv.rcond_tensor", "aten.pinverse.default")
def pinv_by_ratio(b: Builder, x: Value, rcond: Any = 1e-15, hermitian: bool = False) -> Value:
    return pinv(b, x, rtol=rcond, hermitian=hermitian)


@register("aten.linalg_pinv.atol_rtol_tensor", "aten.linalg_pinv.atol_rtol_float")
def pinv(b: Builder, x: Value, *, atol: Any = None, rtol: Any = None, hermitian: bool = False) -> Value:
    value = b.plain(x)
    if rtol is None and not (isinstance(atol, int | float) and atol > 0):
        sizes = value.shape[-2:]
        if not all(isinstance(size, int) for size in sizes):
            raise b.open_size_error("what counts as zero depends", *sizes)
        rtol = max(map(int, sizes)) * torch.finfo(value.dtype).eps
    limits = {"atol": atol, "rtol": rtol}
    options: dict[str, Arg] = {
        name: b.plain(limit).expr if isinstance(limit, Value | Tensor) else limit
        for name, limit in limits.items()
        if limit is not None
    }
    options |= {"hermitian": True} if hermitian else {}
    return b.new(b.emit("ops.pinv", value.expr, **options))
