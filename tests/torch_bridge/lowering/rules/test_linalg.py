"""`torch.linalg`: determinants, equations, factors and norms, of many matrices at once; signs are those of LAPACK."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import Fn, assert_ports
from torch_bridge.lowering.convert import convert
from torch_bridge.porting.port import to_flax

linalg: Any = torch.linalg


def square(x: Tensor) -> Tensor:
    """Matrices that are neither symmetric nor near a singular one."""
    return x[..., :4] + 3 * torch.eye(4, dtype=x.dtype)


def positive(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(x.shape[-2], dtype=x.dtype)


def skewed(x: Tensor) -> Tensor:
    """Positive definite by either triangle alone; the two are not each other's mirror images."""
    return positive(x) + 0.1 * x[..., :4].triu(1)


def function_of(values: Tensor, vectors: Tensor) -> Tensor:
    """A function of a matrix, by its eigenvalues."""
    return (vectors * values.sin()[..., None, :]) @ vectors.mT


def nearest_orthogonal(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    return u @ vt, (u * s[..., None, :].cos()) @ vt


def fixed(vectors: Tensor) -> Tensor:
    """Vectors with signs that do not depend on the library."""
    return torch.where(vectors.sum(-2, keepdim=True) < 0, -vectors, vectors)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "determinants": (
        lambda x: linalg.det(square(x)),
        lambda x: linalg.slogdet(square(x)),
        lambda x: torch.logdet(positive(x)),
        lambda x: torch.logdet(x[..., :4]),
        lambda x: x[0, 0].trace(),
    ),
    "powers": (
        lambda x: linalg.inv(square(x)),
        lambda x: linalg.inv_ex(square(x))[0],
        lambda x: linalg.matrix_power(square(x), 3),
        lambda x: linalg.matrix_power(square(x), -2),
        lambda x: linalg.matrix_power(square(x), 0),
        lambda x: torch.matrix_exp(x[..., :4]),
        lambda x: linalg.vander(x),
        lambda x: linalg.vander(x[0, 0, 0], N=3),
        lambda x: linalg.tensorinv(square(x)[0, 0].reshape(2, 2, 4), ind=2),
    ),
    "solutions": (
        lambda x: linalg.solve(square(x), x[..., 4]),
        lambda x: linalg.solve(square(x), x),
        lambda x: linalg.solve(square(x)[:, :1], x),
        lambda x: linalg.solve(square(x), x.mT, left=False),
        lambda x: linalg.solve_ex(square(x), x)[0],
        lambda x: linalg.tensorsolve(square(x)[0, 0].reshape(2, 2, 4), x[0, 0, :2, :2]),
    ),
    "triangular": (
        lambda x: linalg.solve_triangular(square(x), x, upper=True),
        lambda x: linalg.solve_triangular(square(x), x, upper=False, unitriangular=True),
        lambda x: linalg.solve_triangular(square(x), x.mT, upper=False, left=False),
        lambda x: torch.triangular_solve(x, square(x), upper=False, transpose=True),
        lambda x: torch.triangular_solve(x, square(x)[0, 0], unitriangular=True),
    ),
    "cholesky": (
        lambda x: linalg.cholesky(skewed(x)),
        lambda x: linalg.cholesky(skewed(x), upper=True),
        lambda x: linalg.cholesky_ex(positive(x))[0],
        lambda x: torch.cholesky_solve(x, square(x)),
        lambda x: torch.cholesky_solve(x[0], square(x), upper=True),
        lambda x: torch.cholesky_inverse(square(x)),
        lambda x: torch.cholesky_inverse(square(x), upper=True),
    ),
    "qr": (
        lambda x: linalg.qr(x),
        lambda x: linalg.qr(x.mT),
        lambda x: linalg.qr(x, "complete"),
        lambda x: torch.qr(x.mT),
        lambda x: linalg.householder_product(0.3 * x.mT, x[..., 0]),
    ),
    "lu": (
        lambda x: linalg.lu(x),
        lambda x: linalg.lu(x.mT),
        lambda x: linalg.lu_factor(x),
        lambda x: linalg.lu_factor_ex(x.mT)[0],
        lambda x: torch.lu_unpack(*linalg.lu_factor(x)),
        lambda x: linalg.lu_solve(*linalg.lu_factor(square(x)), x),
        lambda x: linalg.lu_solve(*linalg.lu_factor(square(x)), x, adjoint=True),
        lambda x: linalg.lu_solve(*linalg.lu_factor(square(x)), x.mT, left=False),
    ),
    "eigenvalues": (
        lambda x: linalg.eigvalsh(skewed(x)),
        lambda x: linalg.eigvalsh(skewed(x), UPLO="U"),
        lambda x: function_of(*linalg.eigh(skewed(x))),
        lambda x: function_of(*linalg.eigh(skewed(x), UPLO="U")),
        lambda x: fixed(linalg.eigh(skewed(x))[1]),
        lambda x: linalg.eigvals(square(x)).abs(),
    ),
    "singular-values": (
        lambda x: linalg.svdvals(x),
        lambda x: nearest_orthogonal(*linalg.svd(x, full_matrices=False)),
        lambda x: nearest_orthogonal(*linalg.svd(x.mT, full_matrices=False)),
        lambda x: fixed(linalg.svd(square(x))[0]),
        lambda x: fixed(torch.svd(x)[2]),
        lambda x: linalg.cond(square(x)),
        lambda x: linalg.cond(square(x), p=-2),
        lambda x: linalg.matrix_rank(x),
    ),
    "pseudo-inverses": (
        lambda x: linalg.pinv(x),
        lambda x: linalg.pinv(x.mT, rtol=0.3),
        lambda x: linalg.pinv(x, atol=1.0),
        lambda x: linalg.pinv(skewed(x), atol=0.1, rtol=0.2, hermitian=True),
        lambda x: linalg.pinv(x, atol=x[..., 0, 0].detach().abs()),
    ),
    "vector-norms": tuple(
        lambda x, ord=ord: (linalg.vector_norm(x, ord, (1, 2)), linalg.norm(x, ord, -1))
        for ord in (2, 1, 0, 3, 0.5, -1.5, float("inf"), -float("inf"))
    ),
}


