"""Training that goes on from the state of PyTorch's optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from jaxensemble import InputError, train_step
from tests.helpers.torch_training import members_of
from tests.helpers.training import mean_square


def trained_in_torch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        F.mse_loss(model(x), torch.ones_like(model(x))).backward()
        optimizer.step()


OPTIMIZERS: list[Any] = [
    lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    lambda params: torch.optim.Adam(params, 0.01, betas=(0.8, 0.95), eps=1e-4),
    lambda params: torch.optim.Adam(params, 0.01, betas=(0.0, 0.9), decoupled_weight_decay=True, weight_decay=0.1),
    lambda params: torch.optim.RMSprop(params, 0.01, alpha=0.9, momentum=0.5),
    lambda params: torch.optim.RMSprop(params, 0.01, centered=True, maximize=True),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_goes_on_from_the_state_of_a_torch_optimizer(make: Any) -> None:
    models = members_of(lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double())
    x = torch.randn(8, 2, 6, dtype=torch.float64)
    optimizers = [make(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        trained_in_torch(model, optimizer, x, 4)
    with jax.enable_x64(True):
        ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
        state = torch_bridge.train_state(models, optimizers, ensemble, jax.random.key(0))
        for _ in range(4):
            state, _ = train_step(state, x, np.ones((8, 2)), loss=mean_square)
        for model, optimizer in zip(models, optimizers, strict=True):
            trained_in_torch(model, optimizer, x, 4)
        for model, tensors in zip(models, torch_bridge.to_torch(state.ensemble), strict=True):
            for key, tensor in model.state_dict().items():
                torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-12)


def test_a_schedule_is_a_factor_of_the_rates_from_here_on() -> None:
    """Steps agree with PyTorch's `LambdaLR`, made after some steps; its other schedules work in the same way."""
    models: Any = members_of(lambda: nn.Linear(3, 2).double())
    x = torch.randn(8, 3, dtype=torch.float64)
    optimizers: Any = [
        torch.optim.SGD(model.parameters(), rate, momentum=0.9, dampening=0)
        for model, rate in zip(models, (0.1, 0.2, 0.3), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        trained_in_torch(model, optimizer, x, 3)
    with jax.enable_x64(True):
        ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
        factor = lambda count: 0.8 ** count.astype("float64")  # noqa: E731 - optax's own schedules are of float32
        state = torch_bridge.train_state(models, optimizers, ensemble, jax.random.key(0), schedule=factor)
        for _ in range(4):
            state, _ = train_step(state, x, np.ones((8, 2)), loss=mean_square)
        for model, optimizer in zip(models, optimizers, strict=True):
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
            for _ in range(4):
                trained_in_torch(model, optimizer, x, 1)
                scheduler.step()
        for model, tensors in zip(models, torch_bridge.to_torch(state.ensemble), strict=True):
            torch.testing.assert_close(tensors["weight"], model.weight.detach(), rtol=0, atol=1e-12)


def test_groups_of_parameters_have_numbers_of_their_own() -> None:
    models: list[Any] = members_of(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double())
    x = torch.randn(8, 3, dtype=torch.float64)
    rates = [0.1, 0.2, 0.3]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(
            [{"params": [model[0].weight, model[1].weight], "weight_decay": 0.1}, {"params": [model[0].bias]}], lr=rate
        )
        for model, rate in zip(models, rates, strict=True)
    ]
    with jax.enable_x64(True):
        ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
        state = torch_bridge.train_state(models, optimizers, ensemble, jax.random.key(0))
        assert state.frozen == {"1.bias"}
        for _ in range(5):
            state, _ = train_step(state, x, np.ones((8, 2)), loss=mean_square)
        for model, optimizer in zip(models, optimizers, strict=True):
            trained_in_torch(model, optimizer, x, 5)
            model[1].bias.requires_grad_(False)
        for model, tensors in zip(models, torch_bridge.to_torch(state.ensemble), strict=True):
            for key, tensor in model.state_dict().items():
                torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-12)


def test_optimizers_that_differ_are_refused_with_every_difference() -> None:
    models, x = members_of(lambda: nn.Linear(3, 2)), torch.randn(8, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    optimizers = [torch.optim.Adam(models[0].parameters()), torch.optim.SGD(models[1].parameters())]
    third = torch.optim.Adam(models[2].parameters(), eps=1e-3)
    with pytest.raises(InputError, match=r"(?s)member 1: SGD for Adam.*member 2, group 0: eps=0.001 for 1e-08"):
        torch_bridge.train_state(models, [*optimizers, third], ensemble, jax.random.key(0))
    with pytest.raises(InputError, match=r"member 1 has parameters that are not the model's"):
        wrong = [torch.optim.Adam(models[k].parameters()) for k in (0, 0, 2)]
        torch_bridge.train_state(models, wrong, ensemble, jax.random.key(0))


class Heads(nn.Module):
    """A backbone that no gradient reaches, and a head that not every loss looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.aside, self.head = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.backbone(x).detach().tanh()
        return self.head(y), self.aside(y)


DECAYING: dict[str, Any] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2, maximize=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-2, weight_decay=1e-2, momentum=0.9),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("unfrozen", ["", "head"])
def test_what_the_loss_does_not_reach_and_what_was_unfrozen_trains_as_in_pytorch(
    name: str, aside: bool, unfrozen: str, x64: None
) -> None:
    models = [Heads().double() for _ in range(2)]
    x, y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
    optimizers = [DECAYING[name](model) for model in models]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, aside: bool) -> None:
        optimizer.zero_grad()
        outputs, others = model(x)
        (((outputs - y) ** 2).mean() + (others.square().mean() if aside else 0)).backward()
        optimizer.step()

    def loss(outputs: Any, targets: Any) -> jax.Array:
        return mean_square(outputs[0], targets) + (jnp.square(outputs[1]).mean() if aside else 0)

    for model, optimizer in zip(models, optimizers, strict=True):
        for submodule in model.children():
            submodule.requires_grad_(submodule is not getattr(model, unfrozen, None))
        for _ in range(3):
            step(model, optimizer, True)
        model.requires_grad_(True)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    state = torch_bridge.train_state(models, optimizers, ensemble, jax.random.key(0))
    for _ in range(4):
        state, _ = train_step(state, x.numpy(), y.numpy(), loss=loss)
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, aside)
    states: Any = torch_bridge.to_torch(state.ensemble)
    for model, ours in zip(models, states, strict=True):
        for key, tensor in model.state_dict().items():
            np.testing.assert_allclose(ours[key], tensor, rtol=0, atol=1e-12, err_msg=key)


def test_weights_that_are_not_the_models_are_refused() -> None:
    models, x = members_of(lambda: nn.Linear(3, 2)), torch.randn(8, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    with pytest.raises(InputError, match=r"does not have the current parameters of the models: member 0, weight"):
        torch_bridge.train_state(models[::-1], optimizers[::-1], ensemble, jax.random.key(0))
