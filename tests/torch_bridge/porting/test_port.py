"""Ported modules: forwards as people write them, and the source that runs."""

import inspect
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from tests.helpers.porting import assert_ports, randomised


def test_one_trace_per_shape() -> None:
    traces = []

    class Traced(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            traces.append(x.shape)
            return self.fc(x)

    from jaxensemble import Ensemble

    ensemble = Ensemble.from_modules([Traced(rngs=nnx.Rngs(k)) for k in range(3)])
    for size in (4, 4, 5, 4, 5):
        ensemble(np.ones((size, 2), "float32"))
    assert traces == [(4, 2)] * 2 + [(5, 2)] * 2  # one to plan by, one to compile


class Residual(nn.Module):
    """Functional calls, in-place operations, residual adds, concatenation and reshapes, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.gate = nn.Linear(6, 6)
        self.fc = nn.Linear(12 * 3 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        y = self.conv2(x)
        y += x
        y.relu_()
        y = y * torch.sigmoid(self.gate(y.mean(dim=(2, 3))))[:, :, None, None]
        z = torch.cat([x, y], dim=1)
        z = F.max_pool2d(z, 2)
        return self.fc(z.view(z.size(0), -1))


def test_user_written_forward_is_exact_with_gradients() -> None:
    assert_ports(Residual(), torch.randn(2, 3, 6, 8))


def test_the_printed_source_is_what_runs() -> None:
    module = torch_bridge.to_flax(Residual(), (torch.randn(2, 3, 6, 8),))
    assert "self.conv1(x)" in inspect.getsource(type(module))


def test_a_randomised_float64_copy_is_a_copy() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight.clone()
    assert randomised(model).weight.dtype == torch.float64
    assert torch.equal(model.weight, weight)


def test_a_dropout_of_constants_is_a_dropout_of_constants() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.dropout(torch.arange(3.0).cos())

    torch_bridge.to_ensemble([Positions().eval()], (torch.randn(4, 3),))


@pytest.mark.parametrize(
    "layers",
    [(nn.ReLU(), nn.Linear(3, 3)), (nn.Identity(), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid()), (nn.ReLU(), nn.Tanh())],
    ids=["one", "identity", "functions alone"],
)
def test_sequences_that_begin_with_a_function(layers: tuple[nn.Module, ...]) -> None:
    """A root that loops over its children must call each of them."""
    assert_ports(nn.Sequential(*layers), torch.randn(2, 3))


class _Shifts(nn.Module):
    """A block whose inner values are used later by some calls: inputs or results of steps that other blocks lack."""

    def __init__(self, shift: bool, inner: bool):
        super().__init__()
        self.shift, self.inner = shift, inner
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = y = self.first(x)
        if self.shift:
            y = torch.sin(y)
            before, y = (y, torch.exp(y)) if self.inner else (before, y)
        return self.third(torch.relu(self.second(y))), before


@pytest.mark.parametrize("inner", [False, True])
def test_what_a_later_block_gives_besides_is_not_lost(inner: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (_Shifts(shift, inner) for shift in (True, True, False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.a(x)
            x, before = self.b(x)
            x, _ = self.c(x + before)
            return x

    torch_bridge.to_ensemble([Net().eval() for _ in range(2)], (torch.randn(3, 4),))  # raises unless it agrees


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own import
def test_what_torch_compile_gives_is_ported_as_what_it_was_made_from() -> None:
    models, x = [nn.Linear(3, 2) for _ in range(2)], torch.randn(4, 3)
    compiled: list[Any] = [torch.compile(model) for model in models]
    ensemble = torch_bridge.to_ensemble(compiled, (x,))
    assert list(torch_bridge.to_torch(ensemble)[0]) == ["weight", "bias"]
