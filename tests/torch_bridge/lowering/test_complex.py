"""Complex numbers: operations, networks, gradients, training, files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, InputError, Plan, UnsupportedError, train_step
from tests.helpers import spectral
from tests.helpers.porting import Fn, assert_ports
from tests.helpers.training import same_bits
from torch_bridge.parity import gradients
from torch_bridge.timing.training import jax_step, torch_step
from torch_bridge.timing.variants import PLAIN_JAX


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Complex numbers of every quadrant."""
    return torch.randn(shape, dtype=torch.cfloat, generator=torch.Generator().manual_seed(seed))


# Operations

ONE: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "parts": (
        lambda z: (z.real, z.imag, torch.view_as_real(z), z.abs(), z.angle(), torch.isreal(z), z.real.angle()),
        lambda z: (z.conj(), z.conj() * 2, z.mH, z.conj().imag, torch.conj_physical(z), z.adjoint().resolve_conj()),
        lambda z: (z.sgn(), z.real.sgn(), -z, z.neg(), torch.square(z), z.reciprocal()),
        lambda z: (torch.complex(z.imag, z.real), torch.polar(z.abs(), z.real), z.real.to(z.dtype), z.real + 0j),
        lambda z: (z.view(torch.double), (z.real * 2).view(torch.cdouble)),
    ),
    "exponentials": (
        lambda z: (z.exp(), z.log(), z.log2(), z.log10(), z.log1p(), z.expm1(), z.exp2()),
        lambda z: (z.sqrt(), z.rsqrt(), z**0.5, z**2, z**3, z**-1, z**1.5, z ** (1 + 2j), 2.0**z, (1j) ** z),
    ),
    "circular": (
        lambda z: (z.sin(), z.cos(), z.tan(), z.asin(), z.acos(), z.atan()),
        lambda z: (z.sinh(), z.cosh(), z.tanh(), z.asinh(), z.acosh(), z.atanh(), torch.sinc(z)),
        lambda z: (z.sigmoid(), F.silu(z.detach()), F.tanhshrink(z), F.softsign(z)),
    ),
    "numbers": (
        lambda z: (z + 1j, 2 - z, z * (1 + 2j), z / 1j, 1 / z, z.real * 1j, z.real + 2j, z - z.real, z.abs() * z),
        lambda z: (z == z.conj(), z != 1j, z.isnan(), z.isfinite(), z.isinf(), z.logical_not(), z.bool()),
        lambda z: (torch.where(z.real > 0, z, 2j), torch.where(z.real > 0, z, z.imag.detach())),
        lambda z: (z.masked_fill(z.imag < 0, 1 + 1j), torch.nan_to_num(z.detach())),
        lambda z: (
            z.real.to(torch.cdouble),
            z.to(torch.cdouble),
            z.real.double() + z,
            z.abs().to(torch.cdouble),
            z.float(),
        ),
    ),
    "sums": (
        lambda z: (z.sum(), z.mean(1), z.prod(1), z.cumsum(1), z.cumprod(1), z.logcumsumexp(1), z.logsumexp(1)),
        lambda z: (z.var(1), z.std(1), torch.var_mean(z, 1), torch.std_mean(z, 0, correction=0)),
        lambda z: (z.norm(), z.norm(dim=1), z.norm(1, dim=1), z.norm(torch.inf, 1), torch.linalg.norm(z, "fro")),
        lambda z: (torch.linalg.vector_norm(z, 3, 1), torch.linalg.matrix_norm(z, 1), z.norm(0, 1)),
        lambda z: (
            F.normalize(z),
            F.rms_norm(z, (6,), z[0]),
            F.pairwise_distance(z, z.flip(0)),
            F.l1_loss(z, z.conj()),
        ),
    ),
    "places": (
        lambda z: (z.T, z.reshape(-1, 2), z.flip(1), z.roll(1, 1), torch.stack([z, z.conj()])),
        lambda z: (z.gather(1, torch.tensor([[0, 2], [1, 1]])), z[:, [2, 0]], z.tril(), z.diagonal()),
        lambda z: (F.pad(z, (1, 2)), torch.zeros_like(z) + z, z.new_zeros(2, 1) + z, torch.full_like(z, 1j) * z),
        lambda z: z[:, None].expand(2, 3, 6).mean(1) + z[0, 0],
    ),
    "matrices": (lambda z: (torch.linalg.slogdet(z[:, :2]), torch.logdet(z[:, :2]), torch.linalg.inv(z[:, 1:3])),),
}


