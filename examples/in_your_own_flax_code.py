"""One ported network inside a Flax module of your own: trained with optax, saved with orbax.

    python examples/in_your_own_flax_code.py

A member of an ensemble, `ensemble[k]`, is an ordinary `nnx.Module`, and its parameters an ordinary tree. Nothing here
would change if `ensemble` came from `Ensemble.load(path)`, on a machine without PyTorch.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
from flax import nnx

import torch_bridge


class Classifier(nnx.Module):
    """A network from PyTorch, with a new head."""

    def __init__(self, backbone: nnx.Module, *, rngs: nnx.Rngs):
        self.backbone = backbone
        self.head = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.backbone(x)))


def loss(model: Classifier, x: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


@nnx.jit
def step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> jax.Array:
    value, gradients = nnx.value_and_grad(loss)(model, x, labels)
    optimizer.update(model, gradients)
    return value


def main() -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16)) for _ in range(3)]
    ensemble = torch_bridge.to_ensemble(models, (torch.randn(8, 4),))

    model = Classifier(ensemble[0], rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
    labels = (x.sum(-1) > 0).astype(jnp.int32)
    losses = [float(step(model, optimizer, x, labels)) for _ in range(30)]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "params", nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        fresh = Classifier(ensemble[1], rngs=nnx.Rngs(1))
        state = nnx.state(fresh)
        nnx.replace_by_pure_dict(state, checkpointer.restore(Path(folder) / "params", nnx.to_pure_dict(state)))
        nnx.update(fresh, state)
    print("restored:", bool((fresh(x) == model(x)).all()))

    # The parameters of all members are an ordinary tree as well: every leaf has one more axis, for the members.
    stacked = optax.sgd(1e-2)
    updates, _ = stacked.update(jax.tree.map(jnp.ones_like, ensemble.params), stacked.init(ensemble.params))
    print("updated:", jax.tree.map(jnp.shape, optax.apply_updates(ensemble.params, updates)))


if __name__ == "__main__":
    main()
