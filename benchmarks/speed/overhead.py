"""Time of calls of an ensemble, and of a prepared one, beyond their compiled program.

`python -m benchmarks.speed.overhead`. The network has three layers with few features, so that the program itself takes
almost no time.
"""

import functools

import jax
import jax.numpy as jnp
import torch
import typer
from torch import nn

import torch_bridge
from benchmarks.results import RESULTS
from torch_bridge.report import environment, save_json
from torch_bridge.timing import side_by_side


def main(calls: int = 100, rounds: int = 50) -> None:
    """Writes `benchmarks/results/overhead-<platform>.json`, in microseconds a call."""
    models = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(10)]
    x = torch.randn(8, 4)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    x = jnp.asarray(x.numpy())
    prepared = ensemble.prepare(x)
    compiled = functools.partial(prepared.program.run, prepared.arrays, ensemble.rngs, None, (x,))

    def repeated(function):
        def run() -> None:
            jax.block_until_ready([function() for _ in range(calls)])

        return run

    ways = {"ensemble": lambda: ensemble(x), "prepared": lambda: prepared(x), "compiled": compiled}
    timed = side_by_side({name: repeated(way) for name, way in ways.items()}, rounds=rounds)
    found = {name: 1e3 * one.median / calls for name, one in timed.items()}
    found |= {f"{name}, beyond the compiled": found[name] - found["compiled"] for name in ("ensemble", "prepared")}
    save_json(RESULTS / f"overhead-{jax.default_backend()}.json", {"environment": environment(), "microseconds": found})
    print(", ".join(f"{name}: {value:.1f} µs" for name, value in found.items()))


if __name__ == "__main__":
    typer.run(main)
