"""Speed of every form of a convolution, layer by layer, and of its gradients. `python -m benchmarks.speed.lowering`.

A layer is run as plans run it: for one member after another, written out or in a loop, each with its kernel, and for
all under `jax.vmap`; under XLA's own settings and under those that plans name. Forms are measured in turn; a figure is
the median, in GFLOP/s of what a direct convolution computes. A gradient counts three convolutions.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import typer
from jax import lax

from benchmarks.results import RESULTS
from jaxensemble.programs.cpu.convolutions import FORMS, convolution
from jaxensemble.programs.cpu.training import convolution_for_training
from jaxensemble.programs.forms import use_forms
from jaxensemble.running.compilers import compiler_options
from torch_bridge.report import environment, save_json

COMPILERS = (None, "eigen")
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
    """Measures GFLOP/s by way, form and compiler."""
    side, window, channels, features, stride, groups = layer
    x = jax.random.normal(jax.random.key(0), (MEMBERS, rows, side, side, channels))
    kernels = jax.random.normal(jax.random.key(1), (MEMBERS, window, window, channels // groups, features))
    out = -(-side // stride)
    work = 2 * MEMBERS * rows * out * out * window * window * (channels // groups) * features
    calls = {
        f"{way}, {form}, {compiler}": _compiled(way, _layer(layer, form), x, kernels, compiler)
        for way, form in _cases(layer)
        for compiler in COMPILERS
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            repeats = 1 if seconds[name] and seconds[name][0] > 0.05 else 5
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(call())
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {
        name: (3 if "gradient" in name else 1) * work / statistics.median(taken) / 1e9
        for name, taken in seconds.items()
    }


def _cases(layer: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """The ways and forms of a layer. A loop over built-in gradients is left out: it takes minutes."""
    _, window, _, _, _, groups = layer
    forms = ["built-in", "im2col"] if window == 1 else [form for form in FORMS if form != "grouped" or groups > 1]
    for way in ("alone", "loop", "vmap"):
        yield from ((way, form) for form in forms)
    if groups == 1:
        yield from (("gradient alone", form) for form in ("built-in", "im2col", TRAINING))
        yield from (("gradient in a loop", form) for form in ("im2col", TRAINING))


TRAINING = "training"
"""The form of `convolution_for_training`, which chooses by sizes."""


def _layer(layer: tuple[int, ...], form: Any) -> Callable[..., Any]:
    """One member's layer: the convolution and its activation."""
    _, _, _, _, stride, groups = layer

    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        options = {
            "window_strides": (stride, stride),
            "padding": "SAME",
            "dimension_numbers": lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC")),
            "feature_group_count": groups,
        }
        if form == TRAINING:
            options["padding"] = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
            return jnp.maximum(convolution_for_training(x, kernel, **options), 0)
        return jnp.maximum(convolution(x, kernel, choose=lambda sizes: form, **options), 0)

    return run


def _compiled(
    way: str, layer: Callable[..., Any], x: jax.Array, kernels: jax.Array, compiler: str | None
) -> Callable[[], Any]:
    """The compiled call of all members, after its first run."""
    one = layer
    if way.startswith("gradient"):
        one = jax.grad(lambda x, kernel: jnp.sum(layer(x, kernel) ** 2), (0, 1))
    members = [(x[k], kernels[k]) for k in range(MEMBERS)]
    ways: dict[str, tuple[Callable[..., Any], Any]] = {
        "alone": (lambda members: [one(*member) for member in members], (members,)),
        "loop": (lambda x, kernels: lax.map(lambda pair: one(*pair), (x, kernels)), (x, kernels)),
        "vmap": (jax.vmap(one), (x, kernels)),
    }
    function, operands = ways[way.split()[-1]]
    run = jax.jit(use_forms(function, "cpu", "all members"), compiler_options=compiler_options(compiler, "cpu") or None)
    jax.block_until_ready(run(*operands))
    return lambda: run(*operands)


def main(rows: int = 16, rounds: int = 9) -> None:
    """Measures every layer and writes `benchmarks/results/lowering-<platform>.json`."""
    found = []
    for layer in LAYERS:
        gflops = measure(layer, rows, rounds)
        found.append({"layer": layer, "gflops": gflops})
        print("side, window, channels, features, stride, groups:", *layer)
        for way in dict.fromkeys(name.split(", ")[0] for name in gflops):
            forms = {
                name.removeprefix(f"{way}, "): value for name, value in gflops.items() if name.startswith(f"{way},")
            }
            fastest = sorted(forms, key=lambda name: -forms[name])
            print(f"  {way}:", "; ".join(f"{name} {forms[name]:.3g}" for name in fastest), flush=True)
    path = RESULTS / f"lowering-{jax.default_backend()}.json"
    save_json(path, {"environment": environment(), "members": MEMBERS, "rows": rows, "layers": found})


if __name__ == "__main__":
    typer.run(main)