@pytest.mark.thinned
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
@pytest.mark.parametrize("case", FUNCTIONS)
def test_function(case: str) -> None:
    assert_ports(Fn(*FUNCTIONS[case]), torch.randn(2, 3, 4, 5), batches=(1,))


def test_matrix_norms() -> None:
    """`torch.export` fixes the batch in most of them."""
    forwards = [
        lambda x, ord=ord: (linalg.matrix_norm(x, ord), linalg.norm(x, ord, (1, 3), keepdim=True))
        for ord in ("fro", "nuc", 2, -2, 1, -1, float("inf"), -float("inf"))
    ]
    assert_ports(Fn(*forwards), torch.randn(2, 3, 4, 5), batch_axis=None)


class Whitening(nn.Module):
    """Weights within a factorisation: a learned metric, and the directions of most variance."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        metric = self.metric @ self.metric.mT + torch.eye(4, dtype=x.dtype)
        whitened = linalg.solve_triangular(linalg.cholesky(metric), x.mT, upper=False).mT
        values, vectors = linalg.eigh(whitened.mT @ whitened)
        return whitened, (vectors * values.clamp(min=1e-3).rsqrt()[..., None, :]) @ vectors.mT


def test_weights_and_batch_statistics() -> None:
    assert_ports(Whitening(), torch.randn(2, 6, 4), batches=(1,))


def test_full_singular_vectors() -> None:
    """Gradients go by way of the thin factors: the others are no function of the matrix."""

    def projections(x: Tensor) -> tuple[Tensor, ...]:
        u, _, vt = linalg.svd(x)
        return u @ u.mT, vt.mT @ vt, u @ vt[..., :4, :]

    assert_ports(Fn(projections), torch.randn(2, 4, 5), batches=(1,), gradients=False)

    def thin(x: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vt = linalg.svd(x)
        return nearest_orthogonal(u, s, vt[..., :4, :])

    assert_ports(Fn(thin), torch.randn(2, 4, 5))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: linalg.eigh(positive(x))[1],
        lambda x: linalg.eigh(positive(x))[1][..., 0].abs() + linalg.eigh(positive(x))[1][..., 1],
        lambda x: linalg.svd(x, full_matrices=False)[0],
        lambda x: linalg.svd(x[..., :2, :])[2][..., 2:, :].abs(),
        lambda x: torch.svd(x)[2],
    ],
    ids=["eigenvectors", "one-of-them", "singular-vectors", "vectors-of-zero", "svd"],
)
def test_what_depends_on_signs_is_refused(forward: Callable[[Tensor], Any]) -> None:
    last = nn.Linear(4, 4)
    nn.init.zeros_(last.weight)
    with pytest.raises(UnsupportedError, match=r"(?s)depends on the signs.*Fix them, as in v = torch\.where"):
        convert(nn.Sequential(Fn(lambda x: forward(x)[..., :4]), last), (torch.randn(2, 4, 5),))


def test_r_alone() -> None:
    assert_ports(Fn(lambda x: linalg.qr(x, mode="r")), torch.randn(2, 4, 5), batches=(1,), gradients=False)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: linalg.cholesky_ex(positive(x)), r"`info` cannot be carried over;\sXLA gives NaN"),
        (lambda x: linalg.inv_ex(square(x)).info, r"`info` cannot be carried over;\sXLA gives infinities"),
        (lambda x: linalg.ldl_factor(positive(x))[0], "XLA has no LDL factors"),
        (lambda x: linalg.lstsq(x.mT, x.mT)[0], r"depends on the rank; use torch\.linalg\.pinv\(a\) @ b"),
        (lambda x: linalg.eig(x[..., :4])[1], "eigenvectors of matrices that are not symmetric"),
    ],
    ids=["cholesky-info", "inverse-info", "ldl", "least-squares", "eig"],
)
def test_refused(forward: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convert(Fn(forward), (torch.randn(2, 4, 5),))


def test_singular_matrices_give_what_is_not_finite() -> None:
    """PyTorch raises an error, which a compiled program cannot; `docs/trust.md` says so."""
    module: Any = to_flax(Fn(linalg.inv, linalg.cholesky), (torch.eye(3).repeat(2, 1, 1),))
    for part in module(np.zeros((2, 3, 3), np.float32)):
        assert not np.isfinite(np.asarray(part)).all(axis=(1, 2)).any()
