"""Modules of 4 numbers that keep tensors from one call to the next, as published networks do."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

N = 4


class ByDevice(nn.Module):
    """Biases by device, kept in evaluation mode, cleared by `train` and by setting a size (levit, efficientvit)."""

    indices: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("indices", torch.tensor([2, 0, 1, 0]), persistent=False)
        self.cache: dict[str, Tensor] = {}
        self.size = N

    def set_size(self, size: int) -> None:
        self.size = size
        self.cache = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> "ByDevice":
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.biases[:, self.indices].sum(0) * (N // self.size)
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.biases[:, self.indices]
        return x + self.cache[key].sum(0) * (N // self.size)


class ByMode(nn.Module):
    """Tables keyed by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))
        self.tables: dict[bool, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training not in self.tables:
            self.tables[self.training] = self.weight.exp()
        return x * self.tables[self.training]


class Rotary(nn.Module):
    """Cosines and sines of positions, of the longest sequence so far (flash-attention)."""

    frequencies: Tensor
    _cos_cached: Any
    _sin_cached: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.rand(N), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = self._sin_cached = None

    def update(self, x: Tensor) -> None:
        if x.shape[-2] > self._seq_len_cached or self._cos_cached is None or self._cos_cached.dtype != x.dtype:
            self._seq_len_cached = x.shape[-2]
            angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), self.frequencies.to(x.dtype))
            self._cos_cached, self._sin_cached = angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return x * self._cos_cached[: x.shape[-2]] + x * self._sin_cached[: x.shape[-2]]


class GrowingBuffer(nn.Module):
    """A table in a buffer that is not saved, made in the constructor and again for longer sequences (transformers)."""

    frequencies: Tensor
    table: Tensor

    def __init__(self, length: int = 2) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.rand(N), persistent=False)
        self.make(length)

    def make(self, length: int) -> None:
        self.longest = length
        angles = torch.outer(torch.arange(length, dtype=self.frequencies.dtype), self.frequencies)
        self.register_buffer("table", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] > self.longest:
            self.make(x.shape[-2])
        return x + self.table[: x.shape[-2]]


class BufferOfNone(nn.Module):
    """A buffer that begins as None."""

    mask: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(N))
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != x.shape[-2]:
            self.mask = torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype).tril()
        return self.mask @ x * self.scale


class Lazily(nn.Module):
    """An attribute that the first forward makes, asked for by `hasattr`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "normed"):
            self.normed = self.weight / self.weight.norm()
        return x @ self.normed


class ByClass(nn.Module):
    """An attribute that the class says is None, and a dict that all its objects share."""

    kept: Any = None
    masks: dict[int, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.softmax(self.weight, 0)
        length = x.shape[-2]
        if length not in self.masks:
            self.masks[length] = torch.eye(length)
        return self.masks[length].to(x) @ x + self.kept


class Tuples(nn.Module):
    """A tuple of a size and tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))
        self.kept: tuple[int, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.kept[0] != x.shape[-2]:
            self.kept = x.shape[-2], (self.weight.sin(), torch.linspace(0, 1, x.shape[-2], dtype=x.dtype)[:, None])
        return x * self.kept[1][0] + self.kept[1][1]


class ListOfNone(nn.Module):
    """A list with a place for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, N))
        self.heads: list[Tensor | None] = [None] * 2

    def forward(self, x: Tensor) -> Tensor:
        for k, head in enumerate(self.heads):
            if head is None:
                self.heads[k] = self.weight[k].tanh()
        return sum(x * head for head in self.heads)  # type: ignore[operator,return-value]


class CachedProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N))

    @functools.cached_property
    def symmetric(self) -> Tensor:
        return self.weight + self.weight.mT

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.symmetric


class CachedMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def table(self, length: int) -> Tensor:
        return self.weight * torch.arange(float(length))[:, None].to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.shape[-2])


class Helped(nn.Module):
    """A table that a plain object keeps for the module."""

    class Positions:
        def __init__(self) -> None:
            self.length = 0
            self.table: Tensor | None = None

        def of(self, x: Tensor, weight: Tensor) -> Tensor:
            if self.table is None or self.length != x.shape[-2]:
                self.length = x.shape[-2]
                self.table = weight * torch.arange(self.length, dtype=x.dtype)[:, None]
            return self.table

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))
        self.positions = Helped.Positions()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions.of(x, self.weight)


class Recording(nn.Module):
    """Keeps attention of the last call for users to look at, and the number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))
        self.attention: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.attention = torch.softmax(x * self.weight, -1)
        return x * self.attention


class Shared(nn.Module):
    """One dict for two layers."""

    class Layer(nn.Module):
        def __init__(self, cache: dict[str, Tensor], first: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N))
            self.cache, self.first = cache, first

        def forward(self, x: Tensor) -> Tensor:
            if self.first and "table" not in self.cache:
                self.cache["table"] = self.weight.cos()
            return x * self.weight + self.cache["table"]

    def __init__(self) -> None:
        super().__init__()
        cache: dict[str, Tensor] = {}
        self.layers = nn.Sequential(Shared.Layer(cache, True), Shared.Layer(cache, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


CACHING = [
    ByDevice, ByMode, Rotary, GrowingBuffer, BufferOfNone, Lazily, ByClass, Tuples, ListOfNone, CachedProperty,
    CachedMethod, Helped, Recording, Shared,
]  # fmt: skip
"""Every way of keeping tensors."""
