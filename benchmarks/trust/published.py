"""Modules of the kinds that people publish: two modes, random numbers, derivatives, caches, counts of rows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class DropPath(nn.Module):
    """Stochastic depth: a branch that training leaves out for some rows."""

    def __init__(self, features: int):
        super().__init__()
        self.branch, self.name = nn.Linear(features, features), "drop path"

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        if not self.training:
            return x + branch
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype) < 0.7
        return x + branch * kept / 0.7


class Noise(nn.Module):
    """Noise of a learned scale, in training or always."""

    def __init__(self, features: int, *, always: bool):
        super().__init__()
        self.scale, self.always = nn.Parameter(torch.full((features,), 0.1)), always
        self.name = "noise" if always else "training noise"

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.randn_like(x) if self.always or self.training else x


class Running(nn.Module):
    """Running statistics: their mean moves in training, and is subtracted in evaluation."""

    mean: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.weight, self.name = nn.Parameter(torch.ones(features)), "running mean"

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean
        if self.training:
            mean = x.flatten(0, -2).mean(0)
            self.mean.mul_(0.9).add_(0.1 * mean.detach())
        return (x - mean) * self.weight


class Codebook(nn.Module):
    """The nearest of some vectors, straight through for gradients."""

    def __init__(self, features: int):
        super().__init__()
        self.vectors, self.name = nn.Parameter(torch.randn(5, features)), "codebook"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        nearest = torch.cdist(rows, self.vectors).argmin(1)
        return x + (F.one_hot(nearest, 5).to(x.dtype) @ self.vectors).view(x.shape) - x.detach()


class Positions(nn.Module):
    """A table made at the first call of a size, and kept."""

    def __init__(self, features: int):
        super().__init__()
        self.scale, self.name = nn.Parameter(torch.ones(features)), "kept positions"
        self.kept: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        if size not in self.kept:
            self.kept[size] = torch.linspace(0.1, 1, size, dtype=x.dtype)
        table = self.kept[size].to(x.dtype)
        return x + self.scale * table.view(-1, *[1] * (x.ndim - 2)) if x.ndim > 2 else x * self.scale + table


class Experts(nn.Module):
    """The best two of four experts for each row."""

    def __init__(self, features: int):
        super().__init__()
        self.gate, self.experts, self.name = nn.Linear(features, 4), nn.Linear(features, 4 * features), "experts"

    def forward(self, x: Tensor) -> Tensor:
        best = self.gate(x).topk(2, -1)
        weights = torch.zeros_like(self.gate(x)).scatter(-1, best.indices, best.values.softmax(-1))
        return (self.experts(x).unflatten(-1, (4, -1)) * weights.unsqueeze(-1)).sum(-2)


class Force(nn.Module):
    """The gradient of a potential by its input."""

    def __init__(self, features: int, *, by: str):
        super().__init__()
        self.inner, self.by, self.name = nn.Linear(features, 3), by, f"force by {by}"

    def potential(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh().square().sum()

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "torch.func":
            return torch.func.grad(self.potential)(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_() if not x.requires_grad else x
            return torch.autograd.grad(self.potential(x), x, create_graph=True)[0]


class Whitened(nn.Module):
    """A triangular or a full system solved for every row."""

    def __init__(self, features: int, *, full: bool):
        super().__init__()
        self.root, self.full = nn.Parameter(torch.randn(features, features) / features), full
        self.name = "solve" if full else "cholesky"

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.root @ self.root.mT + torch.eye(len(self.root), dtype=x.dtype)
        if self.full:
            return torch.linalg.solve(matrix, x.unsqueeze(-1)).squeeze(-1)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), x.unsqueeze(-1), upper=False).squeeze(-1)


class Counted(nn.Module):
    """Arithmetic with the batch size."""

    def __init__(self, features: int):
        super().__init__()
        self.linear, self.name = nn.Linear(features, features), "counted rows"

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        rows = torch.arange(batch, dtype=x.dtype).view(batch, *[1] * (x.ndim - 1)) / batch
        return self.linear(x).view(batch, -1).view(x.shape) + rows + torch.zeros(batch, *x.shape[1:], dtype=x.dtype)


MAKERS: tuple[Callable[[int], nn.Module], ...] = (
    DropPath,
    lambda features: Noise(features, always=False),
    lambda features: Noise(features, always=True),
    Running,
    Codebook,
    Positions,
    Experts,
    lambda features: Force(features, by="torch.func"),
    lambda features: Force(features, by="autograd"),
    lambda features: Whitened(features, full=True),
    lambda features: Whitened(features, full=False),
    Counted,
    lambda features: spectral_norm(nn.Linear(features, features)),
)
"""Each makes a module for arrays whose last axis has so many features; it gives arrays of the same shape."""
