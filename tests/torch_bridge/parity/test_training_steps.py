"""Ten training steps next to PyTorch's, and proofs of what was trained."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, StateError, fit, train_step
from jaxensemble.artifact import Artifact
from jaxensemble.artifact.description import describe_in_text
from jaxensemble.network.proof import Lineage
from tests.helpers.torch_training import members_of, resnet
from tests.helpers.training import mean_square, state_of
from torch_bridge.demo import SimpleCNN, SimpleMLP


class Recurrent(nn.Module):
    """A GRU and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.norm, self.fc = nn.GRU(3, 5, batch_first=True), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.gru(x)[0][:, -1]))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 2))


TRAINED = [
    ("mlp", lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), (8, 3)),
    ("resnet", resnet, (4, 3, 9, 9)),
    ("gru", Recurrent, (4, 5, 3)),
    ("dropout", with_dropout, (8, 3)),
]


@pytest.mark.thinned
@pytest.mark.parametrize(("make", "shape"), [case[1:] for case in TRAINED], ids=[case[0] for case in TRAINED])
def test_ten_steps_are_those_of_torch_optim(make: Any, shape: Any) -> None:
    models, x = members_of(make), torch.randn(shape)
    ensemble = torch_bridge.to_ensemble(models, (x,), mode="eval", check=False)
    report = torch_bridge.check(models, ensemble, (x,), thorough=False, train=True)
    assert report.passed, report
    found = {row.stage for row in report.rows}
    assert {f"float64, 10 steps of {name}" for name in ("SGD", "Adam", "AdamW", "RMSprop")} <= found
    alone = make in (resnet, with_dropout)  # torch.func maps no number of batches, and draws numbers of its own
    assert any("torch.func" in note for note in report.notes) == alone
    assert any("torch.func.vmap(grad)" in stage for stage in found) == (not alone)
    assert not any("evaluation mode" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("make", [SimpleMLP, SimpleCNN])
def test_the_tutorials_networks_train_as_pytorchs_do(make: Any) -> None:
    models, x = members_of(make, 2), torch.randn(4, 1, 28, 28)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    report = torch_bridge.check(models, ensemble, (x,), thorough=False, train=True)
    assert report.passed, report


def test_a_wrong_update_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    models, x = members_of(TRAINED[0][1]), torch.randn(8, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    monkeypatch.setattr(optax, "add_decayed_weights", lambda decay: optax.identity())
    report = torch_bridge.check(models, ensemble, (x,), thorough=False, train=True)
    failed = {row.stage for row in report.rows if not row.passed}
    assert failed == {f"float64, 10 steps of {name}" for name in ("SGD", "Adam", "AdamW")}


def test_parameters_that_nothing_uses_are_passed_over_as_pytorch_does() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    models, x = members_of(Unused), torch.randn(8, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    report = torch_bridge.check(models, ensemble, (x,), thorough=False, train=True)
    assert report.passed, report


def test_what_was_trained_from_a_verified_port_says_so_and_can_be_proved_again(tmp_path: Path) -> None:
    models: list[nn.Module] = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval() for _ in range(2)]
    x, targets = torch.randn(8, 3), np.ones((8, 2), "float32")
    ensemble = torch_bridge.to_ensemble(models, (x,))
    once, _ = train_step(state_of(ensemble), x, targets, loss=mean_square)
    options: Any = {"loss": mean_square, "batch": 4, "validation": (x, targets), "patience": 5}
    for epochs in (1, 2):  # the second goes on from the checkpoint of the first
        state, _ = fit(once, x, targets, epochs=epochs, checkpoints=tmp_path / "run", **options)
    for trained in (once.ensemble, state.ensemble):
        assert trained.proof is None and trained.lineage == Lineage(ensemble.proof, trained=True)  # type: ignore[arg-type]
    for model, weights in zip(models, torch_bridge.to_torch(state.ensemble), strict=True):
        model.load_state_dict(weights, strict=True)
    report = torch_bridge.check(models, state.ensemble, (x,), thorough=False)
    report.proven(state.ensemble).save(tmp_path / "trained")
    loaded = Ensemble.load(tmp_path / "trained")
    assert loaded.proof is not None and loaded.lineage == state.ensemble.lineage
    with pytest.raises(StateError, match="has other arrays than the one that was compared"):
        report.proven(jax.tree.map(lambda leaf: leaf + 0, state.ensemble))
    text = describe_in_text(Artifact.open(tmp_path / "trained"))
    assert "verified against PyTorch" in text and "; trained from a verified port of" in text
    with pytest.raises(StateError, match="there is no proof: the comparison failed"):
        torch_bridge.check(models[::-1], state.ensemble, (x,), thorough=False).proven(state.ensemble)
