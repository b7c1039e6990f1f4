"""Calls of ensembles with PyTorch's tensors, of every kind, and with the inputs that networks were ported with."""

import functools
import pickle
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_bridge
from jaxensemble import Ensemble, InputError, Plan
from jaxensemble.modules import classes

ENSEMBLE = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(3)])
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def test_tensors_of_every_kind_are_taken() -> None:
    x = torch.from_numpy(X.copy())
    expected = ENSEMBLE(X)
    for tensor in (x, x.requires_grad_(), x.detach().T.contiguous().T, torch.stack([x, x], 2)[:, :, 0]):
        np.testing.assert_array_equal(ENSEMBLE(tensor), expected)
    embed = Ensemble.from_modules([nnx.Embed(5, 2, rngs=nnx.Rngs(0))])
    assert embed(torch.tensor([0, 4])).shape == (1, 2, 2)
    with pytest.raises(InputError, match="float64"):
        ENSEMBLE(x.double())


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "strided", "requires_grad"])
def test_bfloat16_tensors_keep_their_bits(kind: str) -> None:
    x = torch.arange(12.0).reshape(4, 3).bfloat16()
    views = {"transposed": x.T.contiguous().T, "strided": torch.stack([x, x], 2)[:, :, 0]}
    tensor = views.get(kind, x.clone().requires_grad_() if kind == "requires_grad" else x)
    half = ENSEMBLE.astype(jnp.bfloat16)
    result = half(tensor)
    expected = half(jnp.arange(12.0).reshape(4, 3).astype(jnp.bfloat16))
    np.testing.assert_array_equal(result, expected)


def test_changing_a_tensor_in_place_changes_nothing() -> None:
    ensemble = Ensemble.from_modules([nnx.Linear(64, 64, rngs=nnx.Rngs(0))])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(64, 64, dtype=dtype)
        result = ensemble.astype(str(dtype).removeprefix("torch."))(x)
        x.fill_(7)
        assert float(result.max()) == 0


def test_plans_take_the_inputs_that_a_network_was_ported_with() -> None:
    """A batch axis that is not the first, and an input without one."""

    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 4)

        def forward(self, x: Any, scale: Any) -> Any:
            return torch.tanh(self.linear(x)) * scale

    x, scale = torch.randn(5, 6, 3), torch.randn(4)
    ensemble = torch_bridge.to_ensemble([Mixer() for _ in range(3)], (x, scale), batch_axis=(1, None))
    few, whole = (ensemble(x, scale, plan=plan) for plan in (Plan(members=2, rows=4), Plan()))
    np.testing.assert_allclose(few, whole, rtol=1e-5, atol=1e-5)
    assert "rows=4" in repr(next(call.plan for call in ensemble._runner.calls.values() if call.plan.rows))


def test_a_member_with_activations_is_pickled_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of JAX, and one that the source defines; read as where the source was never loaded."""
    layers = (torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.LeakyReLU(0.2), torch.nn.Softmax(-1))
    member = torch_bridge.to_ensemble([torch.nn.Sequential(*layers)], (torch.from_numpy(X),), check=False)[0]
    content, expected = pickle.dumps(member), member(X)
    monkeypatch.delitem(sys.modules, type(member).__module__)
    monkeypatch.setattr(classes, "_load_source", functools.cache(classes._load_source.__wrapped__))
    again = pickle.loads(content)
    assert type(again) is not type(member)
    np.testing.assert_array_equal(again(X), expected)