@pytest.mark.thinned
@pytest.mark.filterwarnings("ignore:Casting complex values to real discards")
@pytest.mark.parametrize("name", ONE)
def test_functions_of_complex_numbers(name: str) -> None:
    assert_ports(Fn(*ONE[name]), numbers(2, 6), batch_axis=None)


def test_the_batch_may_be_divided_by_its_size() -> None:
    """The exporter itself takes that size for a fixed number."""
    functions = (lambda z: z.mean(0), lambda z: torch.var_mean(z, 0), lambda z: z.std(), lambda z: z / z.shape[0])
    assert_ports(Fn(*functions), numbers(6, 4), batches=(3,))


TWO: dict[str, tuple[Callable[[Tensor, Tensor], Any], ...]] = {
    "products": (
        lambda z, w: (z @ w.T, z @ w.mH, torch.einsum("ni,mi->nm", z, w.conj()), torch.mm(z, w.mT), z * w, z / w),
        lambda z, w: (torch.bmm(z[:, None], w[..., None]), torch.dot(z[0], w[1]), torch.vdot(z[0], w[1])),
        lambda z, w: (torch.linalg.vecdot(z, w), torch.inner(z, w), torch.outer(z[0], w[0])),
        lambda z, w: (torch.tensordot(z, w, 2), torch.kron(z, w), torch.mv(z, w[0])),
        lambda z, w: (torch.addmm(z @ w.T, z, w.T, beta=1j, alpha=2), F.linear(z, w, w[:, 0])),
        lambda z, w: F.conv1d(z[:, None], w[:, None, :3], w[:, 0], padding=1),
        lambda z, w: F.conv_transpose1d(z[:, None], w[:1, None]),
    ),
    "elements": (
        lambda z, w: (torch.addcmul(z, z, w, value=0.5), torch.addcdiv(z, z, w, value=1j), torch.lerp(z, w, 0.3)),
        lambda z, w: (z**w, z**w.real, z.abs() ** w, torch.dist(z, w), z == w, torch.isclose(z, w)),
        lambda z, w: (torch.add(z, w, alpha=2j), torch.logaddexp(z, w)),
        lambda z, w: (z.index_add(0, torch.tensor([1]), w[:1]), z.scatter(1, torch.tensor([[0], [2]]), w[:, :1])),
        lambda z, w: (torch.cat([z, w.real, w], 1), _written(z, w)),
    ),
}


