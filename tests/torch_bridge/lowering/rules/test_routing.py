"""Parts of language models: attention with shared keys, rotary embeddings, experts and the routes to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import Fn, assert_ports
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering.convert import convert

attend: Any = F.scaled_dot_product_attention
CAUSAL = torch.ones(4, 4).tril().bool()

ATTENTION: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "shared-keys": (
        lambda x: attend(x, x[:, :3], x[:, 3:], enable_gqa=True),
        lambda x: attend(x, x[:, :1], x[:, 1:2], enable_gqa=True, is_causal=True),
        lambda x: attend(x, x[:, :2, :3], x[:, :2, 1:, :2], enable_gqa=True, scale=0.3),
        lambda x: attend(x, x[:, :2], x[:, 2:4], enable_gqa=True, attn_mask=CAUSAL),
        lambda x: attend(x, x[:, :2], x[:, 2:4], enable_gqa=True, attn_mask=x @ x.mT),
        lambda x: attend(x[0], x[0, :2], x[0, 2:4], enable_gqa=True, is_causal=True),
        lambda x: attend(x[0], x[0, :2], x[0, 2:4], enable_gqa=True, attn_mask=x[0] @ x[0].mT > 0),
    ),
    "causal": (
        lambda x: attend(x[:, :, :2], x, x, is_causal=True),
        lambda x: attend(x, x[:, :, :2], x[:, :, 2:], is_causal=True, scale=1.0),
        lambda x: attend(x[0, 0], x[0, 1], x[0, 2], is_causal=True),
        lambda x: attend(x[:, None], x[:, None], x[:, None] * 2, is_causal=True),
    ),
    "broadcast": (
        lambda x: attend(x[:, :1], x, x),
        lambda x: attend(x, x[:1], x[:1, :1]),
        lambda x: attend(x, x, x, attn_mask=x[:, :1] @ x[:, :1].mT),
        lambda x: attend(x, x, x, attn_mask=torch.full((4, 4), -1e30, dtype=x.dtype).triu(1)),
        lambda x: attend(x, x, x, attn_mask=torch.full((4, 4), -torch.inf, dtype=x.dtype).triu()),
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str) -> None:
    assert_ports(Fn(*ATTENTION[case]), torch.randn(2, 6, 4, 4), batches=(1,))


def halves_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Rotary(nn.Module):
    """Positions as angles: with halves of features, and with neighbours as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 4)
        self.register_buffer("rates", 1.0 / 100 ** (torch.arange(0, 4, 2) / 4), persistent=False)
        self.rates: Tensor

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, 3, 4).transpose(1, 2)
        k = self.k(x).view(n, length, 1, 4).transpose(1, 2)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            angles = (self.rates[None, :, None] @ places[:, None].to(x.dtype)).transpose(1, 2)
            angles = torch.cat([angles, angles], -1)[:, None]
        turned = [y * angles.cos() + halves_turned(y) * angles.sin() for y in (q, k)]
        apart = torch.polar(torch.ones(length, 2, dtype=x.dtype), torch.outer(torch.arange(length), self.rates))
        pairs = torch.view_as_complex(q.reshape(n, 3, length, 2, 2)) * apart
        table = torch.stack([apart.real, apart.imag])[:, places]
        return attend(*turned, k, enable_gqa=True), torch.view_as_real(pairs).flatten(3), table


def test_rotary_embeddings() -> None:
    assert_ports(Rotary(), torch.randn(2, 5, 12), torch.tensor([[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]]))


