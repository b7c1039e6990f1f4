"""The proof under trial: correct networks pass it, planted errors do not. More of both: `make fuzz mutants`."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.trust import mutations, one
from benchmarks.trust.networks import Attending, Drawn, First, Seeded, drawn
from benchmarks.trust.page import PAGE
from tests.helpers.attacks.artifacts import MANIFESTS, NETWORKS
from tests.helpers.attacks.checkpoints import HOSTILE

T = TypeVar("T")


class Hypothesis:
    """Decisions that Hypothesis makes, and shrinks if one of them fails."""

    def __init__(self, data: st.DataObject):
        self._data = data

    def pick(self, options: Sequence[T]) -> T:
        return self._data.draw(st.sampled_from(options))


SOON = range(5)


@pytest.mark.parametrize(
    "seed", [*SOON, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(200) if seed not in SOON)]
)
def test_a_random_network_agrees_with_pytorch(seed: int) -> None:
    found = one.proved(Seeded(seed), thorough=False)
    assert found.status in ("passed", "refused"), found


@pytest.mark.slow
@settings(max_examples=20)
@given(st.data())
def test_random_networks_agree_with_pytorch_in_every_stage_and_under_other_plans(data: st.DataObject) -> None:
    found = one.proved(Hypothesis(data))
    assert found.status in ("passed", "refused"), found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_differ_from_all_others(value: float) -> None:
    odd, even = np.array([1.0, value]), np.array([1.0, 2.0])
    assert one._distance(odd, even) == one._distance(even, odd) == one._distance(odd, -odd[::-1]) == np.inf
    assert one._distance(odd, odd) == 0 and one._distance(even, 2 * even) == 0.5


def test_the_same_decisions_give_the_same_network() -> None:
    first, second = drawn(Seeded(3)), drawn(Seeded(3))
    assert first.steps == second.steps
    for a, b in zip(first.models, second.models, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Images(nn.Module):
    """A network into which most errors can be planted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.groups = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.pool, self.gelu, self.fc = nn.AvgPool2d(3, 2, 1), nn.GELU(), nn.Linear(4 * 4 * 5, 6)
        self.square, self.gru = nn.Linear(6, 6), First(nn.GRU(6, 6, batch_first=True))
        self.attention, self.leaky = Attending(6, 2, causal=True), nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.norm(self.conv(x)))
        x = self.groups(self.pool(x))
        x = self.leaky(self.square(self.fc(x.flatten(1))))
        x = torch.cat([x, x - 0.3 * x.square()]).reshape(-1, 2, 6)
        x = self.attention(self.gru(x))
        return torch.where(x > 0.05, x.softmax(1), x.var(1, keepdim=True)) + x


ERRORS = [
    "tanh GELU", "padding counted", "pooling off by one", "biased variance", "softmax over another axis", "slope",
    "no activation", "sign of a sum", "concatenated backwards", "mask polarity", "no attention mask",
    "attention not scaled", "epsilon", "momentum", "convolution off by one", "groups of a norm",
    "square weight transposed", "flatten not permuted", "kernel flipped", "kernel turned", "gate order",
    "mean for variance", "scale for shift", "members exchanged", "one member twice", "stale buffers", "weights rounded",
]  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Drawn:
    torch.manual_seed(0)
    models: list[nn.Module] = [Images().eval() for _ in range(2)]
    with torch.no_grad():
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.rand_like(tensor))
    return Drawn(models, (torch.randn(4, 3, 8, 9),), [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_a_planted_error_is_caught(name: str, images: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one, "drawn", lambda _: images)
    choices: Any = None
    (found,) = one.mutants(choices, [name])
    assert found.status == "caught", found
    if found.planted and name != "momentum":  # no output in evaluation mode depends on momentum
        named = found.named.partition(" ")[0]  # the module itself, or one around it, whose output is a single tensor
        assert f"{found.planted[0]}.".startswith(f"{named}."), found


def test_every_error_has_a_name_of_its_own() -> None:
    assert len(set(mutations.NAMES)) == len(mutations.CHANGES) + len(mutations.FAULTS) >= 30


def test_the_page_tells_how_large_the_corpus_is() -> None:
    artifacts = len(MANIFESTS) + len(NETWORKS)
    text = " ".join(PAGE.read_text().split())
    assert f"{len(HOSTILE)} hostile checkpoints and {artifacts} hostile artifacts" in text
