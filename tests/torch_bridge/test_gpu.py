"""Tests that need a GPU: both frameworks on one device, true float32, and weights on the device."""

import copy

import jax
import numpy as np
import pytest
import torch

import torch_bridge
from torch_bridge.demo import SimpleCNN, SimpleMLP
from torch_bridge.parity import precision, reference
from torch_bridge.timing.training import torch_step
from torch_bridge.timing.variants import torch_call

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("factory", [SimpleMLP, SimpleCNN])
def test_parity_on_the_device(factory: type[torch.nn.Module]) -> None:
    models = [factory().eval() for _ in range(3)]
    x = torch.randn(16, 1, 28, 28)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert {device.platform for leaf in jax.tree.leaves(ensemble) for device in leaf.devices()} == {"gpu"}
    assert torch_bridge.check(models, ensemble, (x,)).passed


def test_models_and_inputs_on_the_gpu_are_taken() -> None:
    if not torch.cuda.is_available():
        pytest.skip("JAX sees a GPU, this build of torch does not")
    models = [SimpleMLP().eval() for _ in range(3)]
    x = torch.randn(16, 1, 28, 28)
    ensemble = torch_bridge.to_ensemble([copy.deepcopy(model).cuda() for model in models], (x.cuda(),))
    with precision.equal_precision():
        expected = torch.stack(reference.run_loop(models, (x,))).numpy()
        np.testing.assert_allclose(np.asarray(ensemble(x.cuda())), expected, atol=1e-5, rtol=0)


def test_batch_size_changes_nothing_but_rounding() -> None:
    models = [SimpleCNN().eval() for _ in range(3)]
    x = torch.randn(33, 1, 28, 28)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    with precision.equal_precision():
        whole = np.asarray(ensemble(x))
        parts = np.concatenate([np.asarray(ensemble(x[k : k + 1])) for k in range(0, 33, 11)], axis=1)
    np.testing.assert_allclose(parts, whole[:, ::11], atol=1e-5, rtol=0)


def test_training_on_the_device_is_pytorchs() -> None:
    models = [torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()) for _ in range(3)]
    x = torch.randn(4, 1, 8, 8)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    report = torch_bridge.check(models, ensemble, (x,), thorough=False, train=True)
    assert report.passed, report


@pytest.mark.parametrize("way", ["loop", "loop, channels_last", "torch.func.vmap", "member"])
def test_a_cuda_graph_gives_what_was_recorded(way: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("JAX sees a GPU, this build of torch does not")
    models = [SimpleCNN().eval().cuda() for _ in range(3)]
    x = (torch.randn(16, 1, 28, 28).cuda(),)
    with precision.equal_precision():
        for call, rtol in ((torch_call, 0.0), (torch_step, 1e-3)):  # losses after some steps more
            expected, found = call(way, models, x)(), call(f"graph({way})", models, x)
            for _ in range(2):
                for mine, theirs in zip(found(), expected, strict=True):
                    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=rtol)
