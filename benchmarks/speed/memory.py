"""Memory of a training step of 1,000 members under plans, and of 10. `python -m benchmarks.speed.memory`.

As XLA says of the compiled program. The state is given: parameters and Adam's moments of all members, and a minibatch.
The step needs as much for the next state, whose place it uses for activations and gradients before, and more for those
that find no place there.
"""

import functools
import time
from typing import Any

import jax
import numpy as np
import optax
import typer

import torch_bridge
from benchmarks.results import RESULTS
from benchmarks.speed.networks import make
from jaxensemble import Plan, TrainState
from jaxensemble.training.data import as_data
from jaxensemble.training.planning import make_step
from jaxensemble.training.step import compile_step, next_state
from torch_bridge.report import draw_table, environment, save_json

NETWORKS = ("mlp", "digits")
ROWS = 64
CASES = (
    (10, Plan()),
    (1000, Plan()),
    (1000, Plan(members=10)),
    (1000, Plan(members=10, rows=8)),
    (1000, Plan(members=10, remat=True)),
)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def started(name: str, members: int) -> tuple[TrainState, Any]:
    """Returns the state before the first step, and a minibatch."""
    models, inputs = make(name, members, ROWS)
    ensemble = torch_bridge.to_ensemble(models, inputs, check=False)
    state = TrainState.create(ensemble, optax.adam(1e-3), jax.random.key(0))
    return state, as_data(ensemble, inputs, np.arange(ROWS) % 10)[0]


def measure(name: str, members: int, plan: Plan) -> dict[str, Any]:
    """Returns the memory of one step, in MB, and the least time of three, in seconds."""
    state, data = started(name, members)
    step = make_step(state, data, None, cross_entropy, each=False, plan=plan)
    compiled = compile_step(next_state, step).lower(state, data, None, None, step=step).compile()
    memory: Any = compiled.memory_analysis()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(state, data, None, None))
        times.append(time.perf_counter() - start)
    return {
        "network": name,
        "members x rows": f"{members} x {ROWS}",
        "plan": str(plan),
        "state, MB": round(memory.argument_size_in_bytes / 1e6),
        "next state, MB": round(memory.output_size_in_bytes / 1e6),
        "beside them, MB": round(memory.temp_size_in_bytes / 1e6),
        "seconds": round(min(times), 3),
    }


def main() -> None:
    """Writes `benchmarks/results/memory-<platform>.json`."""
    rows = []
    for name in NETWORKS:
        rows += [measure(name, members, plan) for members, plan in CASES]
        started.cache_clear()
    platform, here = jax.default_backend(), environment()
    here |= {"device": platform, "threads": here["cores"]}
    save_json(RESULTS / f"memory-{platform}.json", {"environment": here, "rows": rows})
    print(draw_table("Memory of a training step", tuple(rows[0]), [tuple(map(str, row.values())) for row in rows]))


if __name__ == "__main__":
    typer.run(main)
