"""Dense layers, products of matrices, attention, linear algebra."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import Fn, assert_ports
from torch_bridge.lowering.convert import convert

SHAPE = (2, 3, 4, 5)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "square": (lambda: nn.Linear(4, 4), (2, 4)),
    "no-bias": (lambda: nn.Linear(4, 3, bias=False), (2, 3, 4)),
    "four-dimensions": (lambda: nn.Linear(5, 5), SHAPE),
    "one-in": (lambda: nn.Linear(1, 3), (2, 1)),
    "one-out": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (2, 4)),
    "one-to-one": (lambda: nn.Linear(1, 1), (2, 3, 1)),
    "adaptive-pool-2-3": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(24, 3)),
        SHAPE,
    ),
    "flatten-uneven-map": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, (2, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3)),
        SHAPE,
    ),
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True), (2, 4, 6)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", LAYERS)
def test_layer(case: str) -> None:
    make, shape = LAYERS[case]
    assert_ports(make(), torch.randn(shape))


def test_weights_that_the_batch_makes() -> None:
    assert_ports(Fn(lambda x: (F.linear(x, x[:, 0]), F.linear(x[:, 0], x[:, 1], x[:, 0, 0]))), torch.randn(3, 2, 4))


def test_one_dimensional_input() -> None:
    assert_ports(nn.Linear(4, 3), torch.randn(4), batch_axis=None)


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias: bool) -> None:
    module = assert_ports(nn.Bilinear(3, 4, 5, bias=bias), torch.randn(2, 6, 3), torch.randn(2, 6, 4))
    assert type(module).__name__ == "Bilinear"


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "matmul": (
        lambda x: x @ x.mT,
        lambda x: x.transpose(1, 2) @ x[:, :1].permute(0, 2, 3, 1),
        lambda x: x @ x[0, 0, 0],
        lambda x: x[0, 0, :, 0] @ x,
        lambda x: x[0, 0, 0] @ x[0, 0, 0],
        lambda x: x[:, :, :1] @ x.mT,
        lambda x: x[0, 0] @ x[:, 0].mT,
    ),
    "products": (
        lambda x: x[0, 0].mm(x[0, 0].t()),
        lambda x: x[:, 0].bmm(x[:, 1].mT),
        lambda x: x[0, 0].mv(x[0, 0, 0]),
        lambda x: x[0, 0, 0].dot(x[0, 0, 1]),
        lambda x: torch.outer(x[0, 0, 0], x[0, 0, :, 1]),
        lambda x: torch.inner(x[:, 0], x[0, 1]),
        lambda x: torch.tensordot(x, x, dims=([1, 2], [1, 2])),  # type: ignore[call-overload]
    ),
    "products-added": (
        lambda x: torch.addmm(x[0, 0, 0], x[0, 0].t(), x[0, 1], beta=2, alpha=0.5),
        lambda x: torch.addbmm(x[0, 0, :, :1], x[:, 0], x[:, 1].mT),
        lambda x: torch.baddbmm(x[:, 0, :, :4], x[:, 0], x[:, 1].mT, beta=0),
        lambda x: torch.addmv(x[0, 0, :, 0], x[0, 0], x[0, 0, 0]),
        lambda x: torch.addr(x[0, 0], x[0, 0, :, 0], x[0, 0, 0]),
        lambda x: torch.linalg.multi_dot([x[0, 0], x[0, 0].t(), x[0, 1]]),
    ),
    "einsum": (
        lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
        lambda x: torch.einsum("...ij,...jk->...ik", x, x.mT),
        lambda x: torch.einsum("bchw, kw", x.permute(0, 2, 1, 3), x[0, 0]),
        lambda x: torch.einsum("bcii->bci", x[..., :4]),
        lambda x: torch.einsum("bchw,bxhw->bchw", x, x[:, :1]),
        lambda x: torch.einsum("bchw,bcxw->bchw", x, x[:, :, :1].transpose(1, 3).transpose(1, 3)),
        lambda x: torch.einsum("bhwc,c->bhw", x.permute(0, 2, 3, 1), x[0, :, 0, 0]),
    ),
    "other-products": (
        lambda x: torch.kron(x[0, 0], x[0, 1]),
        lambda x: torch.linalg.vecdot(x, x.sin(), dim=1),
        lambda x: torch.linalg.cross(x, x.sin(), dim=1),
        lambda x: torch.cdist(x[:, 0], x[:, 1]),
        lambda x: torch.cdist(x[:, 0], x[:, 1, :2], p=1.0),
        lambda x: torch.dist(x, x.sin(), 3),
        lambda x: torch.renorm(x, 2, 1, 1.5),
    ),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x[..., :2], is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, 1:], scale=0.3),
        lambda x: F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2], is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, 1:2], enable_gqa=True),
    ),
    "attention-masks": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(4, 4).tril().bool()),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(4, 4).tril(-1).bool()),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.mT),
        lambda x: F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2], attn_mask=x[:, 0] @ x[:, 1].mT > 0),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x[:, :, :1] @ x.mT).clamp(min=0).log()),
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", FUNCTIONS)
def test_function(case: str) -> None:
    assert_ports(Fn(*FUNCTIONS[case]), torch.randn(SHAPE), batches=(1,))


def test_einsum_of_three() -> None:  # torch.export fixes the batch there
    forward = lambda x: torch.einsum("bchw,c,h->b", x, x[0, :, 0, 0], x[0, 0, :, 0])  # noqa: E731
    assert_ports(Fn(forward), torch.randn(SHAPE), batch_axis=None)


class Tied(nn.Module):
    """Tied and shared weights, a layer called twice, functional calls, a buffer outside of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight
        self.w = nn.Parameter(torch.ones(3, 5))
        self.register_buffer("m", torch.ones(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.tanh(self.a(x))) * self.m
        y = F.linear(self.a(y), self.w, self.b.bias[:3])
        return y @ self.w + F.linear(x, self.a.weight.t()) + (self.a.weight + self.b.weight).sum()


class Scores(nn.Module):
    """Products of feature maps with themselves and with bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.w = nn.Conv2d(3, 6, 1), nn.Parameter(torch.ones(3, 6, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.c(x)
        f = y.flatten(2)
        q = torch.softmax(f.transpose(1, 2) @ f, -1)
        return (f @ q.transpose(1, 2)).sum(-1), torch.einsum("bchw,kcd->bkdh", y, self.w)


class SelfAttention(nn.Module):
    """Attention as it is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        a = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.o((y + a).transpose(1, 2).reshape(b, n, c))


class Attention(nn.Module):
    """`nn.MultiheadAttention` with weights handed out, a mask and padding (True: not attended to), other key sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.MultiheadAttention(6, 2, batch_first=True)
        self.two = nn.MultiheadAttention(6, 3, kdim=4, vdim=5, batch_first=True, bias=False)

    def forward(self, x: Tensor) -> Any:
        mask = torch.ones(4, 4).triu(1).bool()
        padding = (x[..., 0] > 1) & (torch.arange(4) > 0)
        y, weights = self.one(x, x, x, attn_mask=mask, key_padding_mask=padding)
        return y, weights, self.two(y, x[..., :4], x[..., 1:], need_weights=False)[0]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "tied": (Tied, (2, 5), 1),  # a weight used both ways round
    "scores": (Scores, SHAPE, 1),
    "self-attention": (SelfAttention, (2, 4, 6), 0),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", NETWORKS)
def test_network(case: str) -> None:
    make, shape, count = NETWORKS[case]
    assert_ports(make(), torch.randn(shape))
    calls = convert(make().eval(), (torch.randn(shape),)).network.calls
    assert sum(call.target == "jnp.transpose" for call in calls) == count


def test_multihead_attention() -> None:
    assert_ports(Attention(), torch.rand(2, 4, 6))


def test_attention_dropout_in_evaluation_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"dropout_p=self\.p if self\.training"):
        convert(Fn(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)), (torch.randn(SHAPE),))
