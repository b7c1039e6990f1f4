"""Training: what `train_step` and `fit` do, beside loops over members and beside PyTorch."""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, History, InputError, Plan, StateError, TrainState, fit, layers, train_step
from jaxensemble.errors import UnsupportedError
from jaxensemble.program import primitives
from jaxensemble.state import flatten
from jaxensemble.training import step as steps
from jaxensemble.training.data import as_data
from jaxensemble.training.forms import for_training
from jaxensemble.training.losses import check_is_mean
from torch_bridge.demo import SimpleCNN, SimpleMLP


def mean_square(outputs: Any, targets: Any) -> jax.Array:
    return jnp.mean((outputs - targets) ** 2)


def cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


class MLP(nnx.Module):
    """Three layers, with dropout between them if there is a rate."""

    def __init__(self, rate: float = 0.0, *, rngs: nnx.Rngs):
        self.fc1, self.fc2 = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.dropout(nnx.tanh(self.fc1(x))))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Recurrent(nn.Module):
    """A GRU and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.norm, self.fc = nn.GRU(3, 5, batch_first=True), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.gru(x)[0][:, -1]))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 2))


def members_of(make: Any, count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make() for _ in range(count)]


@pytest.fixture
def mlp() -> Ensemble:
    return Ensemble.from_modules([MLP(rngs=nnx.Rngs(seed)) for seed in range(3)])


def data(rows: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 3)).astype("float32")
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)


def state_of(ensemble: Ensemble, optimizer: Any = None, **options: Any) -> TrainState:
    return TrainState.create(ensemble, optimizer or optax.sgd(0.1, momentum=0.9), jax.random.key(0), **options)


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


# Beside PyTorch.

TRAINED = [
    ("mlp", lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), (8, 3)),
    ("resnet", resnet, (4, 3, 9, 9)),
    ("gru", Recurrent, (4, 5, 3)),
    ("dropout", with_dropout, (8, 3)),
]


@pytest.mark.parametrize(("make", "shape"), [case[1:] for case in TRAINED], ids=[case[0] for case in TRAINED])
def test_ten_steps_are_those_of_torch_optim(make: Any, shape: Any) -> None:
    models, x = members_of(make), torch.randn(shape)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    report = torch_bridge.check(models, ensemble, (x,), thorough=False, train=True)
    assert report.passed, report
    found = {row.stage for row in report.rows}
    assert {f"float64, 10 steps of {name}" for name in ("SGD", "Adam", "AdamW", "RMSprop")} <= found
    averaged = any("torch.func" in note for note in report.notes)  # over all batches, whose number it cannot map
    assert averaged == (make is resnet)
    assert any("torch.func.vmap(grad)" in stage for stage in found) == (not averaged)
    assert any("evaluation mode" in note for note in report.notes) == (make is with_dropout)


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
    """As PyTorch's `LambdaLR`, made after some steps, has it; its other schedules are made of the same."""
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


def test_what_has_no_twin_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UnsupportedError, match=r"no twin for Adagrad, only for SGD, Adam, AdamW, RMSprop"):
        torch_bridge.optimizer(torch.optim.Adagrad(model.parameters()))
    with pytest.raises(UnsupportedError, match=r"SGD with dampening=0\.5 has no twin"):
        torch_bridge.optimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.5))
    torch_bridge.optimizer(torch.optim.SGD(model.parameters(), 0.1, dampening=0.5))  # which without momentum is nothing
    with pytest.raises(UnsupportedError, match="amsgrad=True"):
        torch_bridge.optimizer(torch.optim.Adam(model.parameters(), amsgrad=True))


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
    with pytest.raises(InputError, match=r"has not the parameters that the models have now: member 0, weight"):
        torch_bridge.train_state(models[::-1], optimizers[::-1], ensemble, jax.random.key(0))


def test_complex_parameters_are_refused() -> None:
    class Complex(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.ones(3, jnp.complex64))

    with pytest.raises(InputError, match="only real numbers can be trained; freeze weight"):
        state_of(Ensemble.from_modules([Complex()]))


def test_what_was_trained_goes_back_to_pytorch() -> None:
    models, x = members_of(resnet), torch.randn(6, 3, 9, 9)
    ensemble = torch_bridge.to_ensemble([model.eval() for model in models], (x,), check=False)
    state = state_of(ensemble)
    for _ in range(3):
        state, _ = train_step(state, x, np.zeros(6, "int32"), loss=cross_entropy)
    assert int(np.asarray(flatten(state.ensemble.buffers)["1.num_batches_tracked"])[0]) == 3
    for k, tensors in enumerate(torch_bridge.to_torch(state.ensemble)):
        model = resnet().eval()
        model.load_state_dict(tensors, strict=True)
        np.testing.assert_allclose(state.ensemble(x)[k], model(x).detach(), rtol=0, atol=1e-5)


