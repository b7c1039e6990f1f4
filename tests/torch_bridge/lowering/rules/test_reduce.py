"""Reductions, running sums, sorting: over every choice of dimensions, with ties and gradients as PyTorch has them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from tests.helpers.abilities import can_differentiate, can_export
from tests.helpers.porting import Fn, assert_ports
from torch_bridge.lowering.convert import convert

SHAPE = (2, 3, 4, 5)

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "sum": (
        lambda x: x.sum(),
        lambda x: x.sum(1),
        lambda x: x.sum((-1, 1), keepdim=True),
        lambda x: x.sum((0, 2)),
        lambda x: x[:, :1].sum(1),
        lambda x: x.flatten(2).sum(-1),
        lambda x: x.flatten(1, 2).sum(1),
    ),
    "sum-dtypes": (
        lambda x: (x > 0).sum(1),
        lambda x: (x > 0).to(torch.uint8).sum(),
        lambda x: (x > 0).sum(2, dtype=torch.float64),
        lambda x: (x > 0).double().mean((1, 2)),
        lambda x: (x * 3).to(torch.int32).prod(1),
        lambda x: (x > 0).cumsum(1),
        lambda x: torch.count_nonzero(x > 0, dim=1),
    ),
    "mean-prod": (
        lambda x: x.mean(),
        lambda x: x.mean([2, 3]),
        lambda x: x.prod(),
        lambda x: x.prod(1, keepdim=True),
        lambda x: x.relu().prod(2),
        lambda x: x.mean(-1, keepdim=True),
    ),
    "extremes": (
        lambda x: x.amax((2, 3)),
        lambda x: x.amin(1, keepdim=True),
        lambda x: x.max(),
        lambda x: x.min(),
        lambda x: x.relu().amax(2),
        lambda x: x.relu().min(),
    ),
    "places": (
        lambda x: x.max(1),
        lambda x: x.min(-1, keepdim=True),
        lambda x: x.argmax(),
        lambda x: x.transpose(1, 3).argmax(),
        lambda x: x.argmax(1),
        lambda x: x.argmin(2, keepdim=True),
        lambda x: x.relu().max(1),
    ),
    "spread": (
        lambda x: x.var(),
        lambda x: x.var(1),
        lambda x: x.var((1, 2), unbiased=False, keepdim=True),
        lambda x: x.std(),
        lambda x: x.std((1, 2), correction=0),
        lambda x: x.std(1, False),
        lambda x: x.var(2, correction=2),
    ),
    "spread-and-mean": (
        lambda x: torch.var_mean(x, 1),
        lambda x: torch.var_mean(x),
        lambda x: torch.std_mean(x, (1, 2), correction=0, keepdim=True),
        lambda x: (x * 0).std(1),
    ),
    "norms": (
        lambda x: x.norm(),
        lambda x: x.norm(1, 1),
        lambda x: torch.norm(x, p=2, dim=1, keepdim=True),
        lambda x: torch.linalg.vector_norm(x, 3, (1, 2)),
        lambda x: torch.linalg.vector_norm(x, float("inf"), 1),
        lambda x: torch.linalg.vector_norm(x, 0, 1),
        lambda x: torch.linalg.vector_norm(x, 0.5, -1),
        lambda x: x.relu().norm(dim=2),
    ),
    "matrix-norms": (
        lambda x: torch.linalg.norm(x, dim=1),
        lambda x: torch.linalg.norm(x),
        lambda x: torch.linalg.matrix_norm(x),
        lambda x: torch.norm(x, "fro", (2, 3)),
    ),
    "logsumexp": (
        lambda x: x.logsumexp(1),
        lambda x: x.logsumexp((2, 3), keepdim=True),
        lambda x: x.logcumsumexp(1),
    ),
    "truth": (
        lambda x: (x > 0).any(),
        lambda x: (x > 0).any(1),
        lambda x: (x > 0).all((1, 2), keepdim=True),
        lambda x: x.relu().any(2),
        lambda x: (x > 0).to(torch.uint8).all(1),
    ),
    "running": (
        lambda x: x.cumsum(1),
        lambda x: x.cumprod(-1),
        lambda x: x.relu().cumprod(1),
        lambda x: x.cummax(1),
        lambda x: x.relu().cummin(2),
    ),
    "medians": (
        lambda x: x.median(),
        lambda x: x.median(1),
        lambda x: x.median(2, keepdim=True)[0],
        lambda x: torch.where(x > 1, float("nan"), x).nanmedian(3)[0],
        lambda x: x.round().mode(1)[0],
        lambda x: x.kthvalue(2, 1),
    ),
    "order": (
        lambda x: x.sort(1),
        lambda x: x.sort(dim=2, descending=True),
        lambda x: torch.sort(x.relu(), stable=True, dim=1, descending=True),
        lambda x: x.argsort(-1),
        lambda x: torch.argsort(x.relu(), dim=1, stable=True),
        lambda x: torch.msort(x),
    ),
    "best": (
        lambda x: x.topk(2, 1),
        lambda x: x.topk(3),
        lambda x: x.topk(2, 2, largest=False),
        lambda x: x.topk(1, -1)[0].squeeze(-1),
    ),
    "missing": (
        lambda x: torch.where(x > 0, float("nan"), x).nansum(1),
        lambda x: torch.where(x > 0.5, float("nan"), x).nanmean((1, 2, 3)),
        lambda x: torch.where(x > 1, float("nan"), x).max(1)[0].isnan(),
        lambda x: torch.where(x > 1, float("nan"), x).argmax(1),
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", FUNCTIONS)
def test_function(case: str) -> None:
    assert_ports(Fn(*FUNCTIONS[case]), torch.randn(SHAPE), batches=(1,))


def test_extremes_at_once() -> None:
    forward, x = lambda x: x.aminmax(dim=1), torch.randn(SHAPE)
    assert_ports(Fn(forward), x, batches=(1,), gradients=can_differentiate(forward, x))  # not in PyTorch 2.11


QUANTILES = (
    lambda x: x.quantile(0.3, 1),
    lambda x: x.quantile(torch.tensor([0.2, 0.9], dtype=x.dtype), 2, keepdim=True),
    lambda x: x.quantile(0.4, 3, interpolation="higher"),
    lambda x: x.nanquantile(0.4, 3),
)


@pytest.mark.parametrize("open_batch", [True, False])
def test_quantiles(open_batch: bool) -> None:
    """With an open batch along one axis; with a fixed one, over all elements."""
    forwards, x = QUANTILES if open_batch else (lambda x: x.quantile(0.5),), torch.randn(SHAPE)
    if not can_export(forwards[0], x, open_batch=open_batch):
        pytest.skip("torch.export of this PyTorch does not follow quantile, as that of 2.11")
    assert_ports(Fn(*forwards), x, batches=(1,), batch_axis=0 if open_batch else None)


class Head(nn.Module):
    """Reductions of a feature map in every way, on channels-last arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.c(x)
        return (
            y.mean((2, 3)),
            y.flatten(2).max(-1)[0],
            y.std(1).flatten(1),
            y.cumsum(1)[:, -1].amax((1, 2)),
            y.argmax(1).flatten(1),
            y.norm(dim=1).sum((1, 2)),
            y.sort(1)[0][:, 0].mean(-1),
        )


def test_feature_maps_are_reduced_where_they_stand() -> None:
    module, x = Head(), torch.randn(SHAPE)
    assert_ports(module, x)
    calls = convert(module.eval(), (x,)).network.calls
    assert sum(call.target == "jnp.transpose" for call in calls) == 1


def test_what_cannot_be_exported_with_an_open_batch() -> None:
    forwards = (
        lambda x: torch.linalg.matrix_norm(x, "nuc"),
        lambda x: torch.linalg.matrix_norm(x, 1),
        lambda x: torch.linalg.matrix_norm(x, -float("inf"), keepdim=True),
    )
    assert_ports(Fn(*forwards), torch.randn(SHAPE), batch_axis=None)


def test_correction_that_leaves_nothing() -> None:
    with pytest.raises(UnsupportedError, match="correction must be less than the number of elements, 3; got 3"):
        convert(Fn(lambda x: x.var(1, correction=3)), (torch.randn(SHAPE),))
