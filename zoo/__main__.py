"""`python -m zoo`: every network of a library, one process each, resumable."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from zoo import networks
from zoo.one import Result, main
from zoo.results import RESULTS, append, load

MINUTES = 60
console = Console(stderr=True)


def run(
    library: Annotated[str, typer.Option(help=f"One of {', '.join(networks.LIBRARIES)}.")] = "torchvision",
    only: Annotated[list[str] | None, typer.Option(help="Names of networks; all of them without.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="A file of JSON lines; what stands there is not run again.")
    ] = None,
    again: Annotated[bool, typer.Option(help="Run again what did not pass.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = os.cpu_count() or 1,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Ports every network of a library as an ensemble of two, and proves it against PyTorch."""
    if one is not None:
        print(json.dumps(dataclasses.asdict(main(library, one, threads))))
        return
    file = results or RESULTS / f"zoo-{library}.jsonl"
    done = load(file)
    names = [
        name
        for name in only or networks.names(library)
        if name not in done or (again and done[name].status != "passed")
    ]
    with Progress(console=console) as progress:
        for name in progress.track(names, description=library):
            result = _in_process(library, name, threads)
            append(file, result)
            progress.console.print(f"{name}: {result.status} {result.reason[:300]}")
    found = load(file)
    passed = sum(result.status == "passed" for result in found.values())
    print(f"{passed} of {len(found)} networks of {library} ported and proved")
    raise typer.Exit(passed != len(found))


def _in_process(library: str, name: str, threads: int) -> Result:
    """A network that takes all memory, or all time, takes nothing else with it."""
    command = [sys.executable, "-m", "zoo", "--library", library, "--threads", str(threads), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    except subprocess.TimeoutExpired:
        return Result(name, "crashed", reason=f"no end after {MINUTES} minutes")
    if done.returncode:
        return Result(name, "crashed", reason=f"exit status {done.returncode}: {done.stderr[-500:]}")
    fields: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Result(**{**fields, "input": tuple(fields["input"])})


if __name__ == "__main__":
    typer.run(run)