def test_parameters_that_pytorch_does_not_train_stay_as_they_are() -> None:
    models: list[Any] = members_of(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    x = torch.randn(8, 3)
    for model in models:
        model[0].requires_grad_(False)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    state = state_of(ensemble, optax.adamw(0.1, weight_decay=0.5))
    after, _ = train_step(state, x, np.ones((8, 2), "float32"), loss=mean_square)
    before = flatten(ensemble.params)
    changed = {name for name, leaf in flatten(after.ensemble.params).items() if (leaf != before[name]).any()}
    assert changed == {name for name in before if "1" in name}
    assert state_of(ensemble, frozen=[]).frozen == frozenset()


# Beside a loop over members.


def alone(ensemble: Ensemble, k: int, optimizer: Any, x: Any, y: Any, count: int) -> Any:
    module = ensemble[k]
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    state = optimizer.init(params)
    for _ in range(count):

        def loss(params: Any) -> jax.Array:
            return mean_square(nnx.merge(graphdef, params, rest)(x), y)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params: Any = optax.apply_updates(params, updates)
    return nnx.to_pure_dict(params)


def test_members_train_as_they_would_alone(mlp: Ensemble) -> None:
    x, y = data()
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))  # a norm of each member's own
    state, losses = state_of(mlp, optimizer), np.zeros(0)
    for _ in range(5):
        state, losses = train_step(state, x, y, loss=mean_square)
    assert losses.shape == (3,) and int(state.steps) == 5
    for k in range(3):
        expected = alone(mlp, k, optimizer, x, y, 5)
        close(jax.tree.map(lambda leaf, k=k: leaf[k], state.ensemble.params), expected)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(members=1),
        Plan(members=2),
        Plan(members=2, unroll=True),
        Plan(rows=4),
        Plan(rows=5),
        Plan(members=1, rows=3, remat=True),
        Plan(rows=20),
    ],
)
def test_every_plan_gives_the_same(mlp: Ensemble, plan: Plan) -> None:
    x, y = data()
    expected, losses = train_step(state_of(mlp), x, y, loss=mean_square)
    got, same = train_step(state_of(mlp), x, y, loss=mean_square, plan=plan)
    close((got.ensemble.params, got.opt_state, same), (expected.ensemble.params, expected.opt_state, losses))


def test_rows_may_be_taken_by_index_and_members_have_their_own(mlp: Ensemble) -> None:
    x, y = data()
    rows = np.array([[0, 1, 2, 3], [3, 3, 5, 6], [8, 9, 10, 11]])
    shared, _ = train_step(state_of(mlp), x, y, loss=mean_square, rows=rows[0])
    expected, _ = train_step(state_of(mlp), x[:4], y[:4], loss=mean_square)
    close(shared.ensemble.params, expected.ensemble.params)
    own, losses = train_step(state_of(mlp), x, y, loss=mean_square, rows=rows, plan=Plan(members=2, rows=2))
    each, same = train_step(state_of(mlp), x[rows], y[rows], loss=mean_square, each=True)
    close((own.ensemble.params, losses), (each.ensemble.params, same))
    both, _ = train_step(
        state_of(mlp),
        np.stack([x] * 3),
        np.stack([y] * 3),
        loss=mean_square,
        each=True,
        rows=rows,
        plan=Plan(members=1),
    )
    close(both.ensemble.params, each.ensemble.params)


def test_members_may_have_rates_of_their_own(mlp: Ensemble) -> None:
    x, y = data()
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0)
    rates, decays = [0.01, 0.1, 0.0], [0.0, 0.1, 0.0]
    state = state_of(mlp, optimizer, hyperparams={"learning_rate": rates, "weight_decay": decays})
    for _ in range(3):
        state, _ = train_step(state, x, y, loss=mean_square, plan=Plan(members=2))
    for k in range(3):
        expected = alone(mlp, k, optax.adamw(rates[k], weight_decay=decays[k]), x, y, 3)
        close(jax.tree.map(lambda leaf, k=k: leaf[k], state.ensemble.params), expected, 1e-5)
    close(jax.tree.map(lambda leaf: leaf[2], state.ensemble.params), jax.tree.map(lambda leaf: leaf[2], mlp.params))


