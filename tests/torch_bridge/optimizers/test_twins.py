"""The optax twins of PyTorch's optimizers, and optimizers without one."""

from typing import Any

import jax.numpy as jnp
import optax
import pytest
import torch
from torch import nn

import torch_bridge
from jaxensemble.errors import UnsupportedError


def test_float32_adam_rounds_no_further_than_pytorchs() -> None:
    """`optax.adam` corrects its bias by a difference in float32, of two numbers near 1."""
    param, grad = torch.tensor([1.0], requires_grad=True), 0.3
    theirs = torch.optim.Adam([param], 1.0, betas=(0.9, 0.999))
    twin = torch_bridge.optimizer(theirs)
    ours, state = jnp.zeros(1), twin.init(jnp.zeros(1))
    exact = -1 / (1 + 1e-8 / grad)
    updates: Any = twin.update(jnp.full(1, grad), state, ours)[0]
    plain = optax.adam(1.0)
    rounded: Any = plain.update(jnp.full(1, grad), plain.init(ours), ours)[0]
    assert abs(float(updates[0]) - exact) < 2e-7 < 5e-6 < abs(float(rounded[0]) - exact)


def test_what_has_no_twin_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UnsupportedError, match=r"no twin for Adagrad, only for SGD, Adam, AdamW, RMSprop"):
        torch_bridge.optimizer(torch.optim.Adagrad(model.parameters()))
    with pytest.raises(UnsupportedError, match=r"SGD with dampening=0\.5 has no twin"):
        torch_bridge.optimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.5))
    torch_bridge.optimizer(torch.optim.SGD(model.parameters(), 0.1, dampening=0.5))  # has no effect without momentum
    with pytest.raises(UnsupportedError, match="amsgrad=True"):
        torch_bridge.optimizer(torch.optim.Adam(model.parameters(), amsgrad=True))
