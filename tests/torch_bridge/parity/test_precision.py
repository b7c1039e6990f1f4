"""Precision: forwards run in float64 throughout, and in working precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from torch_bridge.parity import precision
from torch_bridge.parity.metrics import rms_error


def test_float64_hands_on_what_functions_are_given_and_no_copies() -> None:
    """Copying a model hands every tensor the memo of all copies so far: copied each time, that takes minutes."""
    tensor, memo = torch.ones(2), {}
    with precision.double_precision():
        copied = tensor.__deepcopy__(memo)
    assert memo[id(tensor)] is copied


@functools.lru_cache
def _waves(size: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(size, dtype=dtype) * torch.pi


class Remembering(nn.Linear):
    """A table that the first caller makes: in float32, in float64 or without values."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.sin(_waves(input.shape[-1], torch.float32))


@pytest.mark.parametrize("called", [True, False], ids=["called before", "new"])
def test_tables_that_a_forward_remembers_are_those_of_the_precision_it_runs_in(called: bool) -> None:
    _waves.cache_clear()
    models: list[nn.Module] = [Remembering(4, 4).eval(), Remembering(4, 4).eval()]
    x = torch.randn(3, 4)
    if called:
        models[0](x)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert torch_bridge.check(models, ensemble, (x,)).passed
    assert ensemble.network is not None and not ensemble.network.evaluation_only
    assert _waves(4, torch.float32).dtype == torch.float32
    assert torch.equal(models[0](x), models[0](x))


def test_float_constants_are_those_of_float64() -> None:
    """A table that PyTorch computes in the model's own precision differs from float32's in a float64 model."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            table = torch.sin(torch.arange(x.shape[1], dtype=x.dtype) / 3)
            return self.fc(x + table)

    models = [Positions(), Positions()]
    ensemble = torch_bridge.to_ensemble(models, (torch.randn(4, 6),))
    assert torch_bridge.check(models, ensemble, (torch.randn(4, 6),)).passed


def test_precision_is_set_within_a_scope_only() -> None:
    with jax.default_matmul_precision("default"):
        before = precision_settings()
        with precision.equal_precision():
            assert precision_settings() == (False, False, "highest")
        assert precision_settings() == before


def precision_settings() -> tuple[Any, ...]:
    config: Any = jax.config
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, config.jax_default_matmul_precision


def test_networks_of_integers_are_compared_in_float64_throughout() -> None:
    """`nnx.Embed` casts to the dtype that it was made with."""
    models: list[nn.Module] = [nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)) for _ in range(2)]
    x = torch.randint(0, 7, (3, 2))
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,))
    assert report.passed, str(report)


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.float() / 255)


class Timestep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(3).float())
        h = self.fc(torch.cat([angles.sin(), angles.cos()], 1)).float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.softmax(self.scale * h.type_as(t), -1, dtype=torch.float32)


class Resampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 2, 4, 5], align_corners=False)
        return nn.functional.grid_sample(self.conv(x), grid.expand(x.shape[0], -1, -1, -1), align_corners=False)


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Bytes, torch.arange(24, dtype=torch.uint8).reshape(4, 6)),
        (Timestep, torch.rand(4)),
        (Resampled, torch.rand(3, 2, 6, 7)),
    ],
    ids=["bytes", "timestep", "resampled"],
)
def test_forwards_that_say_float_are_proved_in_float64(model: Callable[[], nn.Module], x: Tensor) -> None:
    models = [model(), model()]
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,))
    assert report.passed, str(report)
    assert torch.get_default_dtype() == torch.float32


def test_complex_outputs_are_compared_in_both_parts() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.fc(x).tanh())

    models, x = [Spectrum() for _ in range(2)], torch.randn(8, 4)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert torch_bridge.check(models, ensemble, (x,)).passed
    report = torch_bridge.check(models[::-1], ensemble, (x,))
    assert {"gradients, float64", "complex64, same for all"} <= {row.stage for row in report.rows if not row.passed}
    assert rms_error(np.array([1 + 5j]), np.array([1 + 0j])) == 5


def test_a_network_of_buffers_alone_is_compared_in_working_precision() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.get_buffer("w"))

    models, x = [Fixed() for _ in range(2)], torch.randn(8, 4)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,), thorough=False)
    assert "float32, same for all" in {row.stage for row in report.rows}