class Experts(nn.Module):
    """The best two of four experts for each row, as a sum over all of them, and as rows sent and added up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(4))
        self.up, self.down = nn.Parameter(torch.ones(4, 6, 3)), nn.Parameter(torch.ones(4, 3, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = self.gate(x).softmax(-1)
        weights, chosen = scores.topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        gates = torch.zeros_like(scores).scatter_add(1, chosen, weights)
        mask = F.one_hot(chosen, 4)
        dense: Any = sum(gates[:, k, None] * expert(x) for k, expert in enumerate(self.experts))
        rows = torch.arange(x.shape[0])[:, None].expand(-1, 2).reshape(-1)
        order = chosen.reshape(-1).argsort(stable=True)
        hidden = torch.einsum("ni,nij->nj", x[rows[order]], self.up[chosen.reshape(-1)[order]]).relu()
        sent = torch.einsum("ni,nij->nj", hidden, self.down[chosen.reshape(-1)[order]])
        added = torch.zeros_like(dense).index_add(0, rows[order], sent * weights.reshape(-1)[order, None])
        load = mask.sum((0, 1)) * scores.mean(0)
        return dense, added, load, torch.histc(chosen.to(x.dtype), bins=4, min=0, max=3)


def test_experts() -> None:
    assert_ports(Experts(), torch.randn(5, 6), batches=(2, 7))


COUNTED: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: torch.histc(x, 5),
    lambda x: torch.histc(x, 5, -1, 1),
    lambda x: torch.histc(torch.full_like(x, 2.0), 4),
    lambda x: torch.zeros(4, dtype=x.dtype).index_add(0, x[:, 0, 0].argsort(), x[:, 0, 1]),
    lambda x: torch.zeros(7, dtype=torch.long).scatter_add(0, (x > 0).long().reshape(-1), (x > 1).long().reshape(-1)),
    lambda x: torch.searchsorted(x.sort(-1)[0], x.sin(), right=True),
    lambda x: torch.searchsorted(x.sort(-1)[0], x.sin(), side="left", out_int32=True),
    lambda x: torch.searchsorted(x, x.sin(), sorter=x.argsort(-1)),
    lambda x: torch.searchsorted(torch.tensor([0.0, 1.0], dtype=x.dtype), 0.5),
    lambda x: torch.bucketize(x, x[0, 0].sort()[0], right=True),
    lambda x: torch.bucketize(0.3, x[0, 0].sort()[0]),
)


def test_counted_and_searched() -> None:
    assert_ports(Fn(*COUNTED), torch.randn(4, 3, 5), batch_axis=None)


@pytest.mark.parametrize(
    ("forward", "advice"),
    [
        (lambda x: x[x > 0], r"use torch\.where\(mask, x, other\)"),
        (lambda x: x[:, x.sum((0, 2)) > 0], r"use torch\.where\(mask, x, other\)"),
        (lambda x: torch.zeros_like(x[0]).index_add(0, torch.where(x[0] > 0)[0], x[0, :1]), "multiply by its gate"),
        (lambda x: x.nonzero(), r"first k places, torch\.nonzero_static\(mask, size=k\)"),
        (lambda x: torch.unique(x, return_counts=True), r"sort the values.* mark where a new value begins"),
        (lambda x: torch.unique_consecutive(x[0, 0]), "sort the values"),
        (lambda x: (x > 0).long().reshape(-1).bincount(minlength=4), r"count with F\.one_hot\(x, n\)\.sum\(0\)"),
        (lambda x: F.one_hot((x > 0).long()), "pass num_classes"),
        (lambda x: x[:, : int((x > 0).sum())], "XLA needs"),
        (lambda x: torch.split(x, (x[0, 0, :2] > 0).long().tolist(), 1), "on values, and XLA needs"),
        (lambda x: torch.repeat_interleave(x, (x[:, 0, 0] > 0).long(), 0), "give the repeats as constants"),
    ],
    ids="mask mask-of-columns places nonzero unique consecutive bincount one-hot slice split repeat".split(),
)
def test_sizes_that_depend_on_values_are_refused_with_advice(forward: Callable[[Tensor], Any], advice: str) -> None:
    with pytest.raises(UnsupportedError, match=advice):
        convert(Fn(forward), (torch.randn(3, 3, 5),), opened=OpenAxes(None))
