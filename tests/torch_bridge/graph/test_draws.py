"""Random numbers that a forward draws: of PyTorch's distributions, by keys, and proved with the draws fixed."""

import random
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import InputError, RandomnessError, UnsupportedError

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(x.shape[0], 3),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape[0], 2),
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(2, 6, (x.shape[0], 4)),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "bernoulli_": lambda x: x.new_empty(x.shape[0], 1).bernoulli_(0.3),
    "normal": lambda x: torch.normal(2.0, torch.ones_like(x) * 3),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 3),
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(0.1, 0.2),
    "cauchy_": lambda x: torch.atan(torch.empty_like(x).cauchy_(0.5, 2.0)),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.4),
    "poisson": lambda x: torch.poisson(torch.full_like(x, 3.0)),
    "multinomial": lambda x: torch.multinomial(torch.tensor([0.1, 0.2, 0.0, 0.7]), 50, replacement=True),
    "chosen once": lambda x: torch.multinomial(torch.ones(x.shape[0], 4), 3),
    "randperm": lambda x: torch.randperm(7),
    "gumbel": lambda x: F.gumbel_softmax(torch.zeros_like(x), tau=0.5),
    "dropout": lambda x: F.dropout(torch.ones_like(x), 0.3, training=True),
}
"""A call of each kind, on `[N, 5]`."""


class Drawing(nn.Module):
    """All kinds of draws in one forward, with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return {name: draw(y) * (1 + y.mean()) for name, draw in DRAWS.items()}


class Reparameterised(nn.Module):
    """A sample of a normal distribution (a variational encoder, a policy), `times` as far from its mean."""

    def __init__(self, times: float = 1.0) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(5, 6), times

    def forward(self, x: Tensor) -> Tensor:
        mean, log_std = self.linear(x).chunk(2, -1)
        return mean + self.times * log_std.exp() * torch.randn_like(mean)


@pytest.fixture(scope="module")
def drawing() -> Any:
    torch.manual_seed(0)
    models = [Drawing().eval() for _ in range(2)]
    return models, torch_bridge.to_ensemble(models, (torch.randn(6, 5),))


def test_outputs_are_pytorchs_for_the_same_draws(drawing: Any) -> None:
    _, ensemble = drawing
    assert ensemble.proof is not None
    assert {one.stage for one in ensemble.proof.comparisons} >= {"network", "float64, each its own"}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_of_pytorchs_distribution(drawing: Any, name: str) -> None:
    _, ensemble = drawing
    ones = torch.zeros(2000, 5)
    with torch.no_grad():
        member = ensemble[0]
        factor = np.asarray(1 + member.linear(ones.numpy()).mean())
        theirs = np.stack([np.asarray(DRAWS[name](ones)) for _ in range(4)]).astype(float)
    keys = jax.random.split(jax.random.key(1), 4)
    ours = np.stack([np.asarray(ensemble(ones, key=key)[name][0]) for key in keys]) / factor
    assert ours.shape == theirs.shape
    for measure in (np.mean, np.std, lambda x: np.mean(x**3), lambda x: np.mean(x > np.median(theirs))):
        spread = max(np.std(theirs) * (1 + np.abs(theirs).max() ** 2), 1e-6)
        assert abs(measure(ours) - measure(theirs)) < 8 * spread / np.sqrt(theirs.size)


def test_members_draw_of_a_key(drawing: Any) -> None:
    _, ensemble = drawing
    x = torch.randn(6, 5)
    with pytest.raises(RandomnessError, match=r"keys.* draws random numbers"):
        ensemble(x)
    first, again, other = (ensemble(x, key=jax.random.key(seed))["randint"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0] / np.abs(first[0]).max(), first[1] / np.abs(first[1]).max())
    same = ensemble(x, key=jax.random.key(0), randomness="same")["chosen once"]
    ratio = np.asarray(same[0] / same[1])[np.asarray(same[1]) != 0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


@pytest.mark.further
def test_another_use_of_what_is_drawn_is_found() -> None:
    x = torch.randn(6, 5)
    models = [Reparameterised().eval() for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(models, (x,))
    report = torch_bridge.check(models, ensemble, (x,), train=True)
    assert report.passed and "float64, 10 steps of Adam" in {row.stage for row in report.rows}
    others = [Reparameterised(1.01).eval() for _ in range(2)]
    for model, other in zip(models, others, strict=True):
        other.load_state_dict(model.state_dict())
    assert not torch_bridge.check(others, ensemble, (x,), thorough=False).passed


def test_a_comparison_draws_by_the_key_it_is_given() -> None:
    seen: list[float] = []

    class Watched(Reparameterised):
        def forward(self, x: Tensor) -> Tensor:
            drawn = torch.randn_like(x)
            if not torch.compiler.is_exporting():
                seen.append(float(drawn.double().sum()))
            return self.linear(x) * drawn.mean()

    x = torch.randn(6, 5)
    models = [Watched().eval() for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    runs = []
    for key in (None, jax.random.key(0), jax.random.key(5)):
        seen.clear()
        assert torch_bridge.check(models, ensemble, (x,), thorough=False, key=key).passed
        runs.append(seen[-2:])
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(InputError, match="`key` must be one JAX random key"):
        torch_bridge.check(models, ensemble, (x,), key=0)


def test_draws_of_another_shape_are_another_network() -> None:
    class Once(Reparameterised):
        def forward(self, x: Tensor) -> Tensor:
            mean, log_std = self.linear(x).chunk(2, -1)
            return mean + log_std.exp() * torch.randn(3)

    x = torch.randn(6, 5)
    models = [Reparameterised().eval() for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(models, (x,))
    report = torch_bridge.check([Once().eval() for _ in range(2)], ensemble, (x,), thorough=False)
    assert "network" in {row.stage for row in report.rows if not row.passed}


@pytest.mark.parametrize("name", ["random", "np.random"])
@pytest.mark.parametrize("training", [True, False])
def test_draws_that_are_not_pytorchs_are_refused(name: str, training: bool) -> None:
    class Foreign(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            if training and not self.training:
                return y
            return y + (random.random() if name == "random" else float(np.random.normal()))

    x = torch.randn(6, 5)
    models = [Foreign(5, 5).eval() for _ in range(2)]
    reason = rf"draws random numbers from .*`{name}`"
    if training:
        network = torch_bridge.to_ensemble(models, (x,)).network
        assert re.search(reason, network.evaluation_only)
    with pytest.raises(UnsupportedError, match=reason):
        torch_bridge.to_ensemble(models, (x,), mode="train")


def test_what_jax_draws_otherwise_is_refused() -> None:
    class Gamma(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.ops.aten._standard_gamma(super().forward(input).exp())

    with pytest.raises(UnsupportedError, match="make the draw an input"):
        torch_bridge.to_ensemble([Gamma(5, 2)], (torch.randn(6, 5),))