def test_dropout_has_the_rate_of_its_member() -> None:
    class Dropping(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Dropout(0.5, rngs=rngs)])
            self.same = self.layers[0]  # held twice
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.scale * self.same(x)

    ensemble = Ensemble.from_modules([Dropping(nnx.Rngs(seed)) for seed in range(4)])
    x = np.ones((4000, 1), "float32")
    rates = [0.0, 0.25, 0.9, 1.0]

    def kept(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean(outputs != 0) + 0 * outputs.sum()

    def total(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return outputs.mean()

    state = state_of(ensemble, dropout=rates)
    _, shares = train_step(state, x, x, loss=kept)
    np.testing.assert_allclose(shares, 1 - np.array(rates), atol=0.03)
    after, means = train_step(state, x, x, loss=total)
    np.testing.assert_allclose(means, [1, 1, 1, 0], atol=0.15)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after.ensemble.params))
    assert jax.tree.structure(after.ensemble) == jax.tree.structure(ensemble)
    _, again = train_step(after, x, x, loss=kept)
    assert (again != shares)[1:3].all()  # other numbers at every step


def test_members_draw_different_numbers_or_the_same() -> None:
    ensemble = Ensemble.from_modules([MLP(0.5, rngs=nnx.Rngs(0)) for _ in range(3)])
    x, y = data()
    for randomness, alike in (("different", False), ("same", True)):
        state = TrainState.create(ensemble, optax.sgd(0.1), jax.random.key(0), randomness=randomness)  # type: ignore[arg-type]
        _, losses = train_step(state, x, y, loss=mean_square)
        assert (len(set(losses.tolist())) == 1) == alike
    keys = jax.random.split(jax.random.key(1), 3)
    state = TrainState.create(ensemble, optax.sgd(0.1), keys)
    _, all_three = train_step(state, x, y, loss=mean_square)
    _, last = train_step(TrainState.create(ensemble[2:], optax.sgd(0.1), keys[2:]), x, y, loss=mean_square)
    close(last[0], all_three[2])


def test_accumulating_gradients_draws_anew_for_every_few_rows() -> None:
    ensemble = Ensemble.from_modules([MLP(0.5, rngs=nnx.Rngs(0)) for _ in range(2)])
    x, y = np.ones((64, 3), "float32"), np.zeros((64, 2), "float32")
    state = state_of(ensemble)
    _, whole = train_step(state, x, y, loss=mean_square)
    _, parts = train_step(state, x, y, loss=mean_square, plan=Plan(rows=1))
    np.testing.assert_allclose(parts, whole, rtol=0.5)
    _, one = train_step(state, x[:1], y[:1], loss=mean_square)
    assert (abs(parts - one) > 1e-4).all()


def test_rows_that_meet_are_not_taken_apart() -> None:
    models, x = members_of(resnet), torch.randn(4, 3, 9, 9)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    with pytest.raises(InputError, match="may mix the rows of a minibatch"):
        train_step(state_of(ensemble), x, np.zeros(4, "int32"), loss=cross_entropy, plan=Plan(rows=2))
    state = state_of(ensemble.eval(), train=False)  # statistics as they are: rows are apart
    train_step(state, x, np.zeros(4, "int32"), loss=cross_entropy, plan=Plan(rows=2))


WEIGHTS = jnp.array([1.0, 3.0])


def weighted(logits: Any, labels: Any) -> Any:
    weights = WEIGHTS[labels]
    return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, labels)).sum() / weights.sum()


def masked(logits: Any, labels: Any) -> Any:
    kept = labels != 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(kept, losses, 0).sum() / jnp.maximum(kept.sum(), 1)


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_are_not_added_up_of_losses_that_are_no_plain_mean(mlp: Ensemble, rows: int) -> None:
    x, y = data()
    labels, state = (y[:, 0] > 0).astype("int32"), state_of(mlp)
    for loss in (weighted, masked):
        train_step(state, x, labels, loss=loss)
        with pytest.raises(InputError, match=rf"rows={rows}, but {loss.__name__} is not the plain mean over the rows"):
            train_step(state, x, labels, loss=loss, plan=Plan(rows=rows))
    with pytest.raises(InputError, match=r"is not the plain mean.*leave `rows` out"):
        train_step(state, x, y, loss=lambda a, b: jnp.sum((a - b) ** 2), plan=Plan(rows=rows))
    whole, _ = train_step(state, x, labels, loss=cross_entropy)
    parts, _ = train_step(state, x, labels, loss=cross_entropy, plan=Plan(rows=rows))
    close(parts.ensemble.params, whole.ensemble.params)
    within = jax.jit(lambda state: train_step(state, x, labels, loss=cross_entropy, plan=Plan(rows=rows))[0])(state)
    close(within.ensemble.params, whole.ensemble.params)


