"""Predicts with a saved ensemble, without PyTorch.

The ensemble was saved with PyTorch, by `ensemble.save(path)` or on the command line:

    torch-bridge port torch_bridge.demo:SimpleMLP --input 16,1,28,28 --members 5 --out digits
    python examples/serve_without_torch.py digits
"""

import sys

import jax
import numpy as np

from jaxensemble import Ensemble


def main(path: str) -> None:
    ensemble = Ensemble.load(path)  # compares every array with its hash, and runs nothing that is in the directory
    print(ensemble)
    print("verified against PyTorch" if ensemble.proof else "NOT verified against PyTorch")

    shapes = ensemble.network.input_shapes.values()
    inputs = [np.random.default_rng(0).random([size or 8 for size in shape], np.float32) for shape in shapes]
    predict = jax.jit(lambda ensemble, *inputs: ensemble.predict(*inputs))  # compiled once for each batch size
    prediction = predict(ensemble, *inputs)
    print("classes:", prediction.soft_vote)
    print("unsure by, in nats:", prediction.predictive_entropy.round(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
