"""Time and memory of porting, next to the bytes of the weights that it moves. `make bench-porting`.

Every case has a process of its own. Members are in memory already and the check is off, so the time is that of
`to_ensemble` itself, from modules to stacked arrays. Memory is the growth of the process's peak: the stack, the
exporter's graphs and all else.
"""

import json
import resource
import subprocess
import sys
import time

import jax
import typer

import torch_bridge
from benchmarks.results import RESULTS
from benchmarks.zoo import networks
from torch_bridge.report import draw_table, environment, save_json

CASES = (
    ("resnet18", 2),
    ("resnet18", 100),
    ("mobilenet_v2", 2),
    ("convnext_tiny", 2),
    ("vit_b_16", 2),
    ("maxvit_t", 2),
)


def measure(name: str, members: int) -> dict[str, float | int | str]:
    """Measures one case, in this process."""
    models, inputs = networks.make("torchvision", name, members)
    before = _peak()
    start = time.perf_counter()
    ensemble = torch_bridge.to_ensemble(models, inputs, check=False)
    jax.block_until_ready(ensemble.params)
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((ensemble.params, ensemble.buffers)))
    return {
        "network": name,
        "members": members,
        "seconds": round(seconds, 2),
        "weights_mb": round(weights / 1e6),
        "peak_growth_mb": round((_peak() - before) / 1e6),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(one: str = typer.Option("", hidden=True), members: int = typer.Option(2, hidden=True)) -> None:
    """Runs every case and writes `benchmarks/results/porting-cpu.json`."""
    if one:
        print(json.dumps(measure(one, members)))
        return
    rows = []
    for name, count in CASES:
        command = [sys.executable, "-m", "benchmarks.speed.porting", "--one", name, "--members", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    save_json(RESULTS / "porting-cpu.json", {"environment": environment(), "rows": rows})
    print(draw_table("Porting", tuple(rows[0]), [tuple(map(str, row.values())) for row in rows]))


if __name__ == "__main__":
    typer.run(main)
