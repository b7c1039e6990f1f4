"""Minibatches that come from a function, and augmentation."""

import itertools
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxensemble import Ensemble, InputError, Plan, fit, train_step
from tests.helpers.training import close, data, mean_square, same_bits, state_of


def batches(epoch: int) -> Any:
    """Minibatches of 8, 8 and 5 rows, in another order every epoch."""
    x, y = data(21)
    order = np.random.default_rng(epoch).permutation(21)
    return [(x[order[rows]], y[order[rows]]) for rows in (slice(8), slice(8, 16), slice(16, 21))]


def test_minibatches_come_from_a_function_of_the_epoch(mlp: Ensemble) -> None:
    got, history = fit(state_of(mlp), batches, loss=mean_square, epochs=2, validation=data(21))
    state, losses = state_of(mlp), []
    for epoch in range(2):
        for x, y in batches(epoch):
            state, found = train_step(state, x, y, loss=mean_square)
            losses.append(found)
    same_bits(got, state)
    close(history.loss, np.array(losses).reshape(2, 3, 3).mean(1))
    assert history.validation["loss"].shape == (2, 3)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_of_a_stream_no_minibatch_is_lost(checkpointed: bool, mlp: Ensemble, tmp_path: Path) -> None:
    asked, drawn = [], []

    def stream() -> Any:
        for number in range(100):
            drawn.append(number)
            yield data(4)

    endless = stream()

    def three(epoch: int) -> Any:
        asked.append(epoch)
        return itertools.islice(endless, 3)

    place = tmp_path if checkpointed else None
    fit(state_of(mlp), three, loss=mean_square, epochs=2, validation=data(), checkpoints=place)
    assert asked == [0, 1] and drawn == list(range(6))


def noisy(key: jax.Array, batch: Any) -> Any:
    """Noise on the inputs, and rows mixed among themselves."""
    inputs, targets = batch
    noise, mixing = jax.random.split(key)
    share = jax.random.uniform(mixing, (len(inputs), 1))
    inputs = inputs + jax.random.normal(noise, inputs.shape)
    return share * inputs + (1 - share) * inputs[::-1], share * targets + (1 - share) * targets[::-1]


@pytest.mark.thinned
@pytest.mark.parametrize("given", ["rows", "batches"])
def test_augmentation_has_a_key_for_every_member_and_step_and_goes_on_to_the_same_bits(
    given: str, mlp: Ensemble, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def augment(key: jax.Array, batch: Any) -> Any:
        jax.debug.callback(lambda words: seen.append(tuple(np.asarray(words).tolist())), jax.random.key_data(key))
        return noisy(key, batch)

    def run(epochs: int, folder: Path | None, augment: Any = noisy) -> Any:
        options: Any = {"loss": mean_square, "epochs": epochs, "checkpoints": folder, "augment": augment}
        if given == "batches":
            return fit(state_of(mlp), batches, **options)
        return fit(state_of(mlp), *data(21), batch=8, shuffle="same", **options)

    expected, _ = run(3, None, augment)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 3 * 3 * 3  # members, steps, epochs
    run(1, tmp_path)
    got, _ = run(3, tmp_path)
    same_bits(got, expected)
    for other in (None, lambda key, batch: batch):
        with pytest.raises(InputError, match=r"(?s)checkpoints of another run.*the augmentation"):
            run(3, tmp_path, other)


def test_an_augmented_step_is_a_step_with_those_rows(mlp: Ensemble) -> None:
    """Compares also a few rows at a time, and members that draw the same numbers."""
    same = Ensemble.from_modules([mlp[0]] * 3)
    x, y = data(8)
    pixels = np.round(x * 10).astype("int8")

    def scaled(key: jax.Array, batch: Any) -> Any:  # from other data than the network takes
        inputs, targets = batch
        return (inputs[:, :3] / 10 + jax.random.normal(key, (len(inputs), 1)), targets)

    options: Any = {"loss": mean_square, "epochs": 1, "batch": 8, "shuffle": "never", "augment": scaled}
    found = {}
    for randomness in ("different", "same"):
        state = state_of(same, randomness=randomness)
        got, _ = fit(state, np.concatenate([pixels, pixels], 1), y, **options)
        parts, _ = fit(state, np.concatenate([pixels, pixels], 1), y, plan=Plan(rows=3, members=2), **options)
        close(got.ensemble.params, parts.ensemble.params)
        keys = [jax.random.fold_in(jax.random.fold_in(key, 2**32 - 3), 0) for key in state.keys]
        inputs = np.stack([scaled(key, (pixels, y))[0] for key in keys])
        expected, _ = train_step(state, inputs, np.stack([y] * 3), loss=mean_square, each=True)
        close(got.ensemble.params, expected.ensemble.params)
        found[randomness] = len({leaf.tobytes() for leaf in np.asarray(got.ensemble.params["fc1"]["kernel"])})
    assert found == {"different": 3, "same": 1}


OTHER_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "a loader": ({"inputs": [data()]}, r"`targets` are missing; minibatches, for example of a DataLoader, are given"),
    "both": ({"inputs": batches, "batch": 3, "shuffle": "same"}, r"`batch`, `shuffle` cannot be given with a func"),
    "no minibatches": ({"inputs": lambda epoch: iter([])}, "gave no minibatches for epoch 0"),
    "nothing": ({"inputs": lambda epoch: None}, "must give minibatches; got NoneType"),
    "no pair": ({"inputs": lambda epoch: [data()[0]]}, r"a minibatch must be a pair, \(inputs, targets\); got ndarray"),
    "no function": ({"augment": 3}, r"`augment` must be a function of \(key, \(inputs, targets\)\)"),
    "a failure": ({"augment": lambda key, batch: batch.x}, r"cannot be called with a key and .*float32\[5,3\]"),
    "inputs alone": ({"augment": lambda key, batch: batch[0]}, r"must return a pair.*got one array, float32\[5,3\]"),
    "no epoch": ({"inputs": lambda: [data()]}, r"(?s)of an epoch must be a function of \(epoch\); got .*<lambda>\(\)"),
    "more inputs": ({"augment": lambda key, batch: ((batch[0], 1), batch[1])}, "must return inputs that nest as"),
    "other rows": ({"augment": lambda key, batch: (batch[0], batch[1][:2])}, "does not fit: targets must begin"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_DATA)
def test_data_and_augmentation_that_do_not_fit_are_refused(case: str, mlp: Ensemble) -> None:
    options, message = OTHER_DATA[case]
    x, y = data(5)
    arrays: Any = {} if "inputs" in options else {"inputs": x, "targets": y, "batch": 5, "shuffle": "never"}
    with pytest.raises(InputError, match=message):
        fit(state_of(mlp), loss=mean_square, epochs=1, **arrays, **options)


FOREIGN: dict[str, Any] = {
    "Python's numbers": lambda: random.random(),
    "numpy's numbers": lambda: np.random.normal(),
    "a generator of one's own": np.random.default_rng(0).random,
}


@pytest.mark.parametrize("case", FOREIGN)
def test_augmentation_by_other_random_numbers_than_the_key_s_is_refused(case: str, mlp: Ensemble) -> None:
    x, y = data(4)
    with pytest.raises(InputError, match="`augment` must draw its random numbers from `key`"):
        fit(
            state_of(mlp), x, y, loss=mean_square, epochs=1, batch=4,
            augment=lambda key, batch: (batch[0] + FOREIGN[case](), batch[1]),
        )  # fmt: skip
