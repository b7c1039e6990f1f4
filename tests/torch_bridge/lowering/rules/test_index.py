"""Indexing, scattering, assignment in place; tensors made from sizes; what has no fixed size is refused."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import Fn, assert_ports
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering.convert import convert

SHAPE = (2, 3, 4, 5)


def written(write: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Returns a forward that writes into a copy of the input."""

    def forward(x: Tensor) -> Tensor:
        x = x * 2
        write(x)
        return x

    return forward


def put(x: Tensor, index: Any, value: Any) -> None:
    x[index] = value


ALL = slice(None)
MASK = torch.tensor([True, False, True])

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "integers": (
        lambda x: x[:, [0, 2]],
        lambda x: x[:, [0, -1], [1, 1]],
        lambda x: x[:, [0, 2], :, [1, 3]],
        lambda x: x[:, None, [0, 1]],
        lambda x: x[..., torch.tensor([[0, 1], [2, 4]])],
        lambda x: x[:, torch.tensor(1)],
    ),
    "masks": (
        lambda x: x[:, MASK].flatten(1) * 2,
        lambda x: x[:, :, torch.ones(4, 5).tril().bool()],
        lambda x: x[:, torch.tensor([False, True, True]), 1],
    ),
    "computed": (
        lambda x: x[torch.arange(x.shape[0]), x.sum((2, 3)).argmax(1)],
        lambda x: x.gather(1, x.argsort(1)),
        lambda x: x.gather(2, x[:, :2, :3].argsort(2)),
        lambda x: torch.take(x, torch.tensor([0, 7, -1])),
        lambda x: x.index_select(1, torch.tensor([2, 0])),
    ),
    "assigned": (
        written(lambda x: put(x, (ALL, 0), 1.0)),
        written(lambda x: put(x, (ALL, slice(0, 2)), x[:, 1:3] * 1)),
        written(lambda x: put(x, (ALL, 0, slice(1, 3)), x[:, 1, :2])),
        written(lambda x: put(x, (..., -1), torch.ones(4, dtype=x.dtype))),
        written(lambda x: put(x, (ALL, ALL, slice(None, None, 2)), 0.5)),
    ),
    "assigned-by-index": (
        written(lambda x: put(x, x > 0, 0.0)),
        written(lambda x: put(x, (ALL, MASK), 3.0)),
        written(lambda x: put(x, (ALL, [0, 2]), 1.0)),
        written(lambda x: put(x, (ALL, torch.tensor([0, 2])), x[:, 1:] * 2)),
        written(lambda x: put(x, (ALL, [0, 1], [1, 2]), -1.0)),
        written(lambda x: put(x, x.sum((2, 3)) > 0, 7.0)),
    ),
    "changed-in-place": (
        written(lambda x: x[:, 0].mul_(2)),
        written(lambda x: x[:, 0].zero_()),
        written(lambda x: x[:, 0].copy_(x[:, 1])),
        written(lambda x: x.view(x.size(0), -1)[:, 3:9].add_(1)),
        written(lambda x: x.transpose(1, 2)[:, 0].add_(1)),
        written(lambda x: x.diagonal(0, 2, 3).fill_(2)),
        written(lambda x: x[:, 0].masked_fill_(x[:, 1] > 0, 0)),
    ),
    "scattered": (
        lambda x: x.scatter(1, x.argsort(1), x * 2),
        lambda x: x.scatter(1, x[:, :1, :2].argsort(2), 2.0),
        lambda x: x.scatter_add(1, (x > 0).long(), x),
        lambda x: x.scatter_reduce(1, (x > 0).long(), x, "amax"),
        lambda x: x.scatter_reduce(2, (x > 0).long(), x, "prod", include_self=False),
        lambda x: x.scatter_reduce(1, (x > 0).long(), x, "mean"),
        lambda x: x.scatter_reduce(1, (x > 0).long()[:, :2, :3], x[:, :2, :3], "sum", include_self=False),
    ),
    "by-index": (
        lambda x: x.index_add(1, torch.tensor([0, 0]), x[:, 1:], alpha=2),
        lambda x: x.index_copy(2, torch.tensor([3, 1]), x[:, :, :2]),
        lambda x: x.index_fill(1, torch.tensor([0, 2]), 3.0),
        lambda x: x.put(torch.tensor([0, 7]), x[0, 0, 0, :2]),
        lambda x: x.index_put((torch.tensor([0, 0]), torch.tensor([1, 1])), x[0, 0], accumulate=True),
        lambda x: x.masked_scatter(x > 0, x.flip(1)),
    ),
    "scattered-parts": (
        lambda x: torch.select_scatter(x, x[:, 0], 1, -1),
        lambda x: torch.slice_scatter(x, x[:, :, :2], 2, 1, 4, 2),
        lambda x: torch.diagonal_scatter(x, x.diagonal(0, 2, 3) * 2, 1, 2, 3),
    ),
    "searched": (
        lambda x: torch.bucketize(x, torch.tensor([-0.5, 0.0, 1.0])),
        lambda x: torch.bucketize(x.round(), torch.tensor([-1.0, 0.0, 1.0]), right=True),
        lambda x: torch.searchsorted(x.sort(-1)[0], x),
        lambda x: torch.isin(x.round(), torch.tensor([1.0, 0.0])),
    ),
    "created": (
        lambda x: x + torch.arange(5),
        lambda x: torch.arange(x.size(0)),
        lambda x: torch.arange(1, 2 * x.size(0), 2, dtype=x.dtype),
        lambda x: torch.zeros(x.size(0), 3, dtype=x.dtype),
        lambda x: torch.ones(x.size(0) * 2, 3) * 2,
        lambda x: torch.full((x.size(0), 3), 2.0),
        lambda x: torch.eye(x.size(0), 3),
        lambda x: x * torch.linspace(0, 1, 5, dtype=x.dtype),
        lambda x: x * x.size(0) / x.numel(),
    ),
    "created-alike": (
        lambda x: torch.zeros_like(x) + torch.ones_like(x),
        lambda x: torch.full_like(x, 2, dtype=torch.int64),
        lambda x: x.new_zeros(x.size(0), 2),
        lambda x: x.new_ones(2),
        lambda x: x.new_full((x.size(0), 2), 3.0),
        lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        lambda x: torch.empty(x.shape[0], 2).fill_(1),
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", FUNCTIONS)
def test_function(case: str) -> None:
    assert_ports(Fn(*FUNCTIONS[case]), torch.randn(SHAPE), batches=(1,))


def test_take_along_dim() -> None:  # torch.export fixes the batch there
    forwards = (lambda x: torch.take_along_dim(x, x.argsort(-1), dim=-1), lambda x: torch.take_along_dim(x, x.argmax()))
    assert_ports(Fn(*forwards), torch.randn(SHAPE), batch_axis=None)


class Lookup(nn.Module):
    """Integer inputs that index parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(7, 4))
        self.order: Tensor
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]), persistent=False)

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table[index]
        return rows[..., self.order].sum(1), self.table.t()[:, index].amax(0)


def test_integer_inputs() -> None:
    assert_ports(Lookup(), torch.randint(0, 7, (3, 2)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x[x > 0],
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: torch.unique(x),
    ],
)
def test_results_of_no_fixed_size_are_refused(forward: Callable[[Tensor], Any]) -> None:
    with pytest.raises(UnsupportedError, match="XLA needs fixed sizes"):
        convert(Fn(forward), (torch.randn(SHAPE),))


def test_assignment_of_as_many_values_as_a_mask_chooses_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.where\(mask, y, x\)"):
        convert(Fn(written(lambda x: put(x, x > 0, torch.arange(60.0)))), (torch.randn(SHAPE),), opened=OpenAxes(None))


class ShiftMask(nn.Module):
    """A mask that begins with `x.new_zeros` and depends on no value of `x`, as that of shifted windows."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(4, 6)
        for k, rows in enumerate((slice(0, -2), slice(-2, None))):
            mask[rows] = k
        mask = mask.masked_fill(mask != 0, -100.0)
        return x + mask + torch.full_like(x[:1, :, :], 0.1) + torch.zeros_like(mask)


def test_what_takes_only_dtype_and_shape_from_an_input_is_folded() -> None:
    module = assert_ports(ShiftMask(), torch.randn(2, 4, 6))
    source = inspect.getsource(type(module))
    assert "slice_scatter" not in source and "self.constant" in source


def test_constants_of_one_value_keep_their_64_bits_under_x64() -> None:
    assert_ports(Fn(lambda x: torch.full((3,), 2**33) + x.long()), torch.randn(2, 3))
