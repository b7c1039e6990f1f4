"""Forwards that count the batch: its size in shapes, masks, labels and averages, for batches of 1, 7 and more."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import InputError, UnsupportedError
from jaxensemble.running.plan import Plan
from tests.helpers.porting import Fn, assert_close, assert_ports
from torch_bridge.graph.sizes.functions import DirectDistances
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering.convert import convert

WIDE = (4, 6)
MAPS = (4, 3, 4, 5)
CLIPS = (4, 2, 3, 4, 5)

CODES = torch.linspace(-1, 1, 30, dtype=torch.float64).sin().reshape(5, 6)
MANY = torch.linspace(-3, 3, 180, dtype=torch.float64).sin().reshape(30, 6)
SUPPORT = torch.linspace(-2, 2, 6, dtype=torch.float64)


def without_self(x: Tensor) -> Tensor:
    return ~torch.eye(x.shape[0], dtype=torch.bool)


def two_views(x: Tensor) -> Tensor:
    """NT-Xent: the loss of SimCLR, of two views of every row."""
    both = F.normalize(torch.cat([x[:, :3], x[:, 3:]]), dim=1)
    logits = both @ both.T / 0.5
    logits = logits.masked_fill(torch.eye(2 * x.shape[0], dtype=torch.bool), float("-inf"))
    labels = (torch.arange(2 * x.shape[0]) + x.shape[0]) % (2 * x.shape[0])
    return F.cross_entropy(logits, labels, reduction="none")


def projected(x: Tensor) -> Tensor:
    """The projection of categorical critics (C51): every atom's probability goes to its two neighbours."""
    probs = x.softmax(1)
    places = ((x[:, :1] + 0.9 * SUPPORT).clamp(-2, 2) + 2) / 0.8
    low, high = places.floor().long(), places.ceil().long()
    low = torch.where((high > 0) & (low == high), low - 1, low)
    high = torch.where((low < 5) & (low == high), high + 1, high)
    offset = torch.linspace(0, (x.shape[0] - 1) * 6, x.shape[0]).long().unsqueeze(1).expand(x.shape[0], 6)
    target = torch.zeros_like(probs)
    target.view(-1).index_add_(0, (low + offset).view(-1), (probs * (high - places)).view(-1))
    target.view(-1).index_add_(0, (high + offset).view(-1), (probs * (places - low)).view(-1))
    return target


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vector quantisation: the nearest code, gradients passed straight through."""
    squared = (x**2).sum(1, keepdim=True) + (CODES**2).sum(1) - 2 * x @ CODES.t()
    chosen = squared.argmin(1)
    hot = torch.zeros(chosen.shape[0], 5, dtype=x.dtype).scatter_(1, chosen.unsqueeze(1), 1)
    codes = hot @ CODES
    return x + (codes - x).detach(), (-(hot.mean(0) * (hot.mean(0) + 1e-10).log()).sum()).exp()


def mixture(x: Tensor) -> Tensor:
    """The log-likelihood of every row under a mixture of Gaussians."""
    scale = (CODES**2 + 0.5).unsqueeze(0).expand(x.shape[0], -1, -1)
    normal = torch.distributions.Normal(CODES.expand(x.size(0), *CODES.shape), scale, validate_args=False)
    return (normal.log_prob(x.unsqueeze(1)).sum(2) - math.log(5)).logsumexp(1)


def kernel(x: Tensor) -> Tensor:
    distances = torch.cdist(x, x) ** 2
    return torch.exp(-distances / (2 * 1.5**2))


Forwards = tuple[Callable[[Tensor], Any], ...]

CASES: dict[str, tuple[tuple[int, ...], Forwards]] = {
    "made": (
        WIDE,
        (
            lambda x: torch.arange(x.shape[0]),
            lambda x: torch.arange(1, x.size(0) + 1, dtype=x.dtype) * 2,
            lambda x: torch.arange(0, 4 * x.shape[0], 4),
            lambda x: torch.zeros(x.shape[0], 3),
            lambda x: torch.ones(x.size(0), 6, dtype=x.dtype) + x,
            lambda x: torch.full((x.shape[0], 2), 0.5),
            lambda x: torch.eye(x.shape[0]),
            lambda x: torch.eye(x.shape[0], x.shape[0] + 1),
            lambda x: x.new_zeros(x.shape[0], 2, 2),
            lambda x: x.new_ones((x.size(0),)),
            lambda x: x.new_full((2, x.size(0)), 3.0),
            lambda x: torch.linspace(0, 1, x.shape[0], dtype=x.dtype),
            lambda x: torch.linspace(-1, 1, 2 * x.shape[0] + 1, dtype=x.dtype),
            lambda x: torch.tril(torch.ones(x.shape[0], x.shape[0])),
            lambda x: torch.full((x.shape[0],), 3, dtype=torch.long),
            lambda x: torch.zeros(x.shape[0] + 1, 6, dtype=x.dtype),
            lambda x: torch.ones_like(x[:, 0]).cumsum(0),
            lambda x: torch.arange(x.shape[0] - 1, -1, -1),
            lambda x: torch.tensor(x.shape[0]) + torch.zeros(3, dtype=torch.long),
        ),
    ),
    "views": (
        MAPS,
        (
            lambda x: x.view(x.shape[0], -1),
            lambda x: x.view(x.size(0), 3, 20),
            lambda x: x.reshape(x.shape[0] * 3, 4, 5),
            lambda x: x.view(-1, 4, 5).view(x.shape[0], 3, 4, 5),
            lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0] * 20, 3).view(x.shape[0], 4, 5, 3),
            lambda x: x.flatten(0, 1).unflatten(0, (x.shape[0], 3)),
            lambda x: x.flatten(0, 1).unflatten(0, (-1, 3)),
            lambda x: x.view(1, x.shape[0], 3, 4, 5),
            lambda x: x.view(1, -1, 4, 5).reshape(x.shape[0], -1),
            lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3]),
            lambda x: x.reshape(x.numel() // 5, 5),
            lambda x: x.transpose(0, 1).reshape(3, x.shape[0] * 20),
            lambda x: x.transpose(0, 1).contiguous().view(3, -1, 5),
            lambda x: x.repeat_interleave(2, 0).view(x.shape[0], 2, 3, 4, 5)[:, 1],
        ),
    ),
    "expansions": (
        WIDE,
        (
            lambda x: CODES[0].expand(x.shape[0], -1) + x,
            lambda x: torch.cat([CODES[:1].unsqueeze(0).expand(x.shape[0], -1, -1), x.unsqueeze(1)], 1),
            lambda x: torch.cat([CODES.repeat(x.size(0), 1, 1), x[:, None].expand(-1, 5, -1)], 2),
            lambda x: CODES.unsqueeze(0).repeat(x.size(0), 1, 1) * x.unsqueeze(1),
            lambda x: torch.broadcast_to(CODES[1], (x.shape[0], 6)),
            lambda x: x.unsqueeze(0).expand(x.shape[0], x.shape[0], 6) - x.unsqueeze(1),
            lambda x: x.repeat(3, 1, 1).reshape(3 * x.shape[0], 6).view(3, x.shape[0], 6),
            lambda x: x.repeat_interleave(3, dim=0),
            lambda x: x.repeat(2, 1).view(2, x.shape[0], 6).sum(0),
            lambda x: x.tile(1, 2),
            lambda x: x.mean(0, keepdim=True).expand_as(x),
            lambda x: x.mean(0).repeat(x.shape[0], 1),
            lambda x: x[:, :1].expand(x.shape[0], 4),
            lambda x: torch.cat([x, x.new_zeros(x.shape[0], 1)], 1),
            lambda x: F.pad(x, (0, 0, 1, 0)),
            lambda x: torch.stack([x, CODES[2].expand_as(x)], 1),
            lambda x: torch.arange(3).expand(x.shape[0], 3) + torch.arange(x.shape[0]).unsqueeze(1),
        ),
    ),
    "averages": (
        WIDE,
        (
            lambda x: x / x.shape[0],
            lambda x: x.sum(0) / x.size(0),
            lambda x: x * (1.0 / x.shape[0]),
            lambda x: x * (1 / x.shape[0]) + 1 / (x.shape[0] + 1),
            lambda x: x / x.shape[0] ** 0.5,
            lambda x: x / math.sqrt(x.shape[0] * 6),
            lambda x: (x - x.mean(0)).T @ (x - x.mean(0)) / (x.shape[0] + 1),
            lambda x: (x**2).sum() / x.numel(),
            lambda x: x.sum() / (x.shape[0] * x.shape[1]),
            lambda x: x.div(2 * x.shape[0]) - x.shape[0],
            lambda x: x.pow(2).sum(0).sqrt().div(x.shape[0] - 0.5),
            lambda x: x * (x.shape[0] ** 2 - 1) + math.sqrt(2) * math.sqrt(x.shape[0] - 0.5),
            lambda x: x - x.logsumexp(0) + torch.log(torch.tensor(x.shape[0], dtype=x.dtype)),
            lambda x: x * (x.shape[0] // 2 + x.shape[0] % 3),
            lambda x: x.add(1, alpha=x.shape[0]),
            lambda x: x * (x.shape[0] - 1) / x.shape[0],
            lambda x: x[:, :2] * torch.full((2,), 1.0 / x.shape[0]),
            lambda x: x.clamp(max=1 / x.shape[0]),
            lambda x: x.masked_fill(x > 0, 1 / x.shape[0]),
            lambda x: torch.addcmul(x, x, x, value=0.5 / x.shape[0]),
            lambda x: x.lerp(x * 2, 1 / x.shape[0]),
            lambda x: x.abs() ** (1 / (x.shape[0] + 1)),
            lambda x: torch.where(x > 0, x, 1 / x.shape[0]),
            lambda x: x.index_fill(1, torch.tensor([2]), 1 / x.shape[0]),
            lambda x: x.scatter(1, torch.zeros(1, 1, dtype=torch.long), 1 / x.shape[0]),
        ),
    ),
    "distances": (
        WIDE,
        (
            lambda x: torch.cdist(x, CODES),
            lambda x: torch.cdist(x, MANY),
            lambda x: torch.cdist(CODES, x),
            lambda x: torch.cdist(x, x),
            lambda x: torch.cdist(x, MANY, p=1),
            lambda x: torch.cdist(x, MANY, p=3.0),
            lambda x: torch.cdist(x, MANY, p=float("inf")),
            lambda x: torch.cdist(x, MANY, compute_mode="use_mm_for_euclid_dist"),
            lambda x: torch.cdist(x, MANY, compute_mode="donot_use_mm_for_euclid_dist"),
            lambda x: torch.cdist(x, CODES, compute_mode="use_mm_for_euclid_dist"),
            lambda x: torch.cdist(x.unsqueeze(0), CODES.unsqueeze(0)).squeeze(0),
            lambda x: torch.cdist(x.unsqueeze(1), CODES.expand(x.shape[0], -1, -1)).squeeze(1),
            lambda x: torch.cdist(x.view(-1, 2, 3), CODES.view(5, 2, 3)[:1].expand(x.shape[0], -1, -1)),
            lambda x: torch.cdist(x, CODES).argmin(1),
            lambda x: (x[:, None] - x[None]).pow(2).sum(-1),
            lambda x: (x.unsqueeze(1) - CODES).norm(dim=2).min(1).values,
            lambda x: F.pairwise_distance(x.unsqueeze(1), CODES),
            lambda x: F.cosine_similarity(x.unsqueeze(1), x.unsqueeze(0), dim=-1),
            kernel,
            lambda x: kernel(x).sum(1) / x.shape[0],
            lambda x: torch.exp(-(torch.cdist(x, MANY) ** 2) / 2).sum(1, keepdim=True),
        ),
    ),
    "pairs": (
        WIDE,
        (
            lambda x: x @ x.T,
            lambda x: F.cross_entropy(x @ x.T, torch.arange(x.shape[0])),
            lambda x: F.cross_entropy(x @ x.T / 0.1, torch.arange(x.size(0), device=x.device), reduction="none"),
            lambda x: F.nll_loss((x @ x.T).log_softmax(1), torch.arange(x.size(0))),
            lambda x: (x @ x.T).masked_fill(~without_self(x), -1e9).softmax(1),
            lambda x: (x @ x.T * without_self(x)).sum(1),
            lambda x: torch.where(without_self(x), x @ x.T, torch.zeros(x.shape[0], x.shape[0], dtype=x.dtype)),
            lambda x: (x @ x.T).diagonal(),
            lambda x: torch.diag(x @ x.T),
            lambda x: (x @ x.T).fill_diagonal_(0),
            lambda x: torch.triu(x @ x.T, 1).sum(),
            lambda x: (x @ x.T).tril(),
            two_views,
            lambda x: (x @ x.T - torch.eye(x.shape[0], dtype=x.dtype)).pow(2).mean(),
            lambda x: x @ x.T + torch.diag_embed(x[:, 0]),
            lambda x: F.kl_div(x.log_softmax(1), torch.full((x.shape[0], 6), 1 / 6), reduction="sum") / x.size(0),
            lambda x: (x[:, 0] > x[:, :1]).to(x.dtype) @ x,
            lambda x: torch.einsum("nd,md->nm", x, x),
            lambda x: torch.outer(x[:, 0], x[:, 1]),
            lambda x: (x.T @ x).flatten()[:-1].view(5, 7)[:, 1:].pow(2).sum() / x.shape[0],
            lambda x: torch.cov(torch.cat([x, x + 1]).T),
            lambda x: torch.cat([x, CODES]).T.corrcoef(),
            lambda x: x.T.cov(correction=0),
        ),
    ),
    "choices": (
        WIDE,
        (
            lambda x: x[torch.arange(x.shape[0]), x.argmax(1)],
            lambda x: x.softmax(1)[torch.arange(x.shape[0]), (x[:, 0] > 0).long()],
            lambda x: x.gather(1, x.argmax(1, keepdim=True)).squeeze(1),
            lambda x: x.view(-1, 2, 3)[torch.arange(x.shape[0]), (x[:, 0] > 0).long()],
            lambda x: x.view(-1, 2, 3)[torch.arange(x.shape[0])[:, None], :, torch.zeros(1, 1, dtype=torch.long)],
            lambda x: F.one_hot(x.argmax(1), 6).to(x.dtype) @ CODES.T,
            lambda x: torch.zeros(x.shape[0], 6).scatter_(1, x.argmax(1, keepdim=True), 1.0),
            lambda x: torch.zeros_like(x).scatter_add_(1, x.argsort(1), x),
            projected,
            quantised,
            mixture,
            lambda x: x.index_select(0, torch.arange(x.shape[0])),
            lambda x: x.flip(0)[torch.arange(x.shape[0])],
            lambda x: CODES[x[:, :5].argmax(1)],
            lambda x: x.new_zeros(5, 6).index_add_(0, x[:, :5].argmax(1), x),
            lambda x: x.new_zeros(5).scatter_add_(0, x[:, :5].argmax(1), x[:, 0]),
            lambda x: x.view(-1)[torch.arange(x.shape[0]) * 6 + x.argmax(1)],
            lambda x: x.take(torch.arange(x.shape[0]) * 6),
            lambda x: F.embedding(torch.full((x.shape[0],), 2), CODES),
            lambda x: torch.take_along_dim(x, x.argmin(1, keepdim=True), 1),
        ),
    ),
    "along": (
        WIDE,
        (
            lambda x: x.chunk(2, 1),
            lambda x: x.split(4, 1),
            lambda x: x.unbind(1)[2],
            lambda x: x.flip(0),
            lambda x: x.roll(1, 0),
            lambda x: x.cumsum(0),
            lambda x: x.sort(0).values,
            lambda x: torch.cat([x, x * 2], 0),
            lambda x: torch.cat([x, x * 2], 0).chunk(2, 0)[1],
            lambda x: torch.cat([x, CODES], 0)[: x.shape[0]],
            lambda x: torch.cat([x, CODES], 0).softmax(0)[x.shape[0] :],
            lambda x: torch.cat([x, -x])[x.shape[0] :],
            lambda x: torch.stack([x, x + 1]).view(2 * x.shape[0], 6),
            lambda x: x.repeat(3, 1).split(x.shape[0])[2],
            lambda x: x[: x.shape[0] - 0],
            lambda x: x[-1],
            lambda x: x[:2].sum(0),
            lambda x: x.softmax(0) - x.mean(0) + x.amax(0),
            lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(),
            lambda x: x.narrow(0, 0, x.shape[0]),
        ),
    ),
    "maps": (
        MAPS,
        (
            lambda x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2)),
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
            lambda x: torch.cat([x, torch.linspace(-1, 1, 5).view(1, 1, 1, 5).expand(x.shape[0], 1, 4, 5)], 1),
            lambda x: torch.cat([x, torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij"))
                                 .repeat(x.size(0), 1, 1, 1)], 1),
            lambda x: F.grid_sample(x, F.affine_grid(torch.eye(2, 3, dtype=x.dtype).repeat(x.shape[0], 1, 1),
                                                     list(x.shape), align_corners=False), align_corners=False),
            lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), x.size(1)).view(x.size(0), x.size(1), 1, 1) * x,
            lambda x: x.view(x.shape[0], 3, -1) @ x.view(x.shape[0], 3, -1).transpose(1, 2) / (3 * 4 * 5),
            lambda x: x.reshape(x.shape[0], 3, 2, 2, 5).mean(3),
            lambda x: F.unfold(x, 2).view(x.shape[0], 3, 4, -1),
            lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)).flatten(1),
            lambda x: x.std(0, correction=0) + x.mean((0, 2, 3)).view(1, 3, 1, 1),
        ),
    ),
    "multiples": (
        WIDE,
        (
            lambda x: x.view(x.shape[0] // 2, 2, 6),
            lambda x: x.view(-1, 2, 6).mean(1),
            lambda x: x.reshape(2, x.shape[0] // 2, 6)[0],
            lambda x: torch.stack([x[: x.shape[0] // 2], x[x.shape[0] // 2 :]]),
            lambda x: x.chunk(2)[0] - x.chunk(2, 0)[1],
            lambda x: x.view(2, -1, 6).transpose(0, 1).reshape(x.shape[0], 6),
            lambda x: x.reshape(x.shape[0] // 2, 12),
            lambda x: x[::2] * x[1::2],
            lambda x: F.cosine_similarity(*x.chunk(2), dim=1),
            lambda x: x.unflatten(0, (2, -1)).sum(0) / x.shape[0],
        ),
    ),
    "branches": (
        WIDE,
        (
            lambda x: x.unsqueeze(0) if x.dim() == 1 else x * 2,
            lambda x: x * 2 if x.ndim == 2 and x.shape[1] == 6 else x,
            lambda x: x * 2 if x.shape[-1] > 5 else x,
            lambda x: x * 2 if x.size(0) >= 1 else x,
            lambda x: x * 2 if x.shape[0] else x,
            lambda x: x * 2 if x.shape[0] == x.mT.shape[1] else x,
            lambda x: x * 2 if x.numel() > 0 else x,
            lambda x: x * 2 if len(x.shape) == 2 else x,
            lambda x: x * max(1, x.shape[1] // 4),
            lambda x: x.reshape(x.shape[0], *x.shape[1:]),
        ),
    ),
}  # fmt: skip


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_function(case: str) -> None:
    shape, forwards = CASES[case]
    torch.manual_seed(0)
    batches = (2, 6) if case == "multiples" else (1, 7)
    with DirectDistances():
        assert_ports(Fn(*forwards), torch.randn(shape), batches=batches, gradients=case in ("averages", "distances"))


class States(nn.Module):
    """Recurrent layers whose first states are made for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.cell = nn.LSTM(3, 4, 2, batch_first=True), nn.GRU(4, 4), nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = torch.zeros(2, x.size(0), 4, dtype=x.dtype), x.new_zeros(2, x.shape[0], 4)
        h, (last, _) = self.lstm(x, states)
        g, _ = self.gru(h.transpose(0, 1), torch.zeros(1, x.size(0), 4, dtype=x.dtype))
        hidden = torch.ones(x.size(0), 4, dtype=x.dtype)
        for step in range(x.shape[1]):
            hidden = self.cell(h[:, step], hidden)
        return last.permute(1, 0, 2).reshape(x.size(0), -1), g.mean(0), hidden