CLASSES = jnp.array([1.0, 1.0, 1.0, 5.0])
entropy = optax.softmax_cross_entropy_with_integer_labels
NO_MEANS: dict[str, Any] = {
    "padding of -100": (lambda a, b: (entropy(a, b) * (b != -100)).sum() / jnp.maximum((b != -100).sum(), 1), "int32"),
    "padding of 3": (lambda a, b: (entropy(a, b) * (b != 3)).sum() / jnp.maximum((b != 3).sum(), 1), "int32"),
    "a rare class": (lambda a, b: (CLASSES[b] * entropy(a, b)).sum() / CLASSES[b].sum(), "int32"),
    "a mask": (lambda a, b: (jnp.abs(a[:, 0]) * b).sum() / b.sum(), "float32"),
    "root mean square": (lambda a, b: jnp.sqrt(jnp.mean((a[:, 0] - b) ** 2)), "float32"),
    "small": (lambda a, b: 1e-9 * jnp.sum((a[:, 0] - b) ** 2), "float32"),
    "Dice": (lambda a, b: 1 - 2 * (a[:, 0] * b).sum() / (a[:, 0] + b).sum(), "float32"),
}
MEANS: dict[str, Any] = {
    "cross entropy": (lambda a, b: entropy(a, b).mean(), "int32"),
    "squares": (lambda a, b: jnp.mean((a[:, 0] - b) ** 2), "float32"),
    "a mask of rows": (lambda a, b: jnp.mean((a * (b[:, None] > 0)).sum(1) / (1 + (b > 0))), "int32"),
    "logarithms": (lambda a, b: -jnp.log(a[:, 0]).mean(), "float32"),
    "logarithms of what is negative": (lambda a, b: -jnp.log(-a[:, 0]).mean(), "float32"),
}


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("case", [*NO_MEANS, *MEANS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_is_known_for_a_plain_mean(case: str, rows: int, dtype: str) -> None:
    function, kind = (NO_MEANS | MEANS)[case]
    outputs, targets = jax.ShapeDtypeStruct((rows, 4), dtype), jax.ShapeDtypeStruct((rows,), kind)
    with contextlib.nullcontext() if case in MEANS else pytest.raises(InputError, match="is not the plain mean"):
        check_is_mean(function, outputs, targets, (0, 0), rows)


def test_rematerialising_takes_less_memory() -> None:
    class Deep(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(6)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = jnp.sin(nnx.gelu(nnx.softplus(layer(x))) ** 2) * jnp.cos(x)
            return x

    ensemble = Ensemble.from_modules([Deep(nnx.Rngs(seed)) for seed in range(2)])
    x = np.ones((512, 16), "float32")
    state = state_of(ensemble)

    def kept(plan: Plan) -> int:
        """The bytes that the forward pass leaves for the backward pass."""
        arrays, _ = as_data(ensemble, x, x)
        step = steps.step_for(state, arrays, None, mean_square, each=False, plan=plan)
        members = steps.Members(step, state.optimizer, {}, state.steps, (None, None), 2)
        losses = lambda params: members.losses(params, {}, {}, state.keys, arrays)[0]  # noqa: E731
        _, backward = jax.vjp(losses, ensemble.params)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))

    assert kept(Plan(remat=True)) < 0.5 * kept(Plan())


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 6, 3)])  # the second is not taken apart into whole windows
def test_maxima_and_their_gradients_are_xlas(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 3, shape).astype("float32")  # with many equal values
    x[0, 0, 1, 0], x[1, 1, 0, 1], x[1, 0, 0, 2] = np.nan, np.nan, -np.inf
    pooled = lambda x: nnx.max_pool(x, (2, 2), (2, 2))  # noqa: E731
    ours = for_training(pooled)
    np.testing.assert_array_equal(ours(x), pooled(x))
    x = np.nan_to_num(x)
    weights = np.random.default_rng(1).normal(size=pooled(x).shape)
    gradients = [jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (ours, pooled)]
    np.testing.assert_array_equal(*gradients)
    assert ("reduce_window_max" in primitives(ours, x)) == (shape[1] == 5)


