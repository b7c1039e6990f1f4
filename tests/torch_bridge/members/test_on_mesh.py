"""PyTorch's side of ensembles whose members are over a mesh."""

import jax
import pytest
import torch
from torch import nn

import torch_bridge
from jaxensemble import InputError

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices; the tests' settings make four CPUs")


@pytest.mark.parametrize("members", [3, 4])
def test_state_dicts_are_those_of_the_members(members: int) -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval() for _ in range(members)]
    x = (torch.randn(8, 3),)
    spread = torch_bridge.to_ensemble(models, x).over(jax.make_mesh((4,), ("members",)))
    states = torch_bridge.to_torch(spread)
    assert len(states) == members
    for state, model in zip(states, models, strict=True):
        for key, tensor in model.state_dict().items():
            assert torch.equal(state[key], tensor)
    assert torch_bridge.check(models, spread.over(None), x).passed
    with pytest.raises(InputError, match=r"and PyTorch's are on one: give ensemble\.over\(None\)"):
        torch_bridge.check(models, spread, x)
    with pytest.raises(InputError, match="are over 4 devices"):
        torch_bridge.time(models, spread, x)
