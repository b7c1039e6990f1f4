"""Training beside PyTorch: ten steps, the twins of its optimizers with their state, and what has no twin."""

import dataclasses
import functools
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
from jaxensemble import Ensemble, InputError, Plan, StateError, TrainState, fit, train_step
from jaxensemble.artifact import Artifact
from jaxensemble.artifact.description import describe_in_text
from jaxensemble.errors import UnsupportedError
from jaxensemble.modules.state import flatten
from jaxensemble.network.proof import Lineage
from tests.helpers.training import MLP, close, cross_entropy, data, mean_square, state_of
from torch_bridge.demo import SimpleCNN, SimpleMLP


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
    with pytest.raises(InputError, match=r"has not the parameters that the models have now: member 0, weight"):
        torch_bridge.train_state(models[::-1], optimizers[::-1], ensemble, jax.random.key(0))


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
    told = describe_in_text(Artifact.open(tmp_path / "trained"))
    assert "verified against PyTorch" in told and "; trained from a verified port of" in told
    with pytest.raises(StateError, match="there is no proof: the comparison failed"):
        torch_bridge.check(models[::-1], state.ensemble, (x,), thorough=False).proven(state.ensemble)


def test_a_loader_of_pytorch_gives_minibatches_and_pixels_are_scaled_within_the_step() -> None:
    models = members_of(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)))
    ensemble = torch_bridge.to_ensemble(models, (torch.zeros(2, 2, 4, 4),), check=False)
    images, labels = torch.randint(256, (10, 2, 6, 6), dtype=torch.uint8), torch.arange(10) % 2

    def loader(epoch: int) -> Any:
        order = torch.Generator().manual_seed(epoch)
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images, labels), batch_size=4, shuffle=True, generator=order
        )

    def cropped(key: Any, batch: Any) -> Any:
        images, labels = batch
        top, left = jax.random.randint(key, (2,), 0, 3)
        return jax.lax.dynamic_slice(images, (0, 0, top, left), (*images.shape[:2], 4, 4)) / 255, labels

    state, _ = fit(state_of(ensemble), loader, loss=cross_entropy, epochs=1, augment=cropped)
    after = state_of(ensemble)
    for x, y in loader(0):
        keys = [jax.random.fold_in(jax.random.fold_in(key, 2**32 - 3), after.steps) for key in after.keys]
        pixels = np.stack([cropped(key, (x.numpy(), y))[0] for key in keys])
        after, _ = train_step(after, pixels, np.stack([y] * 3), loss=cross_entropy, each=True)
    close(state.ensemble.params, after.ensemble.params)
    with pytest.raises(InputError, match=r"inputs may have other shapes than the network's 1, .*got \[10, 3\], \[10\]"):
        fit(
            state,
            ({"a": np.ones((10, 3), "int8"), "b": labels},),
            labels,
            loss=cross_entropy,
            epochs=1,
            batch=2,
            augment=cropped,
        )
    with pytest.raises(InputError, match=r"(?s)what `augment` gives back does not fit: .*expected \[N, 2, 4, 4\]"):
        fit(state, images, labels, loss=cross_entropy, epochs=1, batch=2, augment=lambda key, batch: batch)


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


def test_rows_that_meet_are_not_taken_apart() -> None:
    models, x = members_of(resnet), torch.randn(4, 3, 9, 9)
    ensemble = torch_bridge.to_ensemble(models, (x,), mode="as_is", check=False)
    with pytest.raises(InputError, match="may mix the rows of a minibatch"):
        train_step(state_of(ensemble), x, np.zeros(4, "int32"), loss=cross_entropy, plan=Plan(rows=2))
    state = state_of(ensemble.eval(), train=False)  # statistics as they are: rows are apart
    train_step(state, x, np.zeros(4, "int32"), loss=cross_entropy, plan=Plan(rows=2))


def test_other_wrong_arguments_are_refused(mlp: Ensemble) -> None:
    x, y = data()
    with pytest.raises(
        InputError, match=r"targets must begin with the rows of the inputs, \[12\]; got `targets` \[5, 2\]"
    ):
        train_step(state_of(mlp), x, y[:5], loss=mean_square)
    with pytest.raises(InputError, match="one floating-point number"):
        train_step(state_of(mlp), x, y, loss=lambda outputs, targets: (outputs - targets) ** 2)
    with pytest.raises(
        InputError, match=r"(?s)every input of `each` must be \[3, \.\.\.\].*`inputs\[0\]` \[2, 12, 3\]"
    ):
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
    with pytest.raises(InputError, match=r"(?s)`rows` must be indices of rows.*float64\[2\]"):
        train_step(state_of(mlp), x, y, loss=mean_square, rows=[0.0, 1.0])
    with pytest.raises(InputError, match="which the optimizer takes from a schedule"):
        state_of(mlp, scheduled, hyperparams={"learning_rate": [1, 2, 3]})
    with pytest.raises(InputError, match=r"`hyperparams\['learning_rate'\]` must be \[3\]"):
        state_of(mlp, optimizer, hyperparams={"learning_rate": [1, 2]})
    dropping = Ensemble.from_modules([MLP(0.5, rngs=nnx.Rngs(0))], mode="as_is")
    alpha = torch_bridge.to_ensemble(
        [nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout(0.5))], (torch.ones(2, 3),), mode="as_is", check=False
    )
    with pytest.raises(InputError, match=r"the rate of 1, a AlphaDropout cannot be set"):
        state_of(alpha, dropout=0.1)
    assert state_of(dropping, dropout=0.1).rates.keys() == {"dropout.rate"}


def test_networks_for_evaluation_only_are_refused() -> None:
    ensemble = torch_bridge.to_ensemble(members_of(lambda: nn.Linear(3, 2)), (torch.ones(2, 3),), check=False)
    network = dataclasses.replace(ensemble.network, evaluation_only="it says so")
    with pytest.raises(StateError, match="for evaluation only, because it says so"):
        state_of(dataclasses.replace(ensemble, network=network))


def test_what_is_no_state_optimizer_or_loss_is_refused(mlp: Ensemble) -> None:
    x, y = data()
    with pytest.raises(InputError, match=r"(?s)`optimizer` must be one of optax's.*torch_bridge\.optimizer.*Got SGD"):
        TrainState.create(mlp, torch.optim.SGD([torch.ones(1)], 0.1), jax.random.key(0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`ensemble` must be a jaxensemble\.Ensemble; got list"):
        TrainState.create([mlp], optax.sgd(0.1), jax.random.key(0))  # type: ignore[arg-type]
    for run in (train_step, functools.partial(fit, epochs=1, batch=4)):
        with pytest.raises(InputError, match=r"`state` must be what TrainState\.create makes; got Ensemble"):
            run(mlp, x, y, loss=mean_square)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no gradient with respect to any parameter"):
        train_step(state_of(mlp), x, y, loss=lambda outputs, targets: jnp.mean(outputs > targets))


@pytest.mark.thinned
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