def test_what_does_not_fit_into_memory_trains_in_steps(mlp: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(400)
    arrays, _ = as_data(mlp, x, y)
    roomy = steps.step_for(state_of(mlp), arrays, None, mean_square, each=False, plan=None)
    assert roomy.call.plan == Plan()
    monkeypatch.setattr(steps, "free_memory", lambda device: 1e5)
    steps._chosen.cache_clear()
    tight = steps.step_for(state_of(mlp), arrays, None, mean_square, each=False, plan=None)
    assert tight.call.plan.members == 1
    steps._chosen.cache_clear()


def test_repeated_steps_compile_once(mlp: Ensemble) -> None:
    x, y = data(13)
    state = state_of(mlp)
    before = steps.stepped._cache_size()  # type: ignore[attr-defined]
    for _ in range(4):
        state, _ = train_step(state, x, y, loss=mean_square)
    assert steps.stepped._cache_size() - before == 1  # type: ignore[attr-defined]


def test_a_state_is_a_pytree_and_says_what_it_is(mlp: Ensemble) -> None:
    state = state_of(mlp, frozen=["fc1"])
    assert repr(state) == "TrainState(3 x MLP, 18 of 50 parameters trained, 0 steps)"
    assert repr(jax.tree.map(lambda leaf: None, state)) == "TrainState(MLP)"
    close(jax.tree.map(lambda leaf: leaf, state).ensemble.params, mlp.params)


WRONG: list[tuple[Any, str]] = [
    ({"frozen": ["fc3"]}, r"`frozen` names 'fc3'; the parameters are fc1.bias"),
    ({"frozen": "fc1"}, r"must hold names; got one"),
    ({"frozen": ["fc1", "fc2"]}, r"there is nothing to train"),
    ({"hyperparams": {"learning_rate": [1, 2, 3]}}, r"no part of the optimizer's state has"),
    ({"dropout": [0.1, 0.2]}, r"`dropout` must be probabilities, one for all or \[3\]"),
    ({"dropout": 1.5}, r"`dropout` must be probabilities"),
    ({"randomness": "none"}, r"`randomness` must be 'different' or 'same'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_states_that_cannot_be_are_refused(mlp: Ensemble, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        state_of(mlp, **options)


def test_other_wrong_arguments_are_refused(mlp: Ensemble) -> None:
    x, y = data()
    with pytest.raises(
        InputError, match=r"targets must begin with the rows of the inputs, \[12\]; got `targets` \[5, 2\]"
    ):
        train_step(state_of(mlp), x, y[:5], loss=mean_square)
    with pytest.raises(InputError, match="one floating-point number"):
        train_step(state_of(mlp), x, y, loss=lambda outputs, targets: (outputs - targets) ** 2)
    with pytest.raises(InputError, match=r"every input of `each` must be \[3, \.\.\.\].*`inputs\[0\]` \[2, 12, 3\]"):
        train_step(state_of(mlp), np.stack([x, x]), np.stack([y, y, y]), loss=mean_square, each=True)
    with pytest.raises(InputError, match=r"`plan` must be a jaxensemble\.Plan or None; got 'auto'"):
        train_step(state_of(mlp), x, y, loss=mean_square, plan="auto")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`rows` are none"):
        train_step(state_of(mlp), x, y, loss=mean_square, rows=[])
    with pytest.raises(InputError, match=r"`rows` must be some of 0 to 11; got 3 to 12"):
        train_step(state_of(mlp), x, y, loss=mean_square, rows=[3, 12])
    with pytest.raises(InputError, match=r"`rows` must be \[N\] or \[3, N\]; got \[2, 2\]"):
        train_step(state_of(mlp), x, y, loss=mean_square, rows=[[3, 1], [1, 2]])
    with pytest.raises(InputError, match="one for each of 3 members"):
        TrainState.create(mlp, optax.sgd(0.1), jax.random.split(jax.random.key(0), 2))
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    scheduled = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1))
    with pytest.raises(InputError, match=r"'lr', which no part of the optimizer's state has: there are learning_rate"):
        state_of(mlp, optimizer, hyperparams={"lr": [1, 2, 3]})
    with pytest.raises(InputError, match=r"`rows` must be indices of rows.*float64\[2\]"):
        train_step(state_of(mlp), x, y, loss=mean_square, rows=[0.0, 1.0])
    with pytest.raises(InputError, match="which the optimizer takes from a schedule"):
        state_of(mlp, scheduled, hyperparams={"learning_rate": [1, 2, 3]})
    with pytest.raises(InputError, match=r"`hyperparams\['learning_rate'\]` must be \[3\]"):
        state_of(mlp, optimizer, hyperparams={"learning_rate": [1, 2]})
    dropping = Ensemble.from_modules([MLP(0.5, rngs=nnx.Rngs(0))])
    alpha = torch_bridge.to_ensemble(
        [nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout(0.5))], (torch.ones(2, 3),), check=False
    )
    with pytest.raises(InputError, match=r"the rate of 1, a AlphaDropout cannot be set"):
        state_of(alpha, dropout=0.1)
    assert state_of(dropping, dropout=0.1).rates.keys() == {"dropout.rate"}


def test_networks_for_evaluation_only_are_refused() -> None:
    ensemble = torch_bridge.to_ensemble(members_of(lambda: nn.Linear(3, 2)), (torch.ones(2, 3),), check=False)
    network = dataclasses.replace(ensemble.network, evaluation_only="it says so")
    with pytest.raises(StateError, match="for evaluation only, because it says so"):
        state_of(dataclasses.replace(ensemble, network=network))


# fit


