"""Helpers of the tests of training: a small network, data, losses, and a run of `fit`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxensemble import Ensemble, History, TrainState, fit


def mean_square(outputs: Any, targets: Any) -> jax.Array:
    return jnp.mean((outputs - targets) ** 2)


def cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


class MLP(nnx.Module):
    """Three layers, with dropout between them if there is a rate."""

    def __init__(self, rate: float = 0.0, width: int = 8, *, rngs: nnx.Rngs):
        self.fc1, self.fc2 = nnx.Linear(3, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.dropout(nnx.tanh(self.fc1(x))))


def data(rows: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 3)).astype("float32")
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)


def state_of(ensemble: Ensemble, optimizer: Any = None, **options: Any) -> TrainState:
    return TrainState.create(ensemble, optimizer or optax.sgd(0.1, momentum=0.9), jax.random.key(0), **options)


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


def runs(mlp: Ensemble, epochs: int, folder: Path | None, **options: Any) -> tuple[TrainState, History]:
    ensemble = Ensemble.from_modules([MLP(0.2, rngs=nnx.Rngs(seed)) for seed in range(3)], mode="as_is")
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
