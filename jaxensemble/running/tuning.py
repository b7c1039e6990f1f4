"""Plans measured on the device, and remembered: in memory, and in a file each in the user's cache directory."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from jaxensemble.files.caches import cache_directory
from jaxensemble.files.durable import write_file
from jaxensemble.programs.rows import MixedRows
from jaxensemble.running.device import device_name, human_bytes
from jaxensemble.running.members import EnsembleCall
from jaxensemble.running.plan import Plan, candidate_plans
from jaxensemble.running.workload import Workload, adapt_plan, apply_plan
from jaxensemble.version import VERSION

SECONDS = 0.2
"""The time for which a compiled plan runs to be measured; at least three times."""

_HOPELESS = 3  # a first run that takes this many times the best is not repeated
_NEAR = 1.3  # up to this many times the best, a plan is measured once more
_ALIKE = 1.05  # and up to this many times, the more promising plan is taken


@dataclasses.dataclass(frozen=True)
class MeasuredPlan:
    """The plan of a workload, and the seconds of one call under each plan that was measured: none is faster by 5 %."""

    plan: Plan
    seconds: Mapping[Plan, float]

    def __str__(self) -> str:
        chosen = self.seconds[self.plan]
        count = len(self.seconds)
        kind = "the fastest" if chosen <= min(self.seconds.values()) else "as fast as any, to measurement,"
        others = sorted((taken, repr(plan)) for plan, taken in self.seconds.items() if plan != self.plan)
        lines = [f"  {plan}: {format_seconds(taken)}, {taken / chosen:.3g} times" for taken, plan in others]
        return "\n".join([f"{self.plan!r}: {format_seconds(chosen)}, {kind} of {count} plans measured", *lines])


def tune_plan(workload: Workload, run: Callable[[EnsembleCall], Any]) -> MeasuredPlan:
    """Returns the fastest plan of a workload: remembered, or measured now by calling `run` under every candidate."""
    name = _workload_name(workload)
    found = _MEMORY.get(name) or _read_file(name)
    if found is None:
        found = _measure_plans(workload, run)
        _remember(name, found)
    _MEMORY[name] = found
    return found


def find_measured(workload: Workload) -> MeasuredPlan | None:
    """Returns an earlier measurement, if there is one."""
    name = _workload_name(workload)
    return _MEMORY.get(name) or _read_file(name)


def choose_call(
    workload: Workload,
    plan: Plan | Literal["auto"] | None,
    own: Plan | None,
    measure: Callable[[EnsembleCall], Any] | None,
) -> EnsembleCall:
    """Returns the call of a workload under the specified plan, or, for None, under the ensemble's own.

    For `"auto"` the plan is the fastest one. Without `measure`, which runs a call, only earlier measurements count.
    """
    if isinstance(plan, Plan):
        return apply_plan(workload, plan)
    if plan is None:
        return adapt_plan(workload, own)
    found = find_measured(workload) if measure is None else tune_plan(workload, measure)
    return adapt_plan(workload, found.plan if found else None)


def explain_plan(workload: Workload, plan: Plan | None) -> str:
    """Explains the plan of a workload; `plan` is the ensemble's own."""
    found = find_measured(workload)
    if plan is not None:
        text = f"{adapt_plan(workload, plan).plan!r}, the ensemble's own plan"
    else:
        demand = workload.demand
        text = (
            f"{adapt_plan(workload, None).plan!r}, by estimate: {demand.members} members with "
            f"{human_bytes(demand.peak)} of intermediate arrays each, {human_bytes(demand.step)} in the largest step, "
            f"{'with' if demand.convolutions else 'no'} convolutions, on {device_name(workload.device)}"
        )
    return f"{text}\nmeasured: {found}" if found else f"{text}\nnot measured: see Ensemble.tune"


_MEMORY: dict[str, MeasuredPlan] = {}


