"""`torch.distributions` made in a forward, whose default checks of values capture leaves out."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributions as d

import torch_bridge
from jaxensemble import UnsupportedError

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)


class Net(nn.Module):
    """Features, and a forward that makes distributions of them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(4, 6, dtype=torch.float64), forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self.fc(x))


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    """Locations, and scales above zero."""
    first, second = h.chunk(2, -1)
    return first, second.exp()


CASES: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda h: [d.Normal(*halves(h)).log_prob(h[:, :3] * 2), d.Normal(*halves(h)).entropy()],
    "Independent": lambda h: d.Independent(d.Normal(*halves(h)), 1).log_prob(h[:, 3:]),
    "Categorical of logits": lambda h: [
        d.Categorical(logits=h).entropy(),
        d.Categorical(logits=h).log_prob(h.argmin(-1)),
        d.Categorical(logits=h).probs,
    ],
    "Categorical of probabilities": lambda h: d.Categorical(probs=h.softmax(-1)).log_prob(h.argmax(-1)),
    "Bernoulli": lambda h: [d.Bernoulli(logits=h).log_prob((h > 0).double()), d.Bernoulli(logits=h).entropy()],
    "Laplace and Cauchy": lambda h: [kind(*halves(h)).log_prob(h[:, :3]) for kind in (d.Laplace, d.Cauchy)],
    "Gamma and Beta": lambda h: [
        d.Gamma(h.exp(), 1 + h.exp()).log_prob(h.exp() + 1),
        d.Beta(h.exp(), 1 + h.exp()).log_prob(h.sigmoid()),
    ],
    "LogNormal": lambda h: d.LogNormal(*halves(h)).log_prob(h[:, :3].exp()),
    "Dirichlet": lambda h: d.Dirichlet(h.exp()).log_prob(h.softmax(-1)),
    "Poisson": lambda h: d.Poisson(h.exp()).log_prob(h.abs().round()),
    "a divergence": lambda h: d.kl_divergence(
        d.Independent(d.Normal(*halves(h)), 1), d.Independent(d.Normal(torch.zeros_like(h[:, :3]), 1.0), 1)
    ),
    "StudentT": lambda h: d.StudentT(3 + h.exp()).log_prob(h),
    "a mixture": lambda h: d.MixtureSameFamily(
        d.Categorical(logits=h[:, :3]), d.Normal(h[:, 3:], h[:, :3].exp())
    ).log_prob(h[:, 0]),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_distributions(case: str) -> None:
    torch.manual_seed(0)
    models = [Net(CASES[case]).eval() for _ in range(2)]
    with jax.enable_x64(True):
        ensemble = torch_bridge.to_ensemble(models, (X,))  # proves the float64 outputs
        outputs = jax.tree.leaves(ensemble(X))
    theirs = [model(X) for model in models]
    for place, ours in enumerate(outputs):
        expected = torch.stack([out[place] if isinstance(out, list) else out for out in theirs]).detach()
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_validation_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d.Distribution, "_validate_args", True)
    assert d.Distribution._validate_args is True
    torch_bridge.to_flax(Net(CASES["Normal"]).float().eval(), (X.float(),))
    assert d.Distribution._validate_args is True
    with pytest.raises(ValueError, match="scale"):
        d.Normal(torch.zeros(1), -torch.ones(1))


def test_validation_that_is_asked_for_is_a_decision_by_values() -> None:
    model = Net(lambda h: d.Normal(*halves(h), validate_args=True).log_prob(h[:, :3])).eval()
    with jax.enable_x64(True), pytest.raises(UnsupportedError, match="decides by values"):
        torch_bridge.to_flax(model, (X,))
