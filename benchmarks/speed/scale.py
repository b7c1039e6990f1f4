"""The cost of members over many devices: simulated for GPUs, and measured for processes on this machine.

`python -m benchmarks.speed.scale` measures, and writes `benchmarks/results/scale-cpu.json` and the tables of
`docs/scale.md`; with `--page` it writes the tables alone.
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import typer

from benchmarks.pages import replace_part
from benchmarks.results import RESULTS, ROOT

FILE, PAGE = RESULTS / "scale-cpu.json", ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- scale: python -m benchmarks.speed.scale --page -->", "<!-- end of scale -->"

MEMBERS, ROWS, CALLS, ROUNDS = 8, 64, 20, 5

FLOPS, MEMORY = 67e12, 4.8e12
"""An H200: float32 operations and bytes of memory a second, https://www.nvidia.com/en-us/data-center/h200/."""

HOST, LINK, NETWORK = 8, 450e9, 50e9
"""GPUs of a host, and bytes a second in one direction: NVLink of 900 GB/s in both, and 400 Gb/s between hosts."""

FOR_TESTS = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "OMP_NUM_THREADS")
"""Settings of the tests, under which programs are slow."""

LATENCY = 5e-6
"""The seconds of one step of a ring, assumed."""

NETWORKS = {
    "MLP, 118,282 parameters": (2 * 118_282 * ROWS, 4 * 118_282, 10),
    "ResNet-18 at 64 x 64": (2 * 149e6 * ROWS, 4 * 11_689_512, 1000),
}
"""Of a member on 64 rows: operations, bytes of weights, and classes."""


def simulated_seconds(flops: float, weights: float, classes: int, members: int, gpus: int) -> tuple[float, float]:
    """The seconds in which every GPU computes its members, and in which the sums of a prediction are sent.

    A device needs the larger of operations / rate and bytes / bandwidth. A sum `[N, C]` is sent over the slowest link,
    the faster way of two: in a ring of n devices by `2 (n - 1)` steps of a part in n, in a tree by `2 log2(n)`
    steps, of which two take the time of the whole, as in
    https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4.

    >>> [round(1e3 * seconds, 2) for seconds in simulated_seconds(67e9, 1e6, 10, members=8, gpus=4)]
    [2.0, 0.02]
    >>> simulated_seconds(67e9, 1e6, 10, members=8, gpus=1)[1]
    0.0
    """
    share = math.ceil(members / gpus)
    computing = share * max(flops / FLOPS, weights / MEMORY)
    if gpus == 1:
        return computing, 0.0
    sending = 4 * ROWS * classes / (LINK if gpus <= HOST else NETWORK)
    ring = 2 * (gpus - 1) * (LATENCY + sending / gpus)
    tree = 2 * math.ceil(math.log2(gpus)) * LATENCY + 2 * sending
    return computing, min(ring, tree)


def simulation() -> list[dict[str, Any]]:
    """The rows of the simulated table: 1,000 members on 1 to 1,000 GPUs."""
    rows = []
    for name, cost in NETWORKS.items():
        alone = sum(simulated_seconds(*cost, members=1000, gpus=1))
        for gpus in (1, 4, 8, 64, 256, 1000):
            computing, sending = simulated_seconds(*cost, members=1000, gpus=gpus)
            rows.append(
                {
                    "1,000 members": name,
                    "GPUs": gpus,
                    "members each": math.ceil(1000 / gpus),
                    "computing, us": round(1e6 * computing, 1),
                    "sums of a prediction, us": round(1e6 * sending, 1),
                    "times one GPU": round(alone / (computing + sending), 1),
                }
            )
    return rows


def measure(processes: int) -> dict[str, dict[str, float]]:
    """Returns what the first of so many processes measures, which start together on the cores of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.speed.scale", "--port", str(port), "--processes", str(processes)]
    others = {name: value for name, value in os.environ.items() if name not in FOR_TESTS}
    environment = others | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    started = [
        subprocess.Popen([*command, "--number", str(number)], stdout=subprocess.PIPE, env=environment, text=True)
        for number in range(processes)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process failed: {[process.returncode for process in started]}")
    return json.loads(outputs[0].splitlines()[-1])


def together(run: Callable[[], None]) -> float:
    """The seconds of a run, from when the first process begins with several until the last one ends; the median."""
    from jax.experimental.multihost_utils import sync_global_devices

    run()
    seconds = []
    for number in range(ROUNDS):
        sync_global_devices(f"begin {number}")
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        sync_global_devices(f"end {number}")
        seconds.append((time.perf_counter() - start) / CALLS)
    return statistics.median(seconds)


def work(port: int, processes: int, number: int) -> dict[str, dict[str, float]]:
    """Measures calls and training steps of members over all processes, in seconds; this is one of them."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    import jax
    import jax.numpy as jnp
    import optax
    import torch

    jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
    import torch_bridge
    from benchmarks.speed import networks
    from jaxensemble import TrainState, train_step

    def loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    state: Any = None
    mesh, found = jax.make_mesh((processes,), ("members",)), {}
    for name in ("mlp", "cnn"):
        torch.manual_seed(0)
        models, (x,) = networks.make(name, MEMBERS, ROWS)
        ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
        state = TrainState.create(ensemble, optax.adam(1e-3), jax.random.key(0)).over(mesh)
        run, labels = ensemble.over(mesh).prepare(x), jnp.zeros(ROWS, jnp.int32)

        def call() -> None:
            jax.block_until_ready(run(x))  # noqa: B023

        def step() -> None:
            nonlocal state
            state, losses = train_step(state, x, labels, loss=loss)  # noqa: B023
            jax.block_until_ready((state.ensemble.params, losses))

        found[name] = {"call": together(call), "step": together(step)}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a table of Markdown."""
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(map(str, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """Returns the page with the tables of the results."""
    content = json.loads(FILE.read_text())
    found = content["environment"]
    where = f"{found['processor']}, {found['cores']} cores, jax {found['versions']['jax']}, {found['date'][:10]}"
    parts = [
        "Simulated, not measured: a prediction of 1,000 members for 64 rows on H200s, float32.",
        table(simulation()),
        f"Measured (`{FILE.name}`: {where}): {MEMBERS} members, {ROWS} rows, one core for each process.",
        table(content["rows"]),
    ]
    return replace_part(text, BEGIN, END, "\n\n".join(parts))


def main(port: int = 0, processes: int = 0, number: int = 0, page_only: bool = typer.Option(False, "--page")) -> None:
    """Measures 1, 2 and 4 processes, and writes the file and the page. The other options are for the processes."""
    if processes:
        print(json.dumps(work(port, processes, number)))
        return
    if not page_only:
        from torch_bridge.report import environment, save_json

        rows = [
            {
                "members": name,
                "processes": count,
                **{f"a {kind}, ms": round(1e3 * taken, 2) for kind, taken in one.items()},
            }
            for count in (1, 2, 4)
            for name, one in measure(count).items()
        ]
        rows.sort(key=lambda row: str(row["members"]))
        content = {"environment": environment(), "rows": rows, "simulation, not measured": simulation()}
        save_json(FILE, content)
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    typer.run(main)