class Clips(nn.Module):
    """A CNN over the frames of clips, `[B, T, C, H, W]` to `[B * T, C, H, W]` and back, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(24, 6)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 3, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, frames = x.shape[:2]
        h = self.fc(self.conv(x.flatten(0, 1)).relu().flatten(1)).unflatten(0, (batch, frames))
        h = torch.cat([self.token.expand(batch, -1, -1), h], dim=1) + self.places
        mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
        h = h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return h[:, 0], h.reshape(batch * 3, 6).view(batch, 3, 6).mean(1)


class InOne(nn.Module):
    """An ensemble within one module: `[B, D]` to `[K, B, D]`, and BatchEnsemble, whose members share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(3, 6, 5)), nn.Parameter(torch.zeros(3, 1, 5))
        self.shared, self.r, self.s = nn.Linear(5, 4), nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.baddbmm(self.bias, x.unsqueeze(0).expand(3, -1, -1), self.weight).tanh()
        flat = h.reshape(3 * x.shape[0], 5)
        r, s = (factor.repeat_interleave(x.shape[0], dim=0) for factor in (self.r, self.s))
        return (self.shared(flat * r) * s).view(3, x.shape[0], 4).transpose(0, 1), h.mean(0)


class Contrastive(nn.Module):
    """Two encoders and the loss of CLIP within the forward, with a queue of earlier rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(6, 4), nn.Linear(6, 4), nn.Parameter(torch.ones([]))
        self.queue = nn.Buffer(torch.zeros(5, 4))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)
        logits, labels = self.scale.exp() * a @ b.t(), torch.arange(x.shape[0], device=x.device)
        queued = torch.cat([(a * b).sum(1, keepdim=True), a @ self.queue.t()], 1) / 0.07
        return {
            "clip": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2,
            "moco": F.cross_entropy(queued, torch.zeros(x.shape[0], dtype=torch.long)),
            "near": (logits - 1e9 * torch.eye(x.shape[0], dtype=x.dtype)).argmax(1),
        }


class Codes(nn.Module):
    """VQ-VAE with its losses, over a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.codes = nn.Conv2d(3, 4, 3), nn.Embedding(30, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.conv(x).permute(0, 2, 3, 1).contiguous()
        chosen = torch.cdist(z.view(-1, 4), self.codes.weight).argmin(1)
        q = self.codes(chosen).view(z.shape)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(q.detach(), z)
        return (z + (q - z).detach()).permute(0, 3, 1, 2), loss, chosen.view(x.shape[0], -1)


MODELS: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...]]] = {
    "states": (States, ((4, 3, 3),)),
    "clips": (Clips, (CLIPS,)),
    "in-one": (InOne, (WIDE,)),
    "contrastive": (Contrastive, (WIDE, WIDE)),
    "codes": (Codes, (MAPS,)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", MODELS)
def test_network(case: str) -> None:
    make, shapes = MODELS[case]
    torch.manual_seed(0)
    with DirectDistances():
        assert_ports(make(), *map(torch.randn, shapes), batches=(1, 7))


def asserted(x: Tensor) -> Tensor:
    assert x.shape[0] > 1
    return x * 2


FOLLOWED: dict[str, Callable[[Tensor], Any]] = {
    "asserts": asserted,
    "comes to the same": lambda x: x * 2 if x.size(0) > 1 else x.mul(2),
    "of features": lambda x: x * 2 if x.shape[1] == 1 else x,
    "asserts that it is even": lambda x: asserted_even(x),
}


def asserted_even(x: Tensor) -> Tensor:
    assert x.shape[0] % 2 == 0, "pairs"
    return x.view(-1, 2, 6)


@pytest.mark.parametrize("case", FOLLOWED)
def test_decisions_that_all_batches_share_are_followed(case: str) -> None:
    convert(Fn(FOLLOWED[case]), (torch.randn(WIDE),))


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(4, 2, 3),
    "expand": lambda x: x[:1].expand(4, 6) + x,
    "table": lambda x: x + CODES[:4],
    "threshold": lambda x: x if x.shape[0] > 3 else -x,
    "off the diagonal": lambda x: (x @ x.T).flatten()[1:].view(x.shape[0] - 1, x.shape[0] + 1)[:, :-1],
    "parity": lambda x: x.view(-1, 2, 6) if x.shape[0] % 2 == 0 else -x,
    "range": lambda x: torch.stack([x[k] * k for k in range(x.shape[0])]),
    "len": lambda x: x / len(x),
    "iteration": lambda x: sum(row for row in x),
    "int": lambda x: x / int(x.shape[0]),
    "float": lambda x: x / float(x.shape[0]),
    "log": lambda x: x - math.log(x.shape[0]),
    "list": lambda x: [0.0] * x.shape[0] and x,
    "one": lambda x: x.squeeze(0) if x.shape[0] == 1 else x,
    "one-or-more": lambda x: x * 2 if x.size(0) > 1 else x,
    "normalised": lambda x: (x - x.mean(0)) if x.shape[0] != 1 else x,
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_open_batch_allows_names_the_line_and_the_cure(case: str) -> None:
    forward, x = REFUSED[case], torch.randn(WIDE)
    line = forward.__code__.co_firstlineno
    with pytest.raises(UnsupportedError, match=rf"(?s)test_open_batch\.py:{line}: .*batch_axis=None"):
        convert(Fn(forward), (x,))
    convert(Fn(forward), (x,), opened=OpenAxes(None))


class Apart(nn.Linear):
    """Distances within the batch, which PyTorch computes differently if there are many, without exact zeros."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = super().forward(input)
        return torch.cdist(h, h), torch.exp(-(torch.cdist(h, h[:1] * 2) ** 2)).sum(0) / h.shape[0]


def test_the_proof_runs_with_distances_of_many_rows() -> None:
    models: list[nn.Module] = [Apart(6, 4), Apart(6, 4)]
    x = torch.randn(30, 6)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, str(report)
    assert {"float64, batch of 1", "float64, batch of 7", "gradients, float64"} <= {row.stage for row in report.rows}


class Pairs(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).view(input.shape[0] // 2, 2, 4).mean(1)


def test_batches_of_pairs_take_any_number_of_pairs_and_no_other_size() -> None:
    models: list[nn.Module] = [Pairs(6, 4), Pairs(6, 4)]
    x = torch.randn(8, 6)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    report = torch_bridge.check(models, ensemble, (x,))
    assert report.passed, str(report)
    assert any(note.startswith("not compared for a batch of 7") for note in report.notes)
    assert_close(ensemble(x[:2].numpy())[1], models[1](x[:2]), 1e-6)
    with pytest.raises(InputError, match="reshape"):
        ensemble(x[:3].numpy())


@pytest.mark.parametrize(
    "forward",
    [lambda x: x / x.shape[0], lambda x: x + torch.arange(x.shape[0]).unsqueeze(1), lambda x: x @ x.T],
    ids=["average", "places", "pairs"],
)
def test_rows_that_know_of_each_other_are_not_run_apart(forward: Callable[[Tensor], Any]) -> None:
    x = torch.randn(WIDE)
    ensemble = torch_bridge.to_ensemble([nn.Sequential(nn.Linear(6, 6), Fn(forward)) for _ in range(2)], (x,))
    with pytest.raises(InputError, match="rows"):
        ensemble(x.numpy(), plan=Plan(members=1, rows=2))


def test_entries_may_be_taken_along_an_axis_by_another_input() -> None:
    """The exporter takes the batch sizes of the two inputs for different ones until it has compared them."""
    forward = Fn(lambda x, places: torch.take_along_dim(x, places, 1))
    assert_ports(forward, torch.randn(4, 5), torch.randint(0, 5, (4, 2)))


def test_a_size_that_values_decide_is_refused_without_a_batch_too() -> None:
    """The exporter's conditions are about the value here, and not about an open size."""
    with pytest.raises(UnsupportedError, match="cannot follow"):
        convert(Fn(lambda x, start: x.narrow(0, start, 2)), (torch.randn(4, 3), torch.tensor(1)), opened=OpenAxes(None))
