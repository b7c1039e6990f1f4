"""Reshapes, transposes, slices and joins; channels-last networks stay free of transposes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import Fn, assert_ports
from torch_bridge.lowering.convert import convert


def transposes(model: nn.Module, *inputs: Tensor) -> int:
    """Counts the transposes of the ported network."""
    network = convert(model.eval(), inputs).network
    return sum(call.target == "jnp.transpose" for call in network.calls)


SHAPE = (2, 3, 4, 5)

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "view": (lambda x: x.view(x.size(0), -1), lambda x: x.view(x.shape[0] * 3, 4, 5), lambda x: x.ravel()),
    "reshape": (lambda x: x.reshape(-1, 5), lambda x: x.transpose(1, 3).reshape(x.size(0), 15, 4)),
    "flatten": (lambda x: x.flatten(2), lambda x: x.flatten(0, 1), lambda x: x.flatten(1).unflatten(1, (3, -1))),
    "squeeze": (
        lambda x: x[:, :1].squeeze(1),
        lambda x: x[:, :1, :, :1].squeeze((1, 3)),
        lambda x: x.squeeze(1),
        lambda x: x.unsqueeze(-1).unsqueeze(1),
    ),
    "transpose": (
        lambda x: x.transpose(1, -1),
        lambda x: x.flatten(1).t(),
        lambda x: x.mT,
        lambda x: x.movedim(1, -1),
        lambda x: x.swapaxes(1, 2).permute(0, -1, 2, 1),
    ),
    "expand": (
        lambda x: x[:, :1].expand(-1, 7, -1, -1),
        lambda x: x[:, :1].expand_as(x) * x,
        lambda x: x[0, 0].expand(2, 3, 4, 5),
        lambda x: torch.broadcast_tensors(x[:, :1], x)[0],
        lambda x: x[:, 0, 0].expand(6, x.size(0), 5),
    ),
    "repeat": (
        lambda x: x.repeat(1, 2, 1, 3),
        lambda x: x.repeat(2, 1, 1, 1, 1),
        lambda x: x.tile(2, 1),
        lambda x: x[:1].repeat(x.size(0), 1, 1, 1),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.repeat_interleave(2),
        lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), dim=1) * 2,
    ),
    "slices": (
        lambda x: x[:, 1:3:2, -2:],
        lambda x: x[..., -1],
        lambda x: x.narrow(1, 1, 2),
        lambda x: x[:, None, :, 2],
        lambda x: x[..., 1:4],
        lambda x: x[0],
        lambda x: x[:, :100, :-1],
    ),
    "parts": (
        lambda x: x.chunk(2, 1),
        lambda x: x.split(2, dim=-1),
        lambda x: torch.split(x, [1, 2], 1)[1],
        lambda x: x.tensor_split((1, 2), 3),
        lambda x: x.unbind(1),
        lambda x: torch.hsplit(x, 3)[2],
        lambda x: x.chunk(1, 2)[0],
    ),
    "joins": (
        lambda x: torch.cat([x, x * 2], 1),
        lambda x: torch.cat([x.transpose(1, 3), x.transpose(1, 3)], -1),
        lambda x: torch.cat([x, torch.tensor([], dtype=x.dtype), x.relu()], -2),
        lambda x: torch.stack([x, x * 2], 1),
        lambda x: torch.stack([x[:, 0], x[:, 1]], -1),
    ),
    "stacks": (
        lambda x: torch.hstack([x, x]),
        lambda x: torch.vstack([x[0, 0, 0], x[0, 0, 1]]),
        lambda x: torch.dstack([x[0, 0, 0], x[0, 0, 1]]),
        lambda x: torch.column_stack([x[0, 0, :, 0], x[0, 0, :, 1]]),
        lambda x: torch.hstack([x[0, 0, 0], x[0, 0, 1]]),
        lambda x: torch.block_diag(x[0, 0], x[0, 1]),
    ),
    "mixed-dtypes": (
        lambda x: torch.cat([x, (x > 0)], 1),
        lambda x: torch.stack([(x > 0).long(), (x > 1).long()]),
        lambda x: torch.cat([(x > 0), (x > 0).long()], 1),
    ),
    "order": (
        lambda x: x.flip(1, 3),
        lambda x: x.fliplr(),
        lambda x: x.flipud(),
        lambda x: x.roll(1, 2),
        lambda x: x.roll((1, -2), (1, -1)),
        lambda x: x.roll(3),
    ),
    "rot90": tuple(lambda x, k=k: x.rot90(k, (2, 3)) for k in (1, 2, 3, 4)),
    "windows": (
        lambda x: x.unfold(2, 2, 1),
        lambda x: x.unfold(3, 2, 3),
        lambda x: x.unfold(2, 2, 2),
        lambda x: x.unfold(1, 3, 3).unfold(2, 3, 1),
    ),
    "diagonals": (
        lambda x: x.diagonal(1, 2, 3),
        lambda x: x.diagonal(-1, 3, 1),
        lambda x: torch.diag(x[0, 0]),
        lambda x: torch.diag(x[0, 0, 0], 1),
        lambda x: torch.diag_embed(x, -1),
        lambda x: torch.diag_embed(x, 1, 1, -1),
        lambda x: torch.diag_embed(x, 1, 3, 0),
    ),
    "triangles": (lambda x: x.tril(-1), lambda x: x.triu(), lambda x: x.transpose(2, 3).triu(1)),
    "grids": (
        lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, :, 1], indexing="ij"),
        lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, :, 1], indexing="xy")[1],
        lambda x: torch.cartesian_prod(x[0, 0, 0], x[0, 0, :, 0]),
    ),
    "strides": (lambda x: x.as_strided((x.size(0), 5, 12), (60, 1, 5)), lambda x: x.contiguous().clone().view_as(x)),
    "differences": (
        lambda x: torch.diff(x, dim=1),
        lambda x: x.diff(2, append=x[..., :1]),
        lambda x: torch.trapezoid(x, dx=0.5, dim=2),
    ),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x[..., :2].contiguous()) * 2),
        lambda x: torch.fft.rfft(x, dim=2).abs(),
        lambda x: torch.fft.ifft2(torch.fft.fft2(x, norm="ortho")).real,
        lambda x: torch.fft.fftshift(torch.complex(x, x * 2), dim=(1,)).abs(),
        lambda x: torch.view_as_real(torch.complex(x, x[0, 0, 0])),
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", FUNCTIONS)
def test_function(case: str) -> None:
    assert_ports(Fn(*FUNCTIONS[case]), torch.randn(SHAPE), batches=(1,))


class Dense(nn.Module):
    """DenseNet's concatenation, with H != W before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(7, 5, 3, padding=1)
        self.c = nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6 * 4 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.a(x).relu()], 1)
        y = torch.cat([y, self.b(y)], dim=1)
        return self.fc(self.c(y).view(y.size(0), -1))


