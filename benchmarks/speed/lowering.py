"""Speed of every form of a convolution, layer by layer. `python -m benchmarks.speed.lowering`.

A layer is run as plans run it: for one member after another, each with its kernel, and for all under `jax.vmap`.
Forms are measured in turn; a figure is the median, in GFLOP/s of what a direct convolution computes.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import typer
from jax import lax

from benchmarks.results import RESULTS
from jaxensemble.programs.cpu.convolutions import FORMS, convolution
from jaxensemble.programs.forms import use_step_forms
from torch_bridge.report import draw_table, environment, save_json

MEMBERS = 4
# side, window, channels, features, stride, groups
LAYERS = (
    (64, 7, 3, 64, 2, 1),
    (28, 3, 1, 32, 1, 1),
    (26, 3, 32, 64, 1, 1),
    (32, 3, 3, 32, 2, 1),
    (64, 3, 64, 64, 1, 1),
    (16, 3, 64, 64, 1, 1),
    (16, 3, 64, 128, 2, 1),
    (8, 3, 128, 128, 1, 1),
    (8, 3, 128, 256, 2, 1),
    (4, 3, 256, 256, 1, 1),
    (4, 3, 256, 512, 2, 1),
    (2, 3, 512, 512, 1, 1),
    (16, 1, 64, 128, 2, 1),
    (16, 1, 64, 256, 1, 1),
    (16, 1, 96, 24, 1, 1),
    (2, 1, 320, 1280, 1, 1),
    (28, 3, 96, 96, 1, 96),
    (16, 3, 96, 96, 2, 96),
    (8, 5, 240, 240, 1, 240),
    (2, 3, 960, 960, 1, 960),
    (16, 7, 96, 96, 1, 96),
    (16, 11, 96, 96, 1, 96),
    (16, 3, 128, 128, 1, 32),
    (16, 3, 256, 256, 2, 32),
    (8, 3, 256, 256, 1, 32),
    (4, 3, 512, 512, 1, 32),
    (2, 3, 1024, 1024, 1, 32),
)


def measure(layer: tuple[int, ...], rows: int, rounds: int) -> dict[str, float]:
    """Measures GFLOP/s by form and way."""
    side, window, channels, features, stride, groups = layer
    x = jax.random.normal(jax.random.key(0), (MEMBERS, rows, side, side, channels))
    kernels = jax.random.normal(jax.random.key(1), (MEMBERS, window, window, channels // groups, features))
    out = -(-side // stride)
    work = 2 * MEMBERS * rows * out * out * window * window * (channels // groups) * features
    calls = {f"{way}, {form}": _call(layer, form, way) for way in ("mapped", "vmapped") for form in _forms(layer)}
    for call in calls.values():
        jax.block_until_ready(call(x, kernels))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            repeats = 1 if seconds[name] and seconds[name][0] > 0.05 else 5
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(call(x, kernels))
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: work / statistics.median(taken) / 1e9 for name, taken in seconds.items()}


def _forms(layer: tuple[int, ...]) -> list[str]:
    _, window, _, _, _, groups = layer
    if window == 1:
        return ["built-in", "im2col"]
    return [form for form in FORMS if form != "grouped" or groups > 1]


def _call(layer: tuple[int, ...], form: Any, way: str) -> Callable[..., Any]:
    _, _, _, _, stride, groups = layer

    def one(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        run = functools.partial(convolution, choose=lambda case: form, dimension_numbers=numbers)
        return jnp.maximum(run(x, kernel, (stride, stride), "SAME", feature_group_count=groups), 0)

    if way == "vmapped":
        return jax.jit(use_step_forms(jax.vmap(one), "cpu"))
    return jax.jit(use_step_forms(lambda x, kernels: lax.map(lambda pair: one(*pair), (x, kernels)), "cpu"))


def main(rows: int = 16, rounds: int = 9) -> None:
    """Measures every layer and writes `benchmarks/results/lowering-<platform>.json`."""
    found = []
    for layer in LAYERS:
        found.append({"layer": layer, "gflops": measure(layer, rows, rounds)})
        print(layer, {name: round(value, 1) for name, value in found[-1]["gflops"].items()}, file=sys.stderr)
    columns = [f"{way}, {form}" for way in ("mapped", "vmapped") for form in FORMS]
    lines = [
        (", ".join(map(str, row["layer"])), *(f"{row['gflops'][c]:.3g}" if c in row["gflops"] else "" for c in columns))
        for row in found
    ]
    print(
        draw_table("GFLOP/s: side, window, channels, features, stride, groups", ("layer", *columns), lines, width=200)
    )
    path = RESULTS / f"lowering-{jax.default_backend()}.json"
    save_json(path, {"environment": environment(), "members": MEMBERS, "rows": rows, "layers": found})


if __name__ == "__main__":
    typer.run(main)
