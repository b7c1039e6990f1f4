"""`torch.func`'s API over Flax, the ensemble and PyTorch's loop, timed. `python -m benchmarks.speed.functional`.

The network is the tutorial's CNN, with and without `jax.jit`, and with the grouped convolutions that `jax.vmap` makes.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import torch
import typer

import torch_bridge
from benchmarks.results import RESULTS
from jaxensemble import functional_call, stack_module_state, vmap
from jaxensemble.torch_func import functional
from torch_bridge.demo import SimpleCNN
from torch_bridge.report import environment, save_json
from torch_bridge.timing import side_by_side


def main(members: int = 5, rows: int = 32, rounds: int = 20) -> None:
    """Writes `benchmarks/results/functional-<platform>.json`: times, as multiples of the ensemble's."""
    models = [SimpleCNN().eval() for _ in range(members)]
    images = torch.randn(rows, 1, 28, 28)
    ensemble = torch_bridge.to_ensemble(models, (images,), check=False)
    modules, x = list(ensemble), jnp.asarray(images.numpy())
    params, buffers = stack_module_state(modules)

    def call(params: Any, buffers: Any, x: Any) -> Any:
        return vmap(lambda p, b, x: functional_call(modules[0], (p, b), (x,)), (0, 0, None))(params, buffers, x)

    def loss(params: Any) -> Any:
        return (call(params, buffers, x) ** 2).mean()

    jitted, gradient = jax.jit(call), jax.jit(jax.grad(loss))
    grouped, grouped_gradient = jax.jit(lambda *args: call(*args)), jax.jit(jax.grad(lambda params: loss(params)))
    with mock.patch.object(functional, "_map_one_by_one", lambda structure, module: None):
        jax.block_until_ready((grouped(params, buffers, x), grouped_gradient(params)))
    ready = jax.block_until_ready
    with torch.inference_mode():
        timed = side_by_side(
            {
                "ensemble": lambda: ready(ensemble(x)),
                "PyTorch's loop": lambda: [model(images) for model in models],
                "jit": lambda: ready(jitted(params, buffers, x)),
                "jit, grouped": lambda: ready(grouped(params, buffers, x)),
                "without jit": lambda: ready(call(params, buffers, x)),
                "gradient": lambda: ready(gradient(params)),
                "gradient, grouped": lambda: ready(grouped_gradient(params)),
            },
            rounds=rounds,
            warm_ups=1,
        )
    ratios = {name: one.median / timed["ensemble"].median for name, one in timed.items()}
    found = {"environment": environment() | {"members": members, "rows": rows}, "times as long": ratios}
    save_json(RESULTS / f"functional-{jax.default_backend()}.json", found)
    print(", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    typer.run(main)