class Shuffle(nn.Module):
    """ShuffleNet: a channel shuffle by hand, halves that go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        left, right = x.chunk(2, 1)
        return self.b(torch.cat([right, left * 2], 1)).mean([2, 3])


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.f1, self.f2 = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        b, c, _, _ = x.size()
        y = x.mean((2, 3)).view(b, c)
        y = torch.sigmoid(self.f2(self.f1(y).relu())).view(b, c, 1, 1)
        return self.d(x * y.expand_as(x) + x).flatten(2).amax(2)


class Normalised(nn.Module):
    """L2 normalisation over channels, and a bare scale for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.c(x), dim=1) * self.scale.view(1, -1, 1, 1)
        x = x - x.mean(1, keepdim=True) + x.flip(1) + torch.roll(x, 1, 3)
        return self.d(x[:, :, 1:, ::2]).flatten(1).sum(1)


class Inplace(nn.Module):
    """Assignments to channels and regions."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.r = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y[:, 0] = y[:, 1] * 2
        y[:, 2:].mul_(3)
        y += 1
        y[:, :, 1:, ::2].add_(1)
        y[:, [1, 3]] = 0.5
        return self.d(self.r(y)).mean((2, 3))


class Clips(nn.Module):
    """Frames through a CNN: `[B, T, C, H, W]` to `[B * T, ...]` and back."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.f = nn.Conv2d(3, 4, 3), nn.Linear(4 * 2 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.c(x.reshape(-1, *x.shape[2:])).relu()
        return self.f(frames.flatten(1)).view(x.size(0), x.size(1), -1).max(dim=1)[0]


