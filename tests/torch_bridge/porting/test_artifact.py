"""Saved ensembles, with PyTorch installed: state dicts come back, and the proof is kept."""

import dataclasses
from pathlib import Path

import jax
import pytest
import torch
from torch import nn

import torch_bridge
from jaxensemble import Ensemble
from jaxensemble.modules.build import skeleton
from jaxensemble.network.proof import Comparison
from tests.helpers.artifacts import SAVED, same_bits
from tests.helpers.ported import CASES, Net, models_of, ported


@pytest.mark.thinned
@pytest.mark.parametrize("name", CASES)
def test_what_was_saved_once_is_what_porting_gives(name: str) -> None:
    """Its state dicts go back into PyTorch, and give the same network, arrays and keys again."""
    case = CASES[name]
    with jax.enable_x64(case.x64):
        saved = Ensemble.load(SAVED / name)
        models = [case.make().eval() for _ in range(case.members)]
        for model, state in zip(models, torch_bridge.to_torch(saved), strict=True):
            model.load_state_dict(state)
        anew = ported(case, models)
        network = dataclasses.replace(anew.network, arguments=saved.network.arguments)  # older ones have no names
        assert (network, anew.origin) == (saved.network, saved.origin)
        assert skeleton(network).graphdef == saved.graphdef
        assert same_bits((anew.params, anew.buffers, anew.constants), (saved.params, saved.buffers, saved.constants))


def test_all_that_was_ported_and_proved_comes_back(tmp_path: Path) -> None:
    ensemble = ported(CASES["net"], models_of(CASES["net"]))
    ensemble.save(tmp_path / "net")
    loaded = Ensemble.load(tmp_path / "net")
    assert same_bits(loaded, ensemble)
    assert ensemble.proof is not None and len(ensemble.proof.comparisons) > 1
    for name in ("graphdef", "network", "origin", "proof"):
        assert getattr(loaded, name) == getattr(ensemble, name), name
    assert loaded.source() == ensemble.source()


def test_pytorch_gets_its_state_dicts_after_a_load(tmp_path: Path) -> None:
    models: list[nn.Module] = [Net().eval() for _ in range(3)]
    ported(CASES["net"], models).save(tmp_path / "net")
    loaded = torch_bridge.to_torch(Ensemble.load(tmp_path / "net"))
    for ours, theirs in zip(loaded, (model.state_dict() for model in models), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_a_loaded_ensemble_is_checked_against_pytorch(tmp_path: Path) -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    x = torch.randn(4, 3)
    torch_bridge.to_ensemble(models, (x,)).save(tmp_path / "net")
    assert torch_bridge.check(models, Ensemble.load(tmp_path / "net"), (x,)).passed


def test_a_port_that_was_checked_has_a_proof_and_no_other() -> None:
    models, x = [nn.Linear(3, 2) for _ in range(2)], torch.randn(4, 3)
    proof = torch_bridge.to_ensemble(models, (x,)).proof
    assert proof is not None and "torch" in proof.versions
    assert Comparison("weights", "bit for bit", 0.0, 0.0) in proof.comparisons
    assert torch_bridge.to_ensemble(models, (x,), check=False).proof is None


def test_checkpoints_that_were_checked_have_a_proof(tmp_path: Path) -> None:
    for k in range(2):
        torch.save(nn.Linear(3, 2).state_dict(), tmp_path / f"{k}.pt")
    paths = sorted(tmp_path.iterdir())
    for check in (True, False):
        ensemble = torch_bridge.load_ensemble(lambda: nn.Linear(3, 2), paths, (torch.ones(4, 3),), check=check)
        assert (ensemble.proof is not None) == check
