"""PyTorch's tutorial on model ensembling, both networks and both options, ported and side by side with torch.func."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble import functional_call, stack_module_state, vmap
from jaxensemble.ensemble import Ensemble
from torch_bridge.demo import SimpleCNN, SimpleMLP
from torch_bridge.parity import reference

MEMBERS, BATCH = 10, 64
ATOL = 1e-6


@pytest.fixture(scope="module", params=[SimpleMLP, SimpleCNN], ids=["MLP", "CNN"])
def ported(request: pytest.FixtureRequest) -> tuple[list[nn.Module], Ensemble, Tensor]:
    torch.manual_seed(0)
    models = [request.param() for _ in range(MEMBERS)]
    minibatches = torch.randn(MEMBERS, BATCH, 1, 28, 28)
    return models, torch_bridge.to_ensemble(models, (minibatches[0],)), minibatches


def test_different_minibatch_per_member(ported: Any) -> None:
    models, ensemble, minibatches = ported
    ours = np.asarray(ensemble.each(minibatches))
    loop = reference.run_loop(models, [(x,) for x in minibatches])
    vmapped = reference.vmapped_call(models, [(x,) for x in minibatches])()["output"]
    np.testing.assert_allclose(ours, torch.stack(loop), atol=ATOL, rtol=0)
    np.testing.assert_allclose(ours, vmapped, atol=ATOL, rtol=0)


def test_same_minibatch_for_all(ported: Any) -> None:
    models, ensemble, minibatches = ported
    ours = np.asarray(ensemble(minibatches[0]))
    np.testing.assert_allclose(ours, torch.stack(reference.run_loop(models, (minibatches[0],))), atol=ATOL, rtol=0)
    np.testing.assert_allclose(ours, reference.vmapped_call(models, (minibatches[0],))()["output"], atol=ATOL, rtol=0)


def test_the_tutorials_own_code_with_changed_imports(ported: Any) -> None:
    """`stack_module_state`, `functional_call` and `vmap` as the tutorial writes them, over the ported modules."""
    models, ensemble, minibatches = ported
    modules = [ensemble[k] for k in range(3)]
    params, buffers = stack_module_state(modules)
    base = modules[0]

    def fmodel(params: Any, buffers: Any, x: Any) -> Any:
        return functional_call(base, (params, buffers), (x,))

    same = vmap(fmodel, in_dims=(0, 0, None))(params, buffers, minibatches[0, :4].numpy())
    each = vmap(fmodel)(params, buffers, minibatches[:3, :4].numpy())
    np.testing.assert_allclose(
        same, torch.stack(reference.run_loop(models[:3], (minibatches[0, :4],))), atol=ATOL, rtol=0
    )
    own = reference.run_loop(models[:3], [(x,) for x in minibatches[:3, :4]])
    np.testing.assert_allclose(each, torch.stack(own), atol=ATOL, rtol=0)


def test_weights_come_back_bit_for_bit(ported: Any) -> None:
    models, ensemble, _ = ported
    for model, state in zip(models, torch_bridge.to_torch(ensemble), strict=True):
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
