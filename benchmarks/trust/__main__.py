"""`python -m benchmarks.trust fuzz|mutants`: random networks, and errors planted into them. Both resume."""

import collections
import dataclasses
import datetime
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from benchmarks.results import RESULTS, ROOT, append_lines, read_lines
from benchmarks.trust import mutations
from benchmarks.trust.networks import Seeded
from benchmarks.trust.one import mutants as planted
from benchmarks.trust.one import proved
from benchmarks.trust.page import PAGE
from benchmarks.trust.page import page as with_counts
from torch_bridge.report import environment, save_json

LINES = ROOT / "build" / "trust"
"""A line of JSON for every network, so that a run which is stopped goes on where it was."""

AT_ONCE = 25
"""Networks a process proves before it makes room for another: compiled programs stay in memory."""

CORES = os.cpu_count() or 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Processes = Annotated[int, typer.Option(min=1, help="How many processes work at once.")]


@app.command()
def fuzz(
    count: Annotated[int, typer.Option(min=1, help="How many networks, by seed, from 0 on.")] = 2000,
    processes: Processes = CORES,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prove random networks in every stage and in other ways of running them. Exits with 1 if one fails."""
    if worker:
        return _work("fuzz", worker, lambda seed: [dataclasses.asdict(proved(Seeded(seed)))])
    found = _all("fuzz", count, processes)
    statuses = collections.Counter(line["status"] for line in found)
    steps = collections.Counter(step for line in found if line["status"] == "passed" for step in set(line["steps"]))
    _summary("fuzz", {"networks": len(found), "statuses": statuses, "steps": steps})
    for line in found:
        if line["status"] in ("failed", "crashed"):
            print(
                f"seed {line['seed']}: {line['status']}: {line['reason'].splitlines()[0]}; {', '.join(line['steps'])}"
            )
    print(", ".join(f"{number} {status}" for status, number in statuses.items()))
    raise typer.Exit(bool(statuses["failed"] + statuses["crashed"]))


@app.command()
def mutants(
    count: Annotated[int, typer.Option(min=1, help="How many networks, by seed, from 0 on.")] = 600,
    processes: Processes = CORES,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Plant errors into random networks. Exits with 1 if the proof misses one."""
    if worker:
        errors = lambda seed: planted(Seeded(seed), _wanted(seed))  # noqa: E731
        return _work("mutants", worker, lambda seed: [dataclasses.asdict(found) for found in errors(seed)])
    found = _all("mutants", count, processes)
    kinds = {
        name: dict(collections.Counter(line["status"] for line in found if line["name"] == name))
        for name in mutations.NAMES
    }
    caught = [line for line in found if line["status"] == "caught"]
    named = sum(bool(line["named"]) for line in caught)
    _summary("mutants", {"kinds": kinds, "caught": len(caught), "named": named})
    for line in found:
        if line["status"] == "missed":
            print(f"seed {line['seed']}: {line['name']} was missed")
    missed = sum(line["status"] == "missed" for line in found)
    print(f"{len(caught)} caught, {named} of them with the module named; {missed} missed")
    raise typer.Exit(bool(missed))


@app.command()
def page() -> None:
    """Write the counts into docs/trust.md."""
    PAGE.write_text(with_counts(PAGE.read_text()))


def _wanted(seed: int) -> list[str]:
    """Returns a few kinds of error for a network, so that all kinds take turns."""
    names = mutations.NAMES
    return [names[(7 * seed + k) % len(names)] for k in range(7)]


def _work(kind: str, worker: str, prove: Callable[[int], list[dict[str, Any]]]) -> None:
    """Runs in a process of `_all`: appends a line to the file for each result, and one when a seed is done."""
    for seed in map(int, worker.split(",")):
        results = [{"seed": seed, **result} for result in prove(seed)]
        append_lines(_file(kind), [*results, {"seed": seed, "done": True}])


def _all(kind: str, count: int, processes: int) -> list[dict[str, Any]]:
    """Returns the results of all seeds. Seeds with results on file are not run again."""
    missing = _missing(kind, range(count))
    batches = [missing[k : k + AT_ONCE] for k in range(0, len(missing), AT_ONCE)]
    with Progress(disable=not sys.stderr.isatty()) as progress, ThreadPoolExecutor(processes) as threads:
        done = threads.map(lambda seeds: _in_processes(kind, seeds), batches)
        for _ in progress.track(done, total=len(batches), description=kind):
            pass
    return [line for line in read_lines(_file(kind)) if not line.get("done") and line["seed"] < count]


def _in_processes(kind: str, seeds: Sequence[int]) -> None:
    """Proves some networks in a process. If the process breaks off, another one proves the rest."""
    while missing := _missing(kind, seeds):
        command = [sys.executable, "-m", "benchmarks.trust", kind, "--worker", ",".join(map(str, missing))]
        status = subprocess.run(command, check=False).returncode
        if status and (missing := _missing(kind, seeds)):
            lost = {"seed": missing[0], "status": "crashed", "steps": [], "reason": f"exit status {status}", "name": ""}
            append_lines(_file(kind), [lost, {"seed": missing[0], "done": True}])


def _missing(kind: str, seeds: Iterable[int]) -> list[int]:
    done = {line["seed"] for line in read_lines(_file(kind)) if line.get("done")}
    return [seed for seed in seeds if seed not in done]


def _file(kind: str) -> Path:
    return LINES / f"{kind}.jsonl"


def _summary(kind: str, found: dict[str, Any]) -> None:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    save_json(RESULTS / f"{kind}.json", {"date": date, "versions": environment()["versions"], **found})
    page()


if __name__ == "__main__":
    app()
