"""Networks of the ensembles in `tests/saved`. `python -m tests.helpers.ported` ports and saves them again."""

import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble
from tests.helpers.artifacts import SAVED, X


class Net(nn.Module):
    """A bit of everything: running statistics, dropout, tied weights, buffers saved and not, a folded constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.fc, self.tied = nn.Linear(12, 4, bias=False), nn.Linear(12, 4)
        self.tied.weight = self.fc.weight
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]))
        self.register_buffer("shift", torch.linspace(0.1, 0.7, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.bn(self.conv(x)).relu().flatten(1))
        return (self.fc(x) + self.tied(x) * torch.linspace(0, 1, 4) + self.shift + self.mask).softmax(-1)


class Two(nn.Module):
    """Two inputs in one argument, and outputs by name, of which one is bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"sum": pair[0] + pair[1] * self.scale, "half": pair[0].bfloat16()}


class Hashing(nn.Module):
    """Integers that grow beyond 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table((ids * 2_000_000_011) % 5)


class Words(nn.Module):
    """Embeddings in a dict of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"words": nn.Embedding(5, 3), "padded": nn.Embedding(5, 3, padding_idx=0)})
        self.out = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.block["words"](ids) + self.block["padded"](ids))


class Case(NamedTuple):
    """An ensemble in `tests/saved`."""

    make: Callable[[], nn.Module]
    example: tuple[Any, ...]
    members: int = 3
    x64: bool = False


CASES = {
    "net": Case(Net, (torch.from_numpy(X),)),
    "net64": Case(Net, (torch.from_numpy(X),), x64=True),
    "linear": Case(lambda: nn.Linear(3, 2), (torch.ones(1, 3),), 2),
    "two": Case(Two, ((torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)),), 1),
    "wide": Case(lambda: nn.Linear(3, 2).double(), (torch.ones(1, 3).double(),), 1, x64=True),
    "hashing": Case(Hashing, (torch.arange(1, 7).reshape(2, 3),), 2, x64=True),
    "words": Case(Words, (torch.arange(4).reshape(2, 2),), 2),
}


def models_of(case: Case) -> list[nn.Module]:
    """Returns members with random weights and batch statistics, since zeros and ones hide errors."""
    models = [case.make().eval() for _ in range(case.members)]
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-0.5, 0.5)
            module.get_buffer("running_var").uniform_(0.5, 1.5)
    return models


def ported(case: Case, models: list[nn.Module], **options: Any) -> Ensemble:
    """Returns the ensemble of the members, with 64-bit types if the case asks for them."""
    with jax.enable_x64(case.x64):
        return torch_bridge.to_ensemble(models, case.example, **options)


if __name__ == "__main__":
    torch.manual_seed(0)
    shutil.rmtree(SAVED, ignore_errors=True)
    SAVED.mkdir()
    for name, case in CASES.items():
        ensemble = ported(case, models_of(case))
        with jax.enable_x64(case.x64):
            ensemble.save(SAVED / name)
