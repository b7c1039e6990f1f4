"""`python -m benchmarks tutorial zoo`: times suites, and writes what was found to `benchmarks/results/`."""

import json
from pathlib import Path
from typing import Annotated

import jax
import torch
import typer
from rich.console import Console

import torch_bridge
from benchmarks import networks
from benchmarks.suites import SUITES, Case
from torch_bridge.report import save_json
from torch_bridge.timing import TimingReport
from zoo.networks import importable
from zoo.results import RESULTS

console = Console(stderr=True)


def run(
    suites: Annotated[list[str], typer.Argument(help=f"Some of {', '.join(SUITES)}.")],
    only: Annotated[list[str] | None, typer.Option(help="Networks; all of a suite's without.")] = None,
    dtype: Annotated[str, typer.Option(help="What both compute in.")] = "float32",
    tf32: Annotated[bool, typer.Option("--tf32", help="Let both round float32 products to TF32.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    """Times every case of the suites. What is there of a suite is replaced case by case."""
    device = jax.devices()[0].platform
    kind = "-".join([device, *([dtype] if dtype != "float32" else []), *(["tf32"] if tf32 else [])])
    for suite in suites:
        path = RESULTS / f"{suite}-{kind}.json"
        for case in SUITES[suite]:
            if only and case.network not in only:
                continue
            report = timed(case, dtype, tf32=tf32, rounds=rounds)
            print(f"{case.name}, {kind}\n{report}\n")
            _add(path, case, report)


def timed(case: Case, dtype: str, *, tf32: bool, rounds: int) -> TimingReport:
    """One case; its ensemble is proved before anything is timed."""
    models, inputs = networks.make(case.network, case.members, case.batch)
    torch_bridge.to_ensemble(models[:2], tuple(x[:2] for x in inputs))  # raises unless the network is proved
    ensemble = torch_bridge.to_ensemble(models, inputs, check=False)
    if dtype != "float32":
        kind = getattr(torch, dtype)
        models, inputs = [model.to(kind) for model in models], tuple(x.to(kind) for x in inputs)
        ensemble = ensemble.astype(dtype)
    with console.status(case.name) as status:
        return torch_bridge.time(
            models,
            ensemble,
            inputs,
            variants=case.variants,
            rounds=rounds,
            tf32=tf32,
            train=case.train,
            setup=None if case.network in networks.TUTORIAL else importable,
            progress=lambda text: status.update(f"{case.name}: {text}"),
        )


def _add(path: Path, case: Case, report: TimingReport) -> None:
    """Writes after every case: what was measured stays, whatever happens to the next."""
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases[case.name] = report.to_json()
    save_json(path, {"cases": cases})


if __name__ == "__main__":
    typer.run(run)
