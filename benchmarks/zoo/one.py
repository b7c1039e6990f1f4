"""One network, ported as an ensemble of two and proved against PyTorch. The result is a line of JSON."""

import dataclasses
import gc
from collections.abc import Callable

import torch

import torch_bridge
from benchmarks.zoo import networks
from jaxensemble import UnsupportedError
from jaxensemble.arrays import as_arrays
from jaxensemble.network.arguments import bind_arguments
from jaxensemble.programs.rewrite import primitives
from torch_bridge.parity import ParityReport

MEMBERS = 2
LARGE = 150e6
"""From this many parameters on, members are proved one at a time: all float64 copies at once would fill the memory."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one network.

    - `status`: `passed`, `failed` (a wrong number), `refused` (`UnsupportedError`) or `crashed`.
    - `float64`: the largest float64 error, relative to the largest output.
    - `float32`: our error over PyTorch's own, both against float64.
    - `transposes`: of activations, in the program of one member's call.
    """

    name: str
    status: str
    parameters: int = 0
    input: tuple[int, ...] = ()
    float64: float | None = None
    float32: float | None = None
    transposes: int | None = None
    source_lines: int | None = None
    reason: str = ""


def prove(library: str, name: str) -> Result:
    """Ports the network and compares weights, float64 outputs, and float32 error with PyTorch's own."""
    models, inputs = networks.make(library, name, MEMBERS)
    known = Result(name, "", sum(p.numel() for p in models[0].parameters()), tuple(inputs.entries[0].shape[1:]))
    try:
        ensemble = torch_bridge.to_ensemble(models, *inputs, check=False)
    except UnsupportedError as error:
        return dataclasses.replace(known, status="refused", reason=str(error))
    known = dataclasses.replace(
        known,
        transposes=primitives(ensemble[0], *as_arrays(bind_arguments(ensemble.network, *inputs), "inputs"))[
            "transpose"
        ],
        source_lines=len(ensemble.source().splitlines()),
    )
    if known.parameters < LARGE:
        return _judged(known, [torch_bridge.check(models, ensemble, *inputs, thorough=False)])
    del models, ensemble
    return _judged(known, [_report_of_one(library, name, member) for member in range(MEMBERS)])


def _report_of_one(library: str, name: str, member: int) -> ParityReport:
    """Proves one member of the ensemble, and keeps only this member."""
    models, inputs = networks.make(library, name, MEMBERS)
    ensemble = torch_bridge.to_ensemble(models, *inputs, check=False)[member : member + 1]
    del models[member + 1 :], models[:member]
    gc.collect()
    return torch_bridge.check(models, ensemble, *inputs, thorough=False)


def _judged(known: Result, reports: list[ParityReport]) -> Result:
    rows = [row for report in reports for row in report.rows]
    double = [row for row in rows if row.stage.startswith("float64,")]
    single = [row for row in rows if row.stage.startswith("float32,")]
    wrong = [f"{row.stage} against {row.case}: {row.error:.2e} > {row.limit:.2e}" for row in rows if not row.passed]
    vacuous = [note for report in reports for note in report.notes if "proves little" in note]
    diverged = [f"first difference: {report.diverged}" for report in reports if report.diverged]
    return dataclasses.replace(
        known,
        status="failed" if wrong or vacuous or not double or not single else "passed",
        float64=max((row.error for row in double), default=None),
        float32=max((2 * row.error / row.limit for row in single), default=None),
        reason="; ".join([*wrong, *vacuous, *diverged]),
    )


def guarded(name: str, threads: int, prove: Callable[[str], Result]) -> Result:
    """Runs a proof, and returns any error as a crash."""
    torch.set_num_threads(threads)
    try:
        return prove(name)
    except Exception as error:  # the zoo goes on with the next network
        return Result(name, "crashed", reason=f"{type(error).__name__}: {error}"[:2000])