def _written(z: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros(2, 8, dtype=z.dtype)
    out[:, 1:7] = z
    out[:, 0] = w.real[:, 0]
    out[0] += w[0, 0]
    return out


@pytest.mark.thinned
@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_complex_arrays(name: str) -> None:
    assert_ports(Fn(*TWO[name]), numbers(2, 6), numbers(2, 6, seed=1), batch_axis=None)


TRANSFORMS: dict[str, Callable[[Tensor], Any]] = {
    "of a line": lambda x: (
        torch.fft.fft(x),
        torch.fft.fft(x, 5, 1, "ortho"),
        torch.fft.ifft(x, dim=2, norm="forward"),
        torch.fft.rfft(x),
        torch.fft.rfft(x, n=7, dim=-2),
        torch.fft.ihfft(x, norm="ortho"),
    ),
    "of a plane": lambda x: (
        torch.fft.fft2(x),
        torch.fft.ifft2(x, s=(3, 7), norm="ortho"),
        torch.fft.rfft2(x, dim=(1, 2), norm="ortho"),
        torch.fft.rfft2(x, dim=(3, 1)),
        torch.fft.fft2(x, s=(-1, 4)),
    ),
    "of a space": lambda x: (
        torch.fft.fftn(x),
        torch.fft.ifftn(x, dim=(1, 3)),
        torch.fft.rfftn(x, s=(4, 5)),
        torch.fft.rfftn(x, dim=(1, 2, 3), norm="forward"),
    ),
    "moved": lambda x: (
        torch.fft.fftshift(x),
        torch.fft.ifftshift(x, dim=2),
        torch.fft.fftshift(torch.fft.fft(x), (1, 2)).abs(),
        x * torch.fft.fftfreq(6),
        x[..., :4] * torch.fft.rfftfreq(6, 0.5),
    ),
    "spectrograms": lambda x: (
        torch.stft(x.flatten(1), 8, 3, window=torch.hann_window(8, dtype=x.dtype), return_complex=True),
        torch.stft(x.flatten(1), 8, 2, 6, normalized=True, center=False, return_complex=True),
        torch.stft(x.flatten(1), 7, win_length=5, window=torch.ones(5), onesided=False, return_complex=True),
        torch.view_as_real(torch.stft(x[0, 0, 0], 4, pad_mode="constant", return_complex=True)),
    ),
}


@pytest.mark.thinned
@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    assert_ports(Fn(TRANSFORMS[name]), torch.randn(2, 4, 5, 6), batches=(1,))


BACK: dict[str, Callable[[Tensor], Any]] = {
    "of a line": lambda z: (
        torch.fft.fft(z),
        torch.fft.ifft(z, n=8),
        torch.fft.irfft(z),
        torch.fft.irfft(z, n=5, dim=1, norm="ortho"),
        torch.fft.irfft(z, n=9, norm="forward"),
        torch.fft.hfft(z),
        torch.fft.hfft(z, n=7, norm="ortho"),
    ),
    "of a plane": lambda z: (
        torch.fft.irfft2(z),
        torch.fft.irfft2(z, s=(4, 7), dim=(2, 1), norm="ortho"),
        torch.fft.irfftn(z, dim=(1, 2)),
        torch.fft.irfftn(z, s=(5,), dim=(1,)),
        torch.fft.hfft2(z),
        torch.fft.hfftn(z, dim=(1, 2), norm="ortho"),
    ),
    "hermitian": lambda z: (torch.fft.ihfft2(z.real), torch.fft.ihfftn(z.real, dim=(1, 2), norm="ortho")),
    "signals": lambda z: (
        torch.istft(z, 8, 2),
        torch.istft(z, 8, 3, window=torch.hann_window(8, dtype=torch.double) + 0.1, length=12),
        torch.istft(z, 8, 4, window=torch.ones(8, dtype=torch.double), center=False, normalized=True),
        torch.istft(z, 8, 2, 6, length=12),
        torch.istft(z, 8, 2, length=16),
        torch.istft(torch.cat([z, z[:, :3]], 1), 8, 2, onesided=False),
        torch.istft(z, 5, 2, return_complex=True, onesided=False),
    ),
}


@pytest.mark.thinned
@pytest.mark.filterwarnings("ignore:The length of signal is shorter", "ignore:A window was not provided")
@pytest.mark.parametrize("name", BACK)
def test_transforms_of_complex_numbers(name: str) -> None:
    assert_ports(Fn(BACK[name]), numbers(2, 5, 6), batches=(1,))


# Networks

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Fourier operator of a line": (spectral.FourierOperator1d, torch.randn(2, 9, 2)),
    "Fourier operator of a plane": (lambda: spectral.FourierOperator2d(pairs=False), torch.randn(2, 2, 7, 6)),
    "Fourier operator of pairs": (lambda: spectral.FourierOperator2d(pairs=True), torch.randn(2, 2, 7, 6)),
    "complex MLP": (spectral.ComplexMLP, numbers(6, 4)),
    "complex convolutions": (spectral.ComplexConvolutions, numbers(2, 2, 8)),
    "rotary attention": (spectral.RotaryAttention, torch.randn(2, 6, 8)),
    "state space": (spectral.StateSpace, torch.randn(2, 3, 7)),
    "linear recurrence": (spectral.LinearRecurrence, torch.randn(2, 5, 3)),
    "global filter": (spectral.GlobalFilter, torch.randn(2, 5, 6, 3)),
    "adaptive filter": (spectral.AdaptiveFilter, torch.randn(2, 5, 6, 4)),
    "Fourier features": (spectral.FourierFeatures, torch.randn(4, 2)),
    "rotations": (spectral.Rotations, torch.tensor([[0, 1, 2], [4, 3, 0], [1, 1, 3]])),
    "complex attention": (spectral.ComplexAttention, numbers(2, 5, 4)),
    "denoiser": (spectral.Denoiser, torch.randn(2, 20)),
}


