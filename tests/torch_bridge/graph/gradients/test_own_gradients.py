"""Gradients of a model's own: a `torch.autograd.Function`, and values that are detached."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import (
    UnsupportedError,
)


def test_detached_values_have_no_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).detach())

    models = [Detached(), Detached()]
    x = torch.randn(4, 3)
    assert torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,)).passed


class Straight(torch.autograd.Function):
    """A step whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-0.01, 0.01)


class Swish(torch.autograd.Function):
    """A function that only saves memory: its backward is the gradient of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        part = x.sigmoid()
        return grad * part * (1 + x * (1 - part))


class Applying(nn.Sequential):
    def __init__(self, function: Any) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self[1](self.function.apply(self[0](input)))


def test_gradients_of_ones_own_are_refused_where_they_are_not_those_of_the_forward() -> None:
    x = torch.randn(5, 3)
    for function in (Straight, Clipped):
        with pytest.raises(UnsupportedError, match=f"uses {function.__name__}, whose backward"):
            torch_bridge.to_ensemble([Applying(function)], (x,))


def test_gradients_of_ones_own_that_training_alone_has_are_for_evaluation_only() -> None:
    class Twofold(Applying):
        def forward(self, input: Tensor) -> Tensor:
            y = self[0](input)
            return self[1](self.function.apply(y) if self.training else y)

    ensemble = torch_bridge.to_ensemble([Twofold(Clipped).eval()], (torch.randn(5, 3),))
    assert "uses Clipped" in ensemble.network.evaluation_only


def test_gradients_of_ones_own_that_are_those_of_the_forward_are_carried() -> None:
    x = torch.randn(5, 3)
    models = [Applying(Swish).eval() for _ in range(2)]
    assert torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,)).passed
