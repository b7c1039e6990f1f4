"""`Plan(members=k, offload=True)`: members from the host, a few at a time, with the results of all at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, Plan, TrainState, fit, train_step
from jaxensemble.running import offload, runner
from jaxensemble.running.offload import run_groups
from tests.helpers.training import MLP, data, mean_square, same_bits, state_of

pytestmark = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices; the tests' settings make four CPUs")

MEMBERS = 5
SIZES = [2, 9]
X, Y = data(8)


def on_host(tree: Any) -> Any:
    """Puts arrays onto another device than the default one, as the host is for an accelerator."""
    return jax.device_put(tree, jax.devices()[1])


def plan_of(size: int) -> Plan:
    return Plan(members=size, offload=True)


def ensemble_of(rate: float = 0.0) -> Ensemble:
    return Ensemble.from_modules([MLP(rate, rngs=nnx.Rngs(seed)) for seed in range(MEMBERS)], mode="eval")


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("size", SIZES)
def test_calls(size: int) -> None:
    ensemble, xs = ensemble_of(), np.stack([X + k for k in range(MEMBERS)])
    host, plan = on_host(ensemble), plan_of(size)
    assert host(X, plan=plan).devices() == {jax.devices()[0]}
    close(host(X, plan=plan), ensemble(X))
    close(host.each(xs, plan=plan), ensemble.each(xs))
    close(host.predict(X, plan=plan).mutual_information, ensemble.predict(X).mutual_information)
    for (found,), (wanted,) in zip(
        (part.values() for part in host.predict_batches(X, rows=3, plan=plan)),
        (part.values() for part in ensemble.predict_batches(X, rows=3)),
        strict=True,
    ):
        close(found, wanted)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers_are_those_of_all_at_once(randomness: Any) -> None:
    ensemble, key = ensemble_of(0.4).train(), jax.random.key(2)
    options: dict[str, Any] = {"key": key, "randomness": randomness}
    close(on_host(ensemble)(X, plan=plan_of(2), **options), ensemble(X, **options))


def test_buffers_stay_on_the_host() -> None:
    modules = [nnx.BatchNorm(3, rngs=nnx.Rngs(seed)) for seed in range(MEMBERS)]
    ensemble = Ensemble.from_modules(modules, mode="train")
    outputs, after = on_host(ensemble).update(X, plan=plan_of(2))
    wanted, wanted_after = ensemble.update(X)
    close((outputs, after.buffers), (wanted, wanted_after.buffers))
    assert jax.tree.leaves(after.buffers)[0].devices() == {jax.devices()[1]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("each", [False, True])
def test_training_steps(size: int, each: bool) -> None:
    x, y = (np.stack([X] * MEMBERS), np.stack([Y] * MEMBERS)) if each else (X, Y)
    state = state_of(ensemble_of(0.2), optax.adam(0.01))
    host = on_host(state)
    for _ in range(2):
        state, losses = train_step(state, x, y, loss=mean_square, each=each, plan=Plan(members=min(size, MEMBERS)))
        host, found = train_step(host, x, y, loss=mean_square, each=each, plan=plan_of(size))
        close(found, losses)
    close(host.ensemble.params, state.ensemble.params)
    assert jax.tree.leaves(host.opt_state)[0].devices() == {jax.devices()[1]} and int(host.steps) == 2


def run(place: Callable[[TrainState], TrainState], epochs: int = 3, **options: Any) -> Any:
    state = place(state_of(ensemble_of(0.2), optax.adam(0.05)))
    given: dict[str, Any] = {"loss": mean_square, "epochs": epochs, "batch": 3, "progress": False}
    return fit(state, X, Y, validation=data(6, 1), **given, **options)


@pytest.mark.parametrize("options", [{}, {"patience": 1}, {"bootstrap": True, "shuffle": "same"}], ids=str)
def test_fit(options: Any) -> None:
    state, history = run(lambda state: state, **options)
    host, found = run(on_host, plan=plan_of(2), **options)
    close((found.loss, found.validation["loss"]), (history.loss, history.validation["loss"]))
    close(host.ensemble.params, state.ensemble.params)


def test_fit_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    state, history = run(on_host, plan=plan_of(2))
    run(on_host, epochs=1, plan=plan_of(2), checkpoints=tmp_path / "run")
    again, found = run(on_host, plan=plan_of(2), checkpoints=tmp_path / "run")
    same_bits(again.ensemble.params, state.ensemble.params)
    np.testing.assert_array_equal(found.loss, history.loss)


def test_two_groups_are_on_the_device_at_once() -> None:
    events: list[str] = []
    groups = run_groups(lambda start: events.append(f"begin {start}"), 7, 2)
    for start, _ in groups:
        events.append(f"end {start}")
    assert events == ["begin 0", "begin 2", "end 0", "begin 4", "end 2", "begin 5", "end 4", "end 5"]


def test_the_device_gets_the_weights_of_a_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, taken = on_host(ensemble_of()), list[int]()
    take = offload.take_group

    def noted(tree: Any, *given: Any) -> Any:
        found = take(tree, *given)
        taken.extend(leaf.shape[0] for leaf in jax.tree.leaves(found))
        return found

    monkeypatch.setattr(runner, "take_group", noted)
    ensemble(X, plan=plan_of(2))
    assert set(taken) == {2}


def test_what_cannot_be_streamed_is_refused() -> None:
    ensemble, plan = ensemble_of(), plan_of(2)
    with pytest.raises(InputError, match="a plan with `offload` needs `members`"):
        Plan(offload=True)
    with pytest.raises(InputError, match=r"which jax\.jit and other transformations cannot"):
        jax.jit(lambda x: ensemble(x, plan=plan))(jnp.asarray(X))
    with pytest.raises(InputError, match="a prepared program holds the weights of all members"):
        ensemble.prepare(X, plan=plan)
    spread = ensemble.over(jax.make_mesh((2,), ("members",)))
    with pytest.raises(InputError, match=r"these are on a mesh: call `over\(None\)` first"):
        spread(X, plan=plan)
    with pytest.raises(InputError, match="these are on a mesh"):
        train_step(state_of(ensemble).over(jax.make_mesh((2,), ("members",))), X, Y, loss=mean_square, plan=plan)