def ported(name: str) -> tuple[list[nn.Module], Any, Tensor]:
    """Two members, and the ensemble of them, which was compared with them."""
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    models = [make().eval() for _ in range(2)]
    return models, torch_bridge.to_ensemble(models, (x,)), x


@pytest.mark.thinned
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree(name: str) -> None:
    models, ensemble, _ = ported(name)
    for model, tensors in zip(models, torch_bridge.to_torch(ensemble), strict=True):
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_networks_train_as_pytorch_does(name: str) -> None:
    models, ensemble, x = ported(name)
    report = torch_bridge.check(models, ensemble, (x,), train=True)
    assert report.passed, report


def layers() -> tuple[list[nn.Module], Any]:
    models: list[nn.Module] = [nn.Linear(3, 2, dtype=torch.cfloat) for _ in range(2)]
    return models, torch_bridge.to_ensemble(models, (numbers(4, 3),), check=False)


def test_layers_train_as_pytorch_does() -> None:
    """Gradients by complex parameters are PyTorch's, the conjugates of JAX's; a complex number is two real ones."""
    report = torch_bridge.check(*layers(), (numbers(4, 3),), train=True)
    assert report.passed, report
    assert {"gradients, float64", "float64, 10 steps of Adam"} <= {row.stage for row in report.rows}


@pytest.mark.parametrize("name", ["loop", "torch.func.vmap"])
def test_training_is_timed(name: str) -> None:
    models, ensemble = layers()
    expected = jax_step(PLAIN_JAX, ensemble, (numbers(4, 3).numpy(),))()
    losses = torch_step(name, models, (numbers(4, 3),))()
    np.testing.assert_allclose(np.stack([loss.numpy() for loss in losses]), expected, rtol=1e-5)


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugates of gradients have the same sizes: only their parts tell them apart."""
    monkeypatch.setattr(gradients.np, "conj", lambda array: np.asarray(array))
    report = torch_bridge.check(*layers(), (numbers(4, 3),))
    assert {row.stage for row in report.rows if not row.passed} == {"gradients, float64"}


def test_optimizers_are_carried_over_after_some_steps() -> None:
    models, _ = layers()
    optimizers = [torch.optim.Adam(model.parameters(), 0.1) for model in models]

    def step() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(numbers(4, 3)).abs().square().mean().backward()
            optimizer.step()

    step()
    ensemble = torch_bridge.to_ensemble(models, (numbers(4, 3),), check=False)
    state = torch_bridge.train_state(models, optimizers, ensemble, jax.random.key(0))
    step()
    loss = lambda outputs, targets: jnp.mean(jnp.abs(outputs) ** 2)  # noqa: E731
    state, _ = train_step(state, numbers(4, 3).numpy(), np.zeros(4, "float32"), loss=loss)
    for model, tensors in zip(models, torch_bridge.to_torch(state.ensemble), strict=True):
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensors[key], tensor)


# Precision


def test_complex_numbers_go_with_the_precision(tmp_path: Path) -> None:
    _, ensemble, x = ported("rotations")
    assert ensemble.astype("bfloat16").params["entities"].dtype == "complex64"
    with jax.enable_x64(True):
        wide = ensemble.astype("float64")
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide.params)} == {"float64", "complex128"}
        wide.save(tmp_path / "wide")
        loaded = Ensemble.load(tmp_path / "wide")
        np.testing.assert_array_equal(loaded(x), wide(x))
    same_bits(loaded.params, wide.params)
    with pytest.raises(InputError, match="holds of entities"):
        Ensemble.load(tmp_path / "wide")
    ensemble.save(tmp_path / "narrow")
    same_bits(Ensemble.load(tmp_path / "narrow").params, ensemble.params)


def test_double_networks_need_x64() -> None:
    model = nn.Linear(3, 2, dtype=torch.cdouble)
    with pytest.raises(InputError, match="complex128, which JAX holds only with x64 on"):
        torch_bridge.to_ensemble([model], (numbers(2, 3).to(torch.cdouble),))
    with jax.enable_x64(True):
        assert torch_bridge.to_ensemble([model], (numbers(2, 3).to(torch.cdouble),)).proof is not None


class Casts(nn.Module):
    """Names complex dtypes in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(3))

    def forward(self, x: Tensor) -> Tensor:
        z = x.cfloat() + x.to(torch.complex64) * torch.tensor(0.1 + 0.3j) + torch.complex(x, x) / 3  # pyright: ignore[reportAttributeAccessIssue]
        return z * self.weight.to(torch.cfloat) + torch.full((3,), 0.7j, dtype=torch.complex64)


