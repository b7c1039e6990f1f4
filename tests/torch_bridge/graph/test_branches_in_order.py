"""Training branches whose steps must keep their order, their shapes and their places: each was wrong once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from tests.helpers.porting import assert_trains


class Parts(nn.Module):
    """Layers and buffers of the networks below."""

    offset: Tensor
    center: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm1d(5)
        self.register_buffer("offset", torch.randn(5))
        self.register_buffer("center", torch.randn(1, 4, 1, 1))
        self.register_buffer("table", torch.randn(5, 3))


class Expanded(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            y = y.mean(1, keepdim=True).expand(-1, 5)
        return y.sum(1)


class ExpandedBuffer(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            y = self.offset.expand(x.shape[0], 5)
        return y.sum(0)


class Centered(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            self.center.lerp_(y.detach().mean((0, 2, 3), keepdim=True), 0.1)
        return y - self.center


class OptionalChoice(Parts):
    """A part that only some blocks have, which ends in a choice."""

    def __init__(self, has_it: bool) -> None:
        super().__init__()
        self.has_it = has_it

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x).sin()
        x = self.g(x * y + y)
        if self.has_it:
            y = x * 2
            x = y * x.mean() if self.training else y
        return x.tanh()


class OptionalAndOwn(OptionalChoice):
    def forward(self, x: Tensor) -> Tensor:
        y, x = self.g(x), self.f(x)
        if self.has_it and self.training:
            x = x * 2
        y = y.clone()
        if self.training:
            y = y + 1
        return self.h(x).sin() * self.h(y).cos()


class OverOptional(OptionalChoice):
    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        kept = x * 3 if self.training else None
        if self.has_it:
            x = x.roll(1, -1).sin()
        x = self.g(x)
        return x if kept is None else x + kept


class Statistics(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


class ReadBeforeAChild(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Statistics()

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        before = x * self.inner.mean if self.training else None
        y = self.inner(x).sin()
        return y if before is None else y + before


class Plain(nn.Module):
    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(5))
        self.register_buffer("running_var", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class TwoCallsInOrder(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            first = self.plain(y)
            second = self.plain(y.sin())
            y = y + second - first
        return y


class CallBeforeTheSharedOne(TwoCallsInOrder):
    def forward(self, x: Tensor) -> Tensor:
        before = self.plain(self.f(x)) if self.training else None
        y = self.plain(self.g(x))
        return y if before is None else y + before


class OldValueReturned(Parts):
    def forward(self, x: Tensor) -> Any:
        old = self.table.t().clone()
        if self.training:
            self.table.mul_(0.9)
        return self.f(x) @ self.table, old


class OwnCounter(Parts):
    num_batches_tracked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return self.f(x) * (1 + self.num_batches_tracked)


class NormTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.g(self.norm(self.f(x))))
        return y * 2 if self.training else y


class NamesTaken(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.keys(self.f(x) + torch.randn_like(x))


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            input = input * 2
        return F.linear(input, self.weight, self.bias)


class BuffersReturned(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.f(x)) - self.offset, self.offset, self.norm.running_mean


class CopiedOntoItself(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.offset.copy_(self.offset.clone())
        return self.f(x) + self.offset


class WholeNumbersAsFractions(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + torch.randint(0, 5, (5,), dtype=torch.float32)


def several(kind: Callable[[bool], nn.Module], *which: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*map(kind, which))


CASES: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (
            Expanded,
            ExpandedBuffer,
            Centered,
            ReadBeforeAChild,
            TwoCallsInOrder,
            CallBeforeTheSharedOne,
            OldValueReturned,
            OwnCounter,
            NormTwice,
            NamesTaken,
            BuffersReturned,
            CopiedOntoItself,
            WholeNumbersAsFractions,
        )
    },
    "OptionalChoice": several(OptionalChoice, False, True, False),
    "OptionalAndOwn": several(OptionalAndOwn, False, True, False, True),
    "OverOptional": several(OverOptional, False, True, False),
    "OwnLinear": lambda: nn.Sequential(OwnLinear(5, 5)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_both_modes_are_those_of_pytorch(case: str) -> None:
    assert_trains(CASES[case], torch.randn(2, 3, 4, 4) if case == "Centered" else torch.randn(6, 5))


def test_statistics_that_are_read_before_their_layer_are_for_evaluation_only() -> None:
    class Before(Parts):
        def forward(self, x: Tensor) -> Tensor:
            old = self.norm.running_mean.clone()  # type: ignore[operator]
            return self.norm(self.f(x)) - old

    ensemble = torch_bridge.to_ensemble([Before().eval()], (torch.randn(6, 5),))
    assert "running statistics" in ensemble.network.evaluation_only
