"""Train an ensemble over all devices of all hosts: the same script runs in every process.

    python examples/many_hosts.py DIR                 one machine, all its devices
    srun python examples/many_hosts.py DIR            on a cluster: see examples/slurm and examples/k8s

DIR is a folder that all hosts have. A run that was killed goes on from the checkpoints there, also on fewer hosts.
"""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxensemble import Ensemble, TrainState, fit

MEMBERS = 16
CLUSTERS = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "KUBERNETES_SERVICE_HOST")
"""Variables that say that other processes may have been started with this one."""


class MLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x)))


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(folder: Path) -> None:
    try:
        jax.distributed.initialize()  # before anything else asks JAX for its devices
    except ValueError as error:  # JAX found no cluster
        known = [name for name in CLUSTERS if name in os.environ]
        if known:  # else each process would train alone, and write over the others' checkpoints
            raise SystemExit(
                f"{', '.join(known)} is set, but JAX has not found the other processes: {error}"
            ) from error
        print(f"One process: {str(error).splitlines()[0]}")
    x = np.random.default_rng(0).normal(size=(512, 8)).astype("float32")  # the same in every process
    y = (x.sum(1) > 0).astype("int32")
    ensemble = Ensemble.from_modules([MLP(rngs=nnx.Rngs(seed)) for seed in range(MEMBERS)], mode="eval")
    state = TrainState.create(ensemble, optax.adam(1e-2), jax.random.key(0))
    state = state.over(jax.make_mesh((jax.device_count(),), ("members",)))
    state, history = fit(
        state, x, y, loss=loss, epochs=5, batch=64, checkpoints=folder / "run", progress=jax.process_index() == 0
    )
    right = state.ensemble.predict(x).soft_vote == jnp.asarray(y)
    if jax.process_index() == 0:
        print(f"{MEMBERS} members on {jax.device_count()} devices of {jax.process_count()} processes")
        print(f"mean loss {history.loss[-1].mean():.3f}, accuracy of all together {np.asarray(right).mean():.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