def test_constants_are_double_in_the_proof() -> None:
    assert torch_bridge.to_ensemble([Casts(), Casts()], (torch.randn(2, 3),)).proof is not None


def test_half_of_complex_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"JAX has no torch.complex32"):
        torch_bridge.to_ensemble([Fn(lambda x: x.chalf().real.float())], (torch.randn(2, 3),), check=False)


def test_conjugates_are_resolved() -> None:
    """A parameter may be a lazy conjugate, of which PyTorch computes nothing until it is used."""
    model = nn.Linear(3, 2, bias=False, dtype=torch.cfloat)
    model.weight = nn.Parameter(numbers(2, 3).conj())
    ensemble = torch_bridge.to_ensemble([model], (numbers(4, 3),))
    assert torch.equal(torch_bridge.to_torch(ensemble)[0]["weight"], model.weight)


CUTS = (complex(-2, 0.0), complex(-2, -0.0), complex(2, 0.0), complex(2, -0.0), complex(-0.5, -0.0), complex(0.5, -0.0))


def test_functions_are_cut_where_pytorch_cuts_them() -> None:
    z = torch.tensor([CUTS, CUTS])
    assert_ports(Fn(torch.sqrt, torch.log, torch.rsqrt, torch.angle), z, batch_axis=None)
    # PyTorch's gradients of these, on one side, are those of the other.
    assert_ports(Fn(torch.asin, torch.acos, torch.acosh), z, batch_axis=None, gradients=False)


def test_what_is_not_finite() -> None:
    z = torch.tensor([[complex(torch.nan, 1), complex(torch.inf, -torch.inf), complex(2, torch.nan), 3 + 1j]])
    functions = (
        torch.isnan,
        torch.isinf,
        torch.isfinite,
        torch.nan_to_num,
        lambda z: torch.nan_to_num(z, 2.0, 3.0, 4.0),
    )
    assert_ports(Fn(*functions), z, batch_axis=None, gradients=False)


def test_powers_of_zero() -> None:
    z, w = torch.zeros(2, 3, dtype=torch.cfloat), torch.tensor([[2 + 0j, 1 + 1j, 0.5 - 1j]])
    assert_ports(Fn(lambda z, w: (z**w, z ** (1 + 1j), z**2, z**0.5, z**0)), z, w, batch_axis=None, gradients=False)


def test_gradients_at_zero() -> None:
    assert_ports(
        Fn(torch.abs, torch.sgn, torch.angle, torch.norm), torch.zeros(2, 3, dtype=torch.cfloat), batch_axis=None
    )


def test_rows_of_fourier_operators_are_kept_apart() -> None:
    _, ensemble, x = ported("Fourier operator of a line")
    np.testing.assert_allclose(ensemble(x, plan=Plan(rows=1)), ensemble(x), rtol=0, atol=1e-6)