def _measure_plans(workload: Workload, run: Callable[[EnsembleCall], Any]) -> MeasuredPlan:
    """Measures every candidate, and those near the fastest once more, in turn.

    The most promising candidate is kept unless another is faster by more than measurements vary.
    """
    demand, free = workload.demand, workload.free_memory
    calls: dict[Plan, EnsembleCall] = {}
    for plan in candidate_plans(demand, free):
        with contextlib.suppress(MixedRows):
            call = workload.with_plan(plan)
            calls.setdefault(call.plan, call)
    seconds: dict[Plan, float] = {}
    for plan, call in calls.items():
        try:
            seconds[plan] = _measure_call(call, run, min(seconds.values(), default=math.inf))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    if not seconds:  # no candidate fits, or the rows of all cannot be split
        call = adapt_plan(workload, None)
        seconds[call.plan] = _measure_call(call, run, math.inf)
    best, near = min(seconds.values()), list[Plan]()
    while len(found := [plan for plan in seconds if plan in near or seconds[plan] <= _NEAR * best]) > max(1, len(near)):
        near = found
        seconds |= _measure_in_turn({plan: calls[plan] for plan in near}, run)
        best = min(seconds.values())
    return MeasuredPlan(next(plan for plan in found if seconds[plan] <= _ALIKE * best), seconds)


def _measure_call(call: EnsembleCall, run: Callable[[EnsembleCall], Any], best: float) -> float:
    """Measures the median of several calls, after one that compiles."""
    jax.block_until_ready(run(call))
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < SECONDS:
        taken.append(_time_call(call, run))
        if taken[0] > _HOPELESS * best:
            break
    return statistics.median(taken)


def _measure_in_turn(calls: Mapping[Plan, EnsembleCall], run: Callable[[EnsembleCall], Any]) -> dict[Plan, float]:
    """Measures the median of several calls of each plan, in turn: other load on the machine slows all alike."""
    taken: dict[Plan, list[float]] = {plan: [] for plan in calls}
    while any(len(times) < 3 or sum(times) < SECONDS for times in taken.values()):
        for plan, call in calls.items():
            taken[plan].append(_time_call(call, run))
    return {plan: statistics.median(times) for plan, times in taken.items()}


def _time_call(call: EnsembleCall, run: Callable[[EnsembleCall], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(call))
    return time.perf_counter() - start


def _workload_name(workload: Workload) -> str:
    """A name for the same work on the same device with the same versions, in any process."""
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")}
    versions["jaxensemble"] = VERSION
    call = (workload.call.each, workload.call.different, workload.call.update, workload.members)
    program = re.sub(r"0x[0-9a-f]+", "", str(workload.program))  # addresses
    parts = (program, call, workload.rows_in, device_name(workload.device), sorted(versions.items()), _precision())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _precision() -> Any:
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _plan_file(name: str) -> Path:
    return cache_directory() / "plans" / f"{name}.json"


def _read_file(name: str) -> MeasuredPlan | None:
    """Reads the file of a workload; None if there is none, or it is damaged or not ours."""
    try:
        content = json.loads(_plan_file(name).read_text())
        plan, seconds = Plan(**content["plan"]), {Plan(**plan): float(taken) for plan, taken in content["seconds"]}
    except (OSError, RuntimeError, ValueError, RecursionError, TypeError, KeyError, OverflowError):
        return None  # RuntimeError: there is no home directory
    sound = plan in seconds and all(math.isfinite(taken) and taken > 0 for taken in seconds.values())
    return MeasuredPlan(plan, seconds) if sound else None


def _remember(name: str, found: MeasuredPlan) -> None:
    """Writes a measurement; if the disk refuses, memory is enough."""
    content = {
        "plan": dataclasses.asdict(found.plan),
        "seconds": [[dataclasses.asdict(plan), taken] for plan, taken in found.seconds.items()],
    }
    with contextlib.suppress(OSError, RuntimeError):
        file = _plan_file(name)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(file, json.dumps(content).encode())


def format_seconds(seconds: float) -> str:
    """A time, as reports write it.

    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    return f"{1000 * seconds:.3g} ms"
