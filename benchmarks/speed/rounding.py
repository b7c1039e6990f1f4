"""Rounding and time of products and tanh on CPUs. `python -m benchmarks.speed.rounding`.

Errors are those of float32 against float64: of XLA's own step, of ours, which stands for it on CPUs, and of PyTorch's;
of products relative, root mean square; of tanh in units in the last place. Times are in turn; a figure is the median.
Those of products are of many members' weights by one shared minibatch: as `jax.vmap` leaves it, and as ours.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import typer

from benchmarks.results import RESULTS
from jaxensemble.programs.forms import use_forms
from torch_bridge.report import draw_table, environment, save_json

ROWS = 64
FEATURES = 256
TERMS = (256, 512, 768, 1024, 1280, 2048, 5120)
# members, rows, terms, features
SHARED = (
    (10, 1, 784, 128),
    (10, 8, 512, 512),
    (10, 64, 784, 128),
    (10, 64, 128, 128),
    (10, 16, 784, 128),
    (10, 64, 512, 512),
    (10, 64, 1024, 1024),
    (50, 1024, 512, 512),
)


def errors(terms: int) -> dict[str, float]:
    """Returns the relative errors of a product with a number of terms, by the library that computes it."""
    generator = np.random.default_rng(terms)
    x, kernel = (generator.standard_normal(shape, np.float32) for shape in ((ROWS, terms), (terms, FEATURES)))
    truth = x.astype(np.float64) @ kernel.astype(np.float64)
    found = {
        "XLA": jax.jit(jnp.dot)(x, kernel),
        "ours": jax.jit(use_forms(jnp.dot, "cpu", "all members"))(x, kernel),
        "PyTorch": torch.from_numpy(x) @ torch.from_numpy(kernel),
    }
    scale = np.sqrt(np.mean(np.square(truth)))
    return {name: float(np.sqrt(np.mean(np.square(np.asarray(y) - truth))) / scale) for name, y in found.items()}


def times(case: tuple[int, int, int, int], rounds: int) -> dict[str, float]:
    """Times products of one shared minibatch and the weights of all members, in milliseconds."""
    members, rows, terms, features = case
    x = jax.random.normal(jax.random.key(0), (rows, terms))
    kernels = jax.random.normal(jax.random.key(1), (members, terms, features))
    mapped = jax.vmap(jnp.dot, (None, 0))
    calls: dict[str, Callable[..., Any]] = {
        "jax.vmap": jax.jit(mapped),
        "ours": jax.jit(use_forms(mapped, "cpu", "all members")),
    }
    return _milliseconds({name: functools.partial(call, x, kernels) for name, call in calls.items()}, rounds)


def tanh(rounds: int) -> dict[str, dict[str, float]]:
    """Returns the largest and the root mean square error of tanh, and milliseconds for a million values."""
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.uniform(-side, side, 250_000) for side in (9, 2, 0.7, 0.01)]).astype(np.float32)
    given = torch.from_numpy(x)
    truth = np.tanh(x.astype(np.float64))
    calls: dict[str, Callable[[], Any]] = {
        "XLA": functools.partial(jax.jit(jnp.tanh), jnp.asarray(x)),
        "ours": functools.partial(jax.jit(use_forms(jnp.tanh, "cpu", "all members")), jnp.asarray(x)),
        "PyTorch": lambda: torch.tanh(given),
    }
    taken = _milliseconds(calls, rounds)
    found = {}
    for name, call in calls.items():
        error = np.abs(np.asarray(call(), np.float64) - truth) / np.spacing(np.abs(truth).astype(np.float32))
        rms = float(np.sqrt(np.mean(np.square(error))))
        found[name] = {"largest": float(error.max()), "rms": rms, "milliseconds": taken[name]}
    return found


def _milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}


def main(rounds: int = 61) -> None:
    """Measures products and tanh, and writes `benchmarks/results/rounding-cpu.json`."""
    rounding = [{"terms": terms, "errors": errors(terms)} for terms in TERMS]
    shared = [{"case": case, "milliseconds": times(case, rounds)} for case in SHARED]
    print(_table("Relative error, by terms of a sum", "terms", [(row["terms"], row["errors"]) for row in rounding]))
    rows = [(", ".join(map(str, row["case"])), row["milliseconds"]) for row in shared]
    print(_table("Milliseconds: members, rows, terms, features", "product", rows))
    elementary = tanh(rounds)
    print(_table("tanh of a million values: units in the last place", "", list(elementary.items())))
    found = {"environment": environment(), "products": rounding, "shared": shared, "tanh": elementary}
    save_json(RESULTS / f"rounding-{jax.default_backend()}.json", found)


def _table(title: str, first: str, rows: list[tuple[Any, dict[str, float]]]) -> str:
    columns = list(rows[0][1])
    lines = [(str(name), *(f"{found[column]:.3g}" for column in columns)) for name, found in rows]
    return draw_table(title, (first, *columns), lines)


if __name__ == "__main__":
    typer.run(main)