class Patches(nn.Module):
    """Patches cut by unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        p = x.unfold(2, 2, 2).unfold(3, 2, 2)
        b, c, h, w, _, _ = p.shape
        return self.f(p.permute(0, 2, 3, 1, 4, 5).reshape(b, h * w, c * 4))


class PatchesByReshape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return self.f(x.reshape(b, (h // 2) * (w // 2), 4 * c))


class Tokens(nn.Module):
    """A class token, positions, tokens of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Conv2d(3, 6, 2, 2)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 7, 6))
        self.h = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.p(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return {"cls": self.h(x[:, 0]), "rest": (self.h(x[:, 1:]),)}


class Unflattened(nn.Module):
    """A decoder's way from features to a map, and a map flattened after a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.p, self.u = nn.AdaptiveAvgPool2d((2, 3)), nn.Unflatten(1, (4, 2, 3))
        self.f, self.g = nn.Linear(24, 24), nn.Linear(80, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.d(self.u(self.f(self.p(self.c(x)).flatten(1))))
        return y, self.g(self.c(x).permute(0, 3, 1, 2).flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "dense-concatenation": (Dense, SHAPE, 1),
    "channel-shuffle": (Shuffle, SHAPE, 2),  # one for the input, one for the shuffle
    "squeeze-excite": (SqueezeExcite, SHAPE, 1),
    "channel-norm-flip-roll-slice": (Normalised, SHAPE, 1),
    "in-place": (Inplace, SHAPE, 1),
    "clips": (Clips, (2, 3, 3, 4, 5), 1),
    "patches-by-unfold": (Patches, (2, 3, 4, 6), 1),
    "patches-by-reshape": (PatchesByReshape, (2, 3, 4, 6), 1),
    "tokens": (Tokens, (2, 3, 4, 6), 1),
    "unflattened": (Unflattened, SHAPE, 3),  # input, features to map, map to output
    "flatten-start-dim-2": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(20, 2)), SHAPE, 2),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", MODELS)
def test_network(case: str) -> None:
    make, shape, count = MODELS[case]
    assert_ports(make(), torch.randn(shape))
    assert transposes(make(), torch.randn(shape)) == count


def test_mlp_has_no_transposes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 4), nn.ReLU(), nn.Linear(4, 3))
    assert transposes(model, torch.randn(SHAPE)) == 0


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x.as_strided((2, 3), (60, 2)), "every element once"),
        (lambda x: x.as_strided((3, 2), (1, 1)), "every element once"),
    ],
)
def test_refused(forward: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convert(Fn(forward), (torch.randn(SHAPE),))


class ExpandedParameter(nn.Module):
    """A parameter that is given leading dimensions before it meets an array that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.expand(x.shape) + self.scale.expand(3, 4, 5)


def test_expanded_parameter() -> None:
    assert_ports(ExpandedParameter(), torch.randn(SHAPE))


class ExpandedAndMoved(nn.Module):
    """Rows `[N, 4]`, expanded and then seen otherwise: only as they were expanded does broadcasting do the same."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        row = x[:, :1]
        transposed = row.expand(-1, 4, -1).transpose(1, 2) + x
        reshaped = row.unsqueeze(2).expand(-1, 2, -1, -1).reshape(-1, 1, 4) + x.repeat(2, 1, 1)
        return transposed, reshaped


@pytest.mark.parametrize("batch_axis", [0, None])
def test_an_expanded_array_that_is_moved_before_it_meets_a_full_one(batch_axis: int | None) -> None:
    assert_ports(ExpandedAndMoved(), torch.randn(2, 4, 4), batch_axis=batch_axis)
    assert_ports(ExpandedAndMoved(), torch.randn(1, 4, 4), batch_axis=batch_axis)
