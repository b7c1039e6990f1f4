"""`python -m benchmarks.speed tutorial zoo` times suites, and writes the times to `benchmarks/results/`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import torch
import typer
from rich.console import Console

import torch_bridge
from benchmarks.results import RESULTS
from benchmarks.speed import networks
from benchmarks.speed.suites import SUITES, Case
from torch_bridge.report import save_json
from torch_bridge.timing import TimingReport
from torch_bridge.timing.variants import torch_variants

console = Console(stderr=True)


def run(
    suites: Annotated[list[str], typer.Argument(help=f"Some of {', '.join(SUITES)}.")],
    only: Annotated[list[str] | None, typer.Option(help="Networks; all of a suite's without.")] = None,
    dtype: Annotated[str, typer.Option(help="What both compute in.")] = "float32",
    tf32: Annotated[bool, typer.Option("--tf32", help="Let both round float32 products to TF32.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    members: Annotated[int | None, typer.Option(min=2, help="In place of the suites' own.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="In place of the suites' own.")] = None,
    check: Annotated[bool, typer.Option(help="Prove an ensemble first; outputs are compared in any case.")] = True,
    together: Annotated[bool, typer.Option("--together", help="Prepare PyTorch's ways at the same time.")] = False,
    patience: Annotated[float, typer.Option(help="Seconds that preparing a way may take.")] = 1800,
    eager: Annotated[bool, typer.Option("--eager", help="Leave out what PyTorch compiles.")] = False,
    out: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
) -> None:
    """Times every case of the suites. Earlier results of a suite are replaced case by case."""
    device = jax.devices()[0].platform
    kind = "-".join([device, *([dtype] if dtype != "float32" else []), *(["tf32"] if tf32 else [])])
    for suite in suites:
        for case in SUITES[suite]:
            if only and case.network not in only:
                continue
            case = dataclasses.replace(case, members=members or case.members, batch=rows or case.batch)
            options = {"tf32": tf32, "rounds": rounds, "together": together, "patience": patience}
            report = timed(case, dtype, check=check, eager=eager, **options)
            print(f"{case.name}, {kind}\n{report}\n", flush=True)
            _add(out / f"{suite}-{kind}.json", case, report)


def timed(case: Case, dtype: str, *, check: bool, eager: bool, **options: Any) -> TimingReport:
    """Times one case, after proving its ensemble. Options are those of `torch_bridge.time`."""
    models, inputs = networks.make(case.network, case.members, case.batch)
    if check:
        torch_bridge.to_ensemble(models[:2], tuple(x[:2] for x in inputs))  # raises unless the network is proved
    ensemble = torch_bridge.to_ensemble(models, inputs, check=False)
    if dtype != "float32":
        kind = getattr(torch, dtype)
        models, inputs = [model.to(kind) for model in models], tuple(x.to(kind) for x in inputs)
        ensemble = ensemble.astype(dtype)
    known = torch_variants("cuda" if jax.default_backend() == "gpu" else "cpu", images=True)
    known = [name for name in known if not (eager and "compile(" in name)]
    with console.status(case.name) as status:
        return torch_bridge.time(
            models,
            ensemble,
            inputs,
            variants=[name for name in case.variants or known if name in known],
            train=case.train,
            setup=networks.setup(case.network),
            progress=lambda text: status.update(f"{case.name}: {text}"),
            **options,
        )


def _add(path: Path, case: Case, report: TimingReport) -> None:
    """Writes after every case, so that results stay if a later case fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases[case.name] = report.to_json()
    save_json(path, {"cases": cases})


if __name__ == "__main__":
    typer.run(run)
