"""The identity of a run: another loss, optimizer or data is another run, and the difference is named."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, fit
from jaxensemble.training.identity import run_differences, state_identity
from jaxensemble.training.names import named_parts
from tests.helpers.training import MLP, data, mean_square, state_of


def weighted_square(*weights: float, slope: float = 1.0) -> Any:
    """A jitted loss with an array and a gradient of its own."""
    weight = jnp.array(weights)

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    same.defjvp(lambda primals, tangents: (primals[0], slope * tangents[0]))
    return jax.jit(lambda a, b: jnp.mean(weight * (same(a) - b) ** 2))


def same_sign(a: Any, b: Any) -> jax.Array:
    return jnp.mean((a > 0) == b)


TARGETS = {
    name: f"{kind}[20, 2], was {kind}[30, 2]"
    for name, kind in (("the data", "float32"), ("the validation set", "bool"))
}


OTHER_RUNS: dict[str, tuple[Any, list[str]]] = {
    "the same": ({"loss": weighted_square(1, 2)}, []),
    "an array of a loss": (
        {"loss": weighted_square(1, 3)},
        ["the loss: weight of weighted_square [1, 3], was [1, 2]"],
    ),
    "a gradient of a loss": (
        {"loss": weighted_square(1, 2, slope=2.0)},
        ["the gradient of the loss: not the same as before"],
    ),
    "a loss": (
        {"loss": lambda a, b: jnp.abs(a - b).mean()},
        ["the loss: made of <lambda>, was weighted_square, same"],
    ),
    "a rate": ({"optimizer": optax.sgd(0.2)}, ["the optimizer: learning rate 0.2, was 0.1"]),
    "a momentum": (
        {"optimizer": optax.sgd(0.1, momentum=0.5)},
        ["the optimizer: made of trace, scale, was identity, scale"],
    ),
    "a metric": ({"metric": lambda a, b: jnp.mean(a > b)}, ["the metric accuracy: made of <lambda>, was same_sign"]),
    "what is frozen": ({"frozen": ["fc1.bias"]}, ["frozen parameters fc1.bias, was none"]),
    "a mode": ({"train": False}, ["the network: layers in training mode none, was dropout"]),
    "dropout": ({"dropout": 0.3}, ["the rates of dropout: dropout.rate [0.3, 0.3, 0.3], was none",
         "the network: no dropout.rate, was 0.1"]),
    "a key": ({"randomness": "same"}, ["the random keys: not the same as before"]),
    "fewer rows than a minibatch has": (
        {"rows": 5},
        [
            f"{name}: {part}" for name in ("the data", "the validation set") for part in (
                "inputs[0] float32[5, 3], was float32[30, 3]", f"targets {TARGETS[name].replace('20', '5')}"
            )
        ],
    ),
    "a wider network": (
        {"width": 16},
        [
            "the network: fc1.out_features 16, was 8", "the network: fc2.in_features 16, was 8",
            "the weights of the members: not the same as before",
        ],
    ),
    "settings and data": (
        {"batch": 10, "patience": 3, "rows": 20, "frozen": ["fc1"]},
        [
            "batch 10, was 8", "patience 3, was None", "frozen parameters fc1.bias, fc1.kernel, was none",
            *(f"{name}: {part}" for name in ("the data", "the validation set") for part in (
                "inputs[0] float32[20, 3], was float32[30, 3]", f"targets {TARGETS[name]}"
            )),
        ],
    ),
}  # fmt: skip


@pytest.mark.thinned
@pytest.mark.parametrize("case", OTHER_RUNS)
def test_another_loss_optimizer_or_mode_is_another_run(case: str, tmp_path: Path) -> None:
    def run(
        loss: Any, optimizer: Any, metric: Any, batch: int = 8, patience: Any = None, rows: int = 30, width: int = 8,
        **options: Any,
    ) -> None:  # fmt: skip
        ensemble = Ensemble.from_modules([MLP(0.1, width, rngs=nnx.Rngs(seed)) for seed in range(3)], mode="eval")
        x, y = data(rows)
        measured: Any = {"validation": (x, y > 0), "metrics": {"accuracy": metric}}  # other targets than in training
        state = state_of(ensemble, optimizer, **options)
        fit(state, x, y, loss=loss, epochs=1, batch=batch, patience=patience, checkpoints=tmp_path, **measured)

    before = {"loss": weighted_square(1, 2), "optimizer": optax.sgd(0.1), "metric": same_sign}
    changes, expected = OTHER_RUNS[case]
    run(**before)
    if not expected:
        return run(**before | changes)
    with pytest.raises(InputError, match=r"(?s)checkpoints of another run.*begins a new run\.\n") as error:
        run(**before | changes)
    assert [line.strip() for line in error.value.details.splitlines()[1:]] == expected


SMOOTHING = 0.1


def smoothed(outputs: Any, targets: Any, weight: float = 2.0) -> jax.Array:
    return weight * jnp.mean((outputs - targets * (1 - SMOOTHING)) ** 2)


def injected(rate: float) -> Any:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=rate)


NAMED: dict[str, tuple[Any, Any, list[str]]] = {
    "adam": (optax.adamw(1e-3), optax.adamw(1e-2, b1=0.8, weight_decay=0.0), [
        "b1 of scale_by_adam 0.8, was 0.9", "weight_decay of add_decayed_weights 0.0, was 0.0001",
        "learning rate 0.01, was 0.001",
    ]),
    "groups": (
        optax.chain(optax.clip(1.0), optax.scale(3.0), optax.scale(2.0)),
        optax.chain(optax.clip(1.0), optax.scale(3.0), optax.scale(4.0)),
        ["step_size of scale (2) 4.0, was 2.0"],
    ),
    "a schedule": (
        optax.sgd(optax.cosine_decay_schedule(0.1, 100)), optax.sgd(optax.cosine_decay_schedule(0.1, 200)),
        ["decay_steps of cosine_decay_schedule 200, was 100"],
    ),
    "a schedule of one's own": (
        optax.sgd(lambda count: 0.1 / (count + 1)), optax.sgd(lambda count: 0.2 / (count + 1)),
        ["numbers written in a lambda [0.2, 1], was [0.1, 1]"],
    ),
    "a loss without numbers": (
        lambda a, b: abs(a - b).mean(), lambda a, b: ((a - b) ** 2).mean(),
        ["numbers written in a lambda [2], was none"],
    ),
    "a loss with numbers": (
        lambda a, b: ((a - b) ** 2).mean(), lambda a, b: abs(a - b).mean(),
        ["no numbers written in a lambda, was [2]"],
    ),
    "every few steps": (
        optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(),
        optax.MultiSteps(optax.sgd(0.1), 8).gradient_transformation(),
        ["every_k_schedule of MultiSteps 8, was 4"],
    ),
    "another one": (optax.sgd(0.1), optax.rprop(0.1), ["made of scale_by_rprop, scale, was identity, scale"]),
    "a partial": (smoothed, functools.partial(smoothed, weight=3.0), ["weight of smoothed 3.0, was 2.0"]),
    "nothing to tell": (smoothed, smoothed, []),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_numbers_of_optimizers_and_losses_are_told_by_name(case: str) -> None:
    before, after, expected = NAMED[case]
    then, now = (
        {"it": {"digest": k, "kind": "program", "parts": named_parts(f)}} for k, f in enumerate((before, after))
    )
    named = run_differences(now, then)
    assert all(f"it: {line}" in named for line in expected or ["not the same as before"]), named
    assert named_parts(smoothed)["SMOOTHING of smoothed"] == "0.1"


def test_numbers_within_the_state_of_an_optimizer_are_told_by_name(mlp: Ensemble) -> None:
    def state(rates: Any) -> Any:
        return state_identity(state_of(mlp, injected(0.1), hyperparams={"learning_rate": rates}))

    assert run_differences(state([0.1, 0.2, 0.4]), state([0.1, 0.2, 0.3])) == [
        "the state of the optimizer: learning_rate [0.1, 0.2, 0.4], was [0.1, 0.2, 0.3]"
    ]


def test_objects_that_refuse_to_be_looked_into_are_no_hindrance() -> None:
    class Closed:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    closed = Closed()
    assert named_parts(lambda: closed)["made of"] == "test_objects_that_refuse_to_be_looked_into_are_no_hindrance"


class Trainer:
    def __init__(self) -> None:
        self.token = "SECRET-1"
        self.smoothing, self.unnamed = 0.125, 0.375

    def loss(self, outputs: Any, targets: Any) -> jax.Array:
        assert self.token
        return (1 - self.smoothing) * mean_square(outputs, targets)


def test_strings_that_a_loss_holds_are_told_nowhere(mlp: Ensemble, tmp_path: Path) -> None:
    secret, held = "SECRET-2", {"SECRET-3": 0.625, "name": np.array(["SECRET-4"])}

    def closed(outputs: Any, targets: Any, *, by: Any = ("SECRET-5", 3)) -> jax.Array:
        assert secret and by
        return held["SECRET-3"] * trainer.loss(outputs, targets)

    trainer = Trainer()
    named = named_parts(functools.partial(closed, by="SECRET-6"))
    assert "SECRET" not in str(named) and named["by 1 of closed"] == "3" and named["held 0 of closed"] == "0.625"
    assert named_parts(trainer.loss) == {"made of": "loss", "smoothing of loss": "0.125"}
    x, y = data()
    for loss in (trainer.loss, closed):
        fit(state_of(mlp), x, y, loss=loss, epochs=1, batch=4, checkpoints=tmp_path / loss.__name__)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"smoothing of loss" in content for content in files)
    assert not any(b"SECRET" in content for content in files)
