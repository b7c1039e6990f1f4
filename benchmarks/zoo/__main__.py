"""`python -m benchmarks.zoo`: every network of a library, one process each, resumable."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.results import RESULTS
from benchmarks.zoo import networks, one, training
from benchmarks.zoo.one import Result
from benchmarks.zoo.results import append, load

console = Console(stderr=True)


def run(
    library: Annotated[str, typer.Option(help=f"One of {', '.join(networks.LIBRARIES)}.")] = "torchvision",
    only: Annotated[list[str] | None, typer.Option(help="Names of networks; all of them without.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="A file of JSON lines; what stands there is not run again.")
    ] = None,
    again: Annotated[bool, typer.Option(help="Run again what did not pass.")] = False,
    minutes: Annotated[float, typer.Option(help="What one network may take.")] = 60,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = os.cpu_count() or 1,
    train: Annotated[bool, typer.Option(help="Ten training steps of some networks of timm instead.")] = False,
    single: Annotated[str | None, typer.Option("--one", hidden=True)] = None,
) -> None:
    """Ports every network of a library as an ensemble of two, and proves it against PyTorch."""
    prove = training.prove if train else functools.partial(one.prove, library)
    if single is not None:
        print(json.dumps(dataclasses.asdict(one.guarded(single, threads, prove))))
        return
    file = results or RESULTS / (f"training-{library}.jsonl" if train else f"zoo-{library}.jsonl")
    done = load(file)
    names = [
        name
        for name in only or (training.TRAINED if train else networks.names(library))
        if name not in done or (again and done[name].status != "passed")
    ]
    with Progress(console=console) as progress:
        for name in progress.track(names, description=library):
            result = _in_process(name, ["--library", library, *(["--train"] if train else [])], threads, minutes)
            append(file, result)
            progress.console.print(f"{name}: {result.status} {result.reason[:300]}")
    found = load(file)
    passed = sum(result.status == "passed" for result in found.values())
    print(f"{passed} of {len(found)} networks of {library} {'trained' if train else 'ported'} and proved")
    raise typer.Exit(passed != len(found))


def _in_process(name: str, options: list[str], threads: int, minutes: float) -> Result:
    """Runs a network in a process of its own, so that one that takes all memory or time ends alone."""
    command = [sys.executable, "-m", "benchmarks.zoo", *options, "--threads", str(threads), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes, check=False)
    except subprocess.TimeoutExpired:
        return Result(name, "crashed", reason=f"no end after {minutes} minutes")
    if done.returncode:
        return Result(name, "crashed", reason=f"exit status {done.returncode}: {done.stderr[-500:]}")
    fields: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Result(**{**fields, "input": tuple(fields["input"])})


if __name__ == "__main__":
    typer.run(run)
