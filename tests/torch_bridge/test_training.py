"""Training of ported ensembles: frozen parameters, PyTorch's loaders, the way back, and wrong arguments."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

import torch_bridge
from jaxensemble import Ensemble, InputError, Plan, StateError, TrainState, fit, train_step
from jaxensemble.modules.state import flatten
from tests.helpers.torch_training import members_of, resnet
from tests.helpers.training import MLP, close, cross_entropy, data, mean_square, state_of


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
    with pytest.raises(
        InputError, match=r"inputs may have other shapes than the network's, .*1, with.*got \[10, 3\], \[10\]"
    ):
        fit(
            state,
            ({"a": np.ones((10, 3), "int8"), "b": labels},),
            labels,
            loss=cross_entropy,
            epochs=1,
            batch=2,
            augment=cropped,
        )
    with pytest.raises(
        InputError, match=r"(?s)the minibatch that `augment` returned does not fit: .*expected \[N, 2, 4, 4\]"
    ):
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
    with pytest.raises(InputError, match="`rows` must hold at least one index"):
        train_step(state_of(mlp), x, y, loss=mean_square, rows=[])
    with pytest.raises(InputError, match=r"`rows` must be between 0 and 11; got 3 to 12"):
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
    with pytest.raises(
        InputError, match=r"(?s)`optimizer` must be an optax optimizer.*torch_bridge\.optimizer.*Got SGD"
    ):
        TrainState.create(mlp, torch.optim.SGD([torch.ones(1)], 0.1), jax.random.key(0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`ensemble` must be a jaxensemble\.Ensemble; got list"):
        TrainState.create([mlp], optax.sgd(0.1), jax.random.key(0))  # type: ignore[arg-type]
    for run in (train_step, functools.partial(fit, epochs=1, batch=4)):
        with pytest.raises(
            InputError, match=r"`state` must be a TrainState, which TrainState\.create makes; got Ensemble"
        ):
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