def test_fit_takes_every_row_once_an_epoch(mlp: Ensemble) -> None:
    x, y = data(10)
    state = state_of(mlp, optax.sgd(0.0))
    seen: list[np.ndarray] = []

    def loss(outputs: Any, targets: Any) -> jax.Array:
        jax.debug.callback(lambda values: seen.append(np.asarray(values)), targets[:, 0])
        return mean_square(outputs, targets)

    _, history = fit(state, x, y, loss=loss, epochs=2, batch=4, shuffle="same", plan=Plan())
    jax.effects_barrier()
    assert history.loss.shape == (2, 3)
    rows = [values for values in seen if values.ndim == 1]
    for epoch in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        np.testing.assert_allclose(np.sort(np.concatenate(epoch)), np.sort(y[:, 0]))


@pytest.mark.parametrize("longest", [100, 4])  # steps of one program: all of an epoch's, or half of them
def test_fit_is_train_steps_in_order(mlp: Ensemble, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["jaxensemble.training.fit"], "_LONGEST", longest)
    x, y = data(26)
    got, history = fit(state_of(mlp), x, y, loss=mean_square, epochs=2, batch=4, shuffle="never")
    state, losses = state_of(mlp), []
    for _ in range(2):
        for first in range(0, 26, 4):
            state, found = train_step(state, x[first : first + 4], y[first : first + 4], loss=mean_square)
            losses.append(found)
    close(got.ensemble.params, state.ensemble.params)
    close(history.loss, np.array(losses).reshape(2, 7, 3).mean(1))


def test_fit_refuses_an_optimizer_whose_state_changes_its_kind(mlp: Ensemble) -> None:
    def narrowed(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, state.astype("float16")

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros(3, "float32"), narrowed)
    x, y = data(8)
    with pytest.raises(InputError, match=r"keeps its shapes and dtypes from step to step"):
        fit(state_of(mlp, optimizer), x, y, loss=mean_square, epochs=1, batch=4)


def test_members_learn_from_samples_of_their_own(mlp: Ensemble) -> None:
    same = Ensemble.from_modules([mlp[0]] * 3)
    x, y = data(50)
    _, history = fit(state_of(same), x, y, loss=mean_square, epochs=1, batch=50, bootstrap=True, shuffle="never")
    assert len(set(history.loss[0].tolist())) == 3
    _, history = fit(state_of(same), x, y, loss=mean_square, epochs=1, batch=50)
    np.testing.assert_allclose(history.loss[0], history.loss[0][0], rtol=1e-5)  # all rows, in whatever order


def test_members_stop_when_their_validation_loss_does_not_fall(mlp: Ensemble) -> None:
    x, y = data(40)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    state = state_of(mlp, optimizer, hyperparams={"learning_rate": [0.05, 30.0, 0.05]})  # the second one diverges
    metrics = {"largest": lambda outputs, targets: jnp.abs(outputs - targets).max()}
    with pytest.warns(UserWarning, match="the loss of member 1 is not finite any more"):
        got, history = fit(
            state, x, y, loss=mean_square, epochs=6, batch=10, validation=data(20, 1), patience=2, metrics=metrics
        )
    assert history.active[-1].tolist() == [True, False, True]
    assert history.validation["largest"].shape == (6, 3)
    assert history.best[0] > history.best[1]
    x_val, y_val = data(20, 1)
    found = jax.vmap(mean_square, (0, None))(got.ensemble(x_val), y_val)
    best = np.nanmin(history.validation["loss"], 0)
    np.testing.assert_allclose(found, best, rtol=1e-5)


def test_fit_ends_when_all_have_stopped(mlp: Ensemble) -> None:
    x, y = data(8)
    state = state_of(mlp, optax.sgd(0.0))
    _, history = fit(state, x, y, loss=mean_square, epochs=50, batch=8, validation=(x, y), patience=3)
    assert len(history) == 4


def test_the_best_epoch_is_none_that_was_not_a_number() -> None:
    assert History(np.zeros((3, 1)), {"loss": np.array([[1.0], [0.5], [np.nan]])}).best.tolist() == [1]


def test_a_history_is_plain_data_and_a_picture(tmp_path: Path) -> None:
    history = History(np.ones((3, 2)), {"loss": np.ones((3, 2)), "accuracy": np.zeros((3, 2))}, np.ones((3, 2), bool))
    again = History.from_json(history.to_json())
    assert all(
        (a == b).all()
        for a, b in zip(
            jax.tree.leaves(dataclasses.asdict(again)), jax.tree.leaves(dataclasses.asdict(history)), strict=True
        )
    )
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def runs(mlp: Ensemble, epochs: int, folder: Path | None, **options: Any) -> tuple[TrainState, History]:
    ensemble = Ensemble.from_modules([MLP(0.2, rngs=nnx.Rngs(seed)) for seed in range(3)])
    x, y = data(30)
    state = state_of(ensemble, optax.adam(0.05))
    return fit(
        state, x, y, loss=mean_square, epochs=epochs, batch=8, validation=data(20, 1), patience=20,
        checkpoints=folder, **options,
    )  # fmt: skip


