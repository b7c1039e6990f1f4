"""A deep ensemble: ten CNNs learn handwritten digits in one program, next to PyTorch's loop over the same ten.

    python examples/deep_ensemble.py

Once from PyTorch's initialisation, and once from members that PyTorch has trained for a while. Both frameworks make the
same steps: Adam, minibatches of 64 in an order of each member's own, dropout. Both train in turn, an epoch each.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import jax
import numpy as np
import optax
import torch
import torch.nn.functional as F
import typer

import jaxensemble
import torch_bridge
from jaxensemble import Ensemble, TrainState
from torch_bridge.demo import DigitCNN, digits
from torch_bridge.report import draw_table

MEMBERS, BATCH, RATE = 10, 64, 2e-3


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == labels).mean()


def measured(ensemble: Ensemble, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns how accurate the ensemble is, and how well calibrated."""
    prediction = ensemble.predict(images)
    mean = prediction.mean  # [N, classes], probabilities
    members = np.asarray(prediction.probabilities).argmax(-1) == labels
    return {
        "accuracy of a member": float(members.mean()),
        "accuracy": float((np.asarray(prediction.soft_vote) == labels).mean()),
        "NLL": float(jaxensemble.negative_log_likelihood(prediction.log_mean, labels)),
        "Brier": float(jaxensemble.brier_score(mean, labels)),
        "ECE": float(jaxensemble.expected_calibration_error(mean, labels)),
    }


def torch_epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    model.train()
    for rows in torch.randperm(len(x)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()


def taken(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(
    epochs: Annotated[int, typer.Option(min=5)] = 12, before: Annotated[int, typer.Option(min=1, max=3)] = 3
) -> None:
    (images, labels), (test_images, test_labels) = digits()
    test = test_images.numpy(), test_labels.numpy()
    torch.manual_seed(0)
    models = [DigitCNN().eval() for _ in range(MEMBERS)]
    optimizers = [torch.optim.Adam(model.parameters(), RATE) for model in models]

    def port() -> Ensemble:
        return torch_bridge.to_ensemble(models, (images[:BATCH],))  # proves that it gives what PyTorch gives

    state = TrainState.create(port(), optax.adam(RATE), jax.random.key(0))
    columns = {"untrained": measured(state.ensemble, *test)}
    ours, theirs = [], []

    def our_epoch() -> None:
        nonlocal state
        state, _ = jaxensemble.fit(state, images, labels, loss=cross_entropy, epochs=1, batch=BATCH)
        jax.block_until_ready(state)

    def their_epoch() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            torch_epoch(model, optimizer, images, labels)

    def both(count: int) -> None:
        for _ in range(count):
            theirs.append(taken(their_epoch))
            ours.append(taken(our_epoch))

    both(before)
    half = port()
    ported = torch_bridge.train_state(models, optimizers, half, jax.random.key(1))
    both(epochs - before)
    columns |= {"PyTorch": measured(port(), *test), "jaxensemble": measured(state.ensemble, *test)}
    columns[f"PyTorch, {before} epochs"] = measured(half, *test)
    ported, history = jaxensemble.fit(
        ported, images, labels, loss=cross_entropy, epochs=epochs - before, batch=BATCH,
        validation=test, metrics={"accuracy": accuracy},
    )  # fmt: skip
    columns["then jaxensemble"] = measured(ported.ensemble, *test)
    rows = [(name, *(f"{column[name]:.4f}" for column in columns.values())) for name in columns["untrained"]]
    print(draw_table(f"{MEMBERS} x DigitCNN, {epochs} epochs, {len(test[1])} test images", ("", *columns), rows))
    print(f"validation accuracy of members, by epoch: {np.round(history.validation['accuracy'].mean(1), 3).tolist()}")
    slow, fast = statistics.median(theirs[1:]), statistics.median(ours[1:])
    print(f"an epoch: PyTorch's loop {slow:.2f} s, jaxensemble {fast:.2f} s, {slow / fast:.1f} times as fast")
    assert torch_bridge.to_torch(state.ensemble)[0].keys() == models[0].state_dict().keys()


if __name__ == "__main__":
    typer.run(main)
