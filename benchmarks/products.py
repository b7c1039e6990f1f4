"""Products of matrices on CPUs: how far they round, and how fast they are. `python -m benchmarks.products`.

Errors are those of float32 against float64, root mean square and relative: of XLA's own product, of ours, which sums
long ones up in blocks, and of PyTorch's. Times are those of many members' weights by one shared minibatch: as
`jax.vmap` leaves it, and as ours, measured in turn; a figure is the median.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import typer

from jaxensemble.products import with_products
from torch_bridge.report import environment, save_json, table
from zoo.results import RESULTS

ROWS = 64
FEATURES = 256
TERMS = (256, 512, 768, 1024, 1280, 2048, 5120)
# members, rows, terms, features
SHARED = (
    (10, 64, 784, 128),
    (10, 64, 128, 128),
    (10, 16, 784, 128),
    (10, 64, 512, 512),
    (10, 64, 1024, 1024),
    (50, 1024, 512, 512),
)


def errors(terms: int) -> dict[str, float]:
    """The relative errors of a product of so many terms, by who computes it."""
    generator = np.random.default_rng(terms)
    x, kernel = (generator.standard_normal(shape, np.float32) for shape in ((ROWS, terms), (terms, FEATURES)))
    truth = x.astype(np.float64) @ kernel.astype(np.float64)
    found = {
        "XLA": jax.jit(jnp.dot)(x, kernel),
        "ours": jax.jit(with_products(jnp.dot))(x, kernel),
        "PyTorch": torch.from_numpy(x) @ torch.from_numpy(kernel),
    }
    scale = np.sqrt(np.mean(np.square(truth)))
    return {name: float(np.sqrt(np.mean(np.square(np.asarray(y) - truth))) / scale) for name, y in found.items()}


def times(case: tuple[int, int, int, int], rounds: int) -> dict[str, float]:
    """Milliseconds of one shared minibatch by the weights of all members."""
    members, rows, terms, features = case
    x = jax.random.normal(jax.random.key(0), (rows, terms))
    kernels = jax.random.normal(jax.random.key(1), (members, terms, features))
    mapped = jax.vmap(jnp.dot, (None, 0))
    calls: dict[str, Callable[..., Any]] = {"jax.vmap": jax.jit(mapped), "ours": jax.jit(with_products(mapped))}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call(x, kernels))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(x, kernels))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}


def main(rounds: int = 21) -> None:
    """Measures all of it and writes `benchmarks/results/products-cpu.json`."""
    rounding = [{"terms": terms, "errors": errors(terms)} for terms in TERMS]
    shared = [{"case": case, "milliseconds": times(case, rounds)} for case in SHARED]
    print(_table("Relative error, by terms of a sum", "terms", [(row["terms"], row["errors"]) for row in rounding]))
    rows = [(", ".join(map(str, row["case"])), row["milliseconds"]) for row in shared]
    print(_table("Milliseconds: members, rows, terms, features", "product", rows))
    found = {"environment": environment(), "rounding": rounding, "shared": shared}
    save_json(RESULTS / f"products-{jax.default_backend()}.json", found)


def _table(title: str, first: str, rows: list[tuple[Any, dict[str, float]]]) -> str:
    columns = list(rows[0][1])
    lines = [(str(name), *(f"{found[column]:.3g}" for column in columns)) for name, found in rows]
    return table(title, (first, *columns), lines)


if __name__ == "__main__":
    typer.run(main)