def same_bits(a: Any, b: Any) -> None:
    words = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(words(x), words(y))


def test_a_run_goes_on_from_its_checkpoints_to_the_same_bits(mlp: Ensemble, tmp_path: Path) -> None:
    expected, history = runs(mlp, 5, None)
    runs(mlp, 2, tmp_path / "run")
    got, again = runs(mlp, 5, tmp_path / "run")
    same_bits(got, expected)
    np.testing.assert_array_equal(again.loss, history.loss)
    with pytest.raises(InputError, match=r"(?s)checkpoints of another run.*bootstrap: False there, True here"):
        runs(mlp, 5, tmp_path / "run", bootstrap=True)
    with pytest.raises(InputError, match=r"(?s)checkpoints of another run.*state: .*program of more: nothing there"):
        x, y = data(30)
        fit(
            got, x, y, loss=mean_square, epochs=5, batch=8, validation=data(20, 1), patience=20,
            metrics={"more": mean_square}, checkpoints=tmp_path / "run",
        )  # fmt: skip


def test_a_folder_that_holds_no_checkpoints_is_refused_and_left_alone(mlp: Ensemble, tmp_path: Path) -> None:
    note = tmp_path / "3" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(InputError, match=r"3 cannot be read as a checkpoint of `fit` \(KeyError: .*another directory"):
        runs(mlp, 1, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["3", "note.txt"] and note.read_text() == "mine"


def test_a_loss_that_is_no_number_any_more_is_told_once(mlp: Ensemble) -> None:
    x, y = data()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.01)
    state = state_of(mlp, optimizer, hyperparams={"learning_rate": [0.01, 1e30, 0.01]})
    with pytest.warns(UserWarning, match="the loss of member 1 is not finite any more") as told:
        _, history = fit(state, x, y, loss=mean_square, epochs=4, batch=6)
    assert len(told) == 1 and np.isfinite(history.loss[:, [0, 2]]).all()


def weighted_square(*weights: float, slope: float = 1.0) -> Any:
    """A jitted loss with an array and a gradient of its own."""
    weight = jnp.array(weights)

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    same.defjvp(lambda primals, tangents: (primals[0], slope * tangents[0]))
    return jax.jit(lambda a, b: jnp.mean(weight * (same(a) - b) ** 2))


