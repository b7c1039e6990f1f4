"""Operations in their forms for CPUs (products, maxima, tanh), compared with PyTorch."""

import pytest
import torch
from torch import Tensor, nn

import torch_bridge


def _of_images(layer):
    return nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), layer, nn.Flatten())


@pytest.mark.thinned
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(1024, 512),
        nn.Linear(1021, 512),
        nn.Linear(4096, 512),
        _of_images(nn.Conv2d(2048, 512, 1)),
        nn.Conv1d(2048, 512, 1),
        nn.GRU(2048, 32),
    ],
    ids=["linear", "of a prime", "wide", "pointwise", "conv alone", "gru"],
)
def test_a_wide_layer_is_as_exact_as_pytorchs(layer):
    """XLA's own are further off than twice as far as PyTorch's; those of one row are so by far."""
    torch.manual_seed(0)
    for rows in (1, 33):
        x = torch.randn(rows, next(layer.parameters()).shape[1])
        if isinstance(layer, nn.Conv1d | nn.GRU):
            x = x[..., None] if isinstance(layer, nn.Conv1d) else x[None].expand(3, -1, 2048).contiguous()
        torch_bridge.to_ensemble([layer], (x,), batch_axis=1 if isinstance(layer, nn.GRU) else 0)  # or ParityError


def test_ensembles_that_solve_equations(x64):
    """Parameters of a step in a program may be named tuples."""

    class Solving(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.eye(4, dtype=torch.float64) + torch.rand(4, 4, dtype=torch.float64))

        def forward(self, x):
            return torch.linalg.solve(self.a, x.T).T @ torch.linalg.inv(self.a)

    models, x = [Solving().eval() for _ in range(2)], torch.randn(5, 4, dtype=torch.float64)
    assert torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,)).passed


def test_the_gradient_of_a_maximum_over_time_is_pytorchs() -> None:
    """A random network had an infinite one."""

    class Latest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(self.norm(nn.functional.logsigmoid(x)), max=0.9).amax(1) + self.norm(x).amin(1)

    models = [Latest().eval() for _ in range(2)]
    x = torch.randn(3, 3, 6)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report
    assert any(row.stage.startswith("gradients") for row in report.rows)


def test_what_tanh_leaves_over_passes_the_proof() -> None:
    """By XLA's own tanh, which is off three times as far as PyTorch's, it does not."""
    models = [nn.Sequential(nn.Linear(6, 512), nn.Tanhshrink()) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            next(model.parameters()).mul_(0.1)
    x = torch.randn(64, 6)
    assert torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,), thorough=False).passed


def test_layer_norm_of_a_feature_map_passes_the_proof() -> None:
    models = [nn.Sequential(nn.Upsample(scale_factor=2), nn.LayerNorm([3, 24, 14])) for _ in range(2)]
    x = torch.randn(3, 3, 12, 7)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,), thorough=False)
    assert report.passed, report
