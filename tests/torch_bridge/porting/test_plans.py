"""Small networks of every kind under every plan, called and prepared: PyTorch's numbers in float64."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Plan
from tests.helpers.porting import assert_close, randomised
from torch_bridge.parity import precision

M, N = 3, 3
PLANS = [
    Plan(),
    Plan(members=1),
    Plan(members=1, unroll=True),
    Plan(members=2, rows=2),
    Plan(members=1, compiler="eigen"),
]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((x + self.second(x)).relu().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.lstm(x)
        return y, h[-1]


class Shared(nn.Module):
    """One layer called twice, and a second one with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.first(x).tanh()).tanh())


class Named(nn.Module):
    """Inputs and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.row = nn.Conv2d(3, 2, 3), nn.Linear(4, 2)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        image, row = self.image(inputs["image"]).mean((2, 3)), self.row(inputs["row"])
        return {"image": image, "sum": image + row}


def convolutional() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    return nn.Sequential(*layers)


def depthwise() -> nn.Module:
    layers = nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 2, 1)
    return nn.Sequential(*layers, nn.BatchNorm2d(2))


IMAGE, WORDS, ROW = (3, 6, 6), (5, 4), (4,)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 2)), ROW),
    "convolutional": (convolutional, IMAGE),
    "depthwise": (depthwise, IMAGE),
    "residual": (Residual, IMAGE),
    "attention": (Attention, WORDS),
    "LSTM": (Recurrent, WORDS),
    "shared weights": (Shared, ROW),
    "named inputs": (Named, {"image": IMAGE, "row": ROW}),
}


def draw(shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: draw(shape) for name, shape in shapes.items()}
    return torch.randn(M, N, *shapes, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_plan_gives_the_numbers_of_pytorch(name: str) -> None:
    make, shapes = NETWORKS[name]
    torch.manual_seed(0)
    models = [randomised(make(), seed).eval() for seed in range(M)]
    each = draw(shapes)
    take = lambda k: {key: x[k] for key, x in each.items()} if isinstance(each, dict) else each[k]  # noqa: E731
    with torch.no_grad():
        same, own = ([model(take(k * is_own)) for k, model in enumerate(models)] for is_own in (0, 1))
    with jax.enable_x64(True), precision.equal_precision():
        ensemble = torch_bridge.to_ensemble(models, (take(0),), check=False)
        for plan in PLANS:
            found = {
                "call": (ensemble(take(0), plan=plan), same),
                "each": (ensemble.each(each, plan=plan), own),
                "prepared": (ensemble.prepare(take(0), plan=plan)(take(0)), same),
                "not folded": (ensemble.prepare(take(0), plan=plan, fold=False)(take(0)), same),
                "prepared each": (ensemble.prepare(each, each=True, plan=plan)(each), own),
            }
            for way, (got, expected) in found.items():
                for k in range(M):
                    try:
                        assert_close(jax.tree.map(lambda leaf, k=k: np.asarray(leaf)[k], got), expected[k])
                    except AssertionError as error:
                        error.add_note(f"{way} of {plan}, member {k}")
                        raise