LOSS, OPTIMIZER = "program of the loss and the network", "program of the optimizer"
OTHER_RUNS: dict[str, tuple[Any, set[str]]] = {
    "the same": ({"loss": weighted_square(1, 2)}, set()),
    "an array of a loss": ({"loss": weighted_square(1, 3)}, {LOSS, "program of loss"}),
    "a gradient of a loss": ({"loss": weighted_square(1, 2, slope=2.0)}, {LOSS}),
    "a rate": ({"optimizer": optax.sgd(0.2)}, {OPTIMIZER}),
    "a metric": ({"metric": lambda a, b: jnp.mean(a > b)}, {"program of accuracy"}),
    "what is frozen": ({"frozen": ["fc1.bias"]}, {"frozen", LOSS, OPTIMIZER}),
    "a mode": ({"train": False}, {LOSS}),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_another_loss_optimizer_or_mode_is_another_run(case: str, tmp_path: Path) -> None:
    x, y = data(30)
    ensemble = Ensemble.from_modules([MLP(0.1, rngs=nnx.Rngs(seed)) for seed in range(3)]).eval()

    def run(loss: Any, optimizer: Any, metric: Any, **options: Any) -> None:
        measured: Any = {"validation": (x, y > 0), "metrics": {"accuracy": metric}}  # other targets than in training
        state = state_of(ensemble, optimizer, **options)
        fit(state, x, y, loss=loss, epochs=1, batch=8, checkpoints=tmp_path, **measured)

    before = {
        "loss": weighted_square(1, 2), "optimizer": optax.sgd(0.1), "metric": lambda a, b: jnp.mean((a > 0) == b),
    }  # fmt: skip
    changes, expected = OTHER_RUNS[case]
    run(**before)
    if not expected:
        return run(**before | changes)
    with pytest.raises(InputError, match=r"checkpoints of another run.*begins a run of its own\.\n") as error:
        run(**before | changes)
    assert {line.strip().partition(":")[0] for line in str(error.value).splitlines()[1:]} == expected


def test_a_run_in_another_precision_is_another_run(mlp: Ensemble, tmp_path: Path) -> None:
    """Whose bits would be others. Nothing that was traced before, in the same process, may be taken for it."""
    runs(mlp, 1, tmp_path)
    with jax.default_matmul_precision("bfloat16"), pytest.raises(InputError, match=f"{LOSS}: .* there, .* here$"):
        runs(mlp, 2, tmp_path)


KILLED = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import jax
import test_training
with jax.default_matmul_precision("highest"):
    test_training.runs(None, 15, pathlib.Path({folder!r}))
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bits(mlp: Ensemble, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env={**os.environ})
    deadline = time.monotonic() + 200
    while not (folder / "2").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert 2 <= done < 15
    got, history = runs(mlp, 15, folder)
    expected, _ = runs(mlp, 15, None)
    same_bits(got, expected)
    assert len(history) == 15


def test_a_run_goes_on_under_the_plan_it_began_with(
    mlp: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which otherwise follows from the memory that is free: another plan rounds otherwise."""
    expected, _ = runs(mlp, 4, None)
    runs(mlp, 2, tmp_path / "run")
    monkeypatch.setattr(steps, "free_memory", lambda device: 1e4)
    steps._chosen.cache_clear()
    got, _ = runs(mlp, 4, tmp_path / "run")
    steps._chosen.cache_clear()
    same_bits(got, expected)


def test_fit_refuses_a_last_minibatch_that_is_too_small_before_it_begins() -> None:
    class Normed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm, self.linear = layers.BatchNorm(4), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(self.norm(x))

    ensemble = Ensemble.from_modules([Normed(nnx.Rngs(seed)) for seed in range(2)])
    x, y = np.ones((9, 4), "float32"), np.ones((9, 2), "float32")
    with pytest.raises(InputError, match=r"`batch` leaves 1 of 9 rows .*more than one value"):
        fit(state_of(ensemble), x, y, loss=mean_square, epochs=1, batch=4)


@pytest.mark.parametrize("place", ["gs://bucket/run", __file__])
def test_checkpoints_are_kept_in_a_directory_here(mlp: Ensemble, place: str) -> None:
    x, y = data()
    with pytest.raises(InputError, match="`checkpoints` must be a directory of this machine"):
        fit(state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4, checkpoints=place)


@pytest.mark.parametrize(("package", "extra"), [("orbax.checkpoint", "train"), ("matplotlib.figure", "plots")])
def test_a_missing_package_is_told_with_its_extra(
    mlp: Ensemble, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    x, y = data()
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'jaxensemble\[{extra}\]'"):
        if extra == "train":
            fit(state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4, checkpoints=tmp_path / "run")
        else:
            History(np.zeros((1, 2))).plot(tmp_path / "history.png")


def test_what_is_no_state_optimizer_or_loss_is_refused(mlp: Ensemble) -> None:
    x, y = data()
    with pytest.raises(InputError, match=r"`optimizer` must be one of optax's.*torch_bridge\.optimizer.*Got SGD"):
        TrainState.create(mlp, torch.optim.SGD([torch.ones(1)], 0.1), jax.random.key(0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`ensemble` must be a jaxensemble\.Ensemble; got list"):
        TrainState.create([mlp], optax.sgd(0.1), jax.random.key(0))  # type: ignore[arg-type]
    for run in (train_step, functools.partial(fit, epochs=1, batch=4)):
        with pytest.raises(InputError, match=r"`state` must be what TrainState\.create makes; got Ensemble"):
            run(mlp, x, y, loss=mean_square)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no gradient with respect to any parameter"):
        train_step(state_of(mlp), x, y, loss=lambda outputs, targets: jnp.mean(outputs > targets))


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), F.mse_loss, functools.partial(F.mse_loss, reduction="sum"), torch.dist, "mse"]
)
def test_losses_and_metrics_are_functions_of_jax(mlp: Ensemble, loss: Any) -> None:
    x, y = data()
    message = r"must be a function of \(outputs, targets\) made of JAX's operations"
    with pytest.raises(InputError, match=f"`loss` {message}"):
        train_step(state_of(mlp), x, y, loss=loss)
    with pytest.raises(InputError, match=f"`loss` {message}"):
        fit(state_of(mlp), x, y, loss=loss, epochs=1, batch=4)
    measured: Any = functools.partial(fit, loss=mean_square, epochs=1, batch=4, validation=(x, y))
    with pytest.raises(InputError, match=rf"`metrics\['other'\]` {message}"):
        measured(state_of(mlp), x, y, metrics={"other": loss})
    with pytest.raises(InputError, match="`metrics` must be functions by name"):
        measured(state_of(mlp), x, y, metrics=[loss])


def test_fit_refuses_all_that_is_wrong_at_once(mlp: Ensemble) -> None:
    x, y = data()
    with pytest.raises(InputError, match=r"`epochs` must be.*`batch` must be.*`shuffle` must be.*need `validation`"):
        fit(state_of(mlp), x, y, loss=mean_square, epochs=0, batch=0, shuffle="no", patience=2)  # type: ignore[arg-type]
