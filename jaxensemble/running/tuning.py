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
from jaxensemble.running.case import Case, adapted, planned
from jaxensemble.running.device import device_name, free_memory, human_bytes
from jaxensemble.running.members import Call
from jaxensemble.running.plan import Plan, candidates
from jaxensemble.version import VERSION

SECONDS = 0.2
"""How long a plan is run to be measured, once it is compiled; at least three times."""

_HOPELESS = 3  # a first run that takes this many times the best is not repeated
_NEAR = 1.3  # up to this many times the best, a plan is measured once more
_ALIKE = 1.05  # and up to this many times, the more promising plan is taken


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The plan of a case, and the seconds of one call under each plan that was measured: none is faster by 5 %."""

    plan: Plan
    seconds: Mapping[Plan, float]

    def __str__(self) -> str:
        chosen = self.seconds[self.plan]
        count = len(self.seconds)
        kind = "the fastest" if chosen <= min(self.seconds.values()) else "as fast as any, to measurement,"
        others = sorted((taken, repr(plan)) for plan, taken in self.seconds.items() if plan != self.plan)
        lines = [f"  {plan}: {_milliseconds(taken)}, {taken / chosen:.3g} times" for taken, plan in others]
        return "\n".join([f"{self.plan!r}: {_milliseconds(chosen)}, {kind} of {count} plans measured", *lines])


def tuned(case: Case, run: Callable[[Call], Any]) -> Tuned:
    """The fastest plan of a case: remembered, or measured now by running `run` under every candidate."""
    name = _name(case)
    found = _MEMORY.get(name) or _read(name)
    if found is None:
        found = _measured(case, run)
        _remember(name, found)
    _MEMORY[name] = found
    return found


def known(case: Case) -> Tuned | None:
    """What was measured before, without measuring."""
    name = _name(case)
    return _MEMORY.get(name) or _read(name)


def choose_call(
    case: Case, plan: Plan | Literal["auto"] | None, own: Plan | None, measure: Callable[[Call], Any] | None
) -> Call:
    """Returns the call of a case under the specified plan, or, for None, under the ensemble's own.

    For `"auto"` the plan is the fastest one. Without `measure`, which runs a call, only earlier measurements count.
    """
    if isinstance(plan, Plan):
        return planned(case, plan)
    if plan is None:
        return adapted(case, own)
    found = known(case) if measure is None else tuned(case, measure)
    return adapted(case, found.plan if found else None)


def explained(case: Case, plan: Plan | None) -> str:
    """Which plan a case gets if `plan` is the ensemble's own, and why."""
    found = known(case)
    if plan is not None:
        text = f"{adapted(case, plan).plan!r}, the ensemble's own plan"
    else:
        load = case.load
        text = (
            f"{adapted(case, None).plan!r}, by estimate: {load.members} members with {human_bytes(load.peak)} of "
            f"intermediate arrays each, {human_bytes(load.step)} in the largest step, "
            f"{'with' if load.convolutions else 'no'} convolutions, on {device_name(case.device)}"
        )
    return f"{text}\nmeasured: {found}" if found else f"{text}\nnot measured: see Ensemble.tune"


_MEMORY: dict[str, Tuned] = {}


def _measured(case: Case, run: Callable[[Call], Any]) -> Tuned:
    """Every candidate for a moment, and those that are near the fastest once more, in turn.

    The most promising one is kept unless another is faster by more than measurements differ.
    """
    load, free = case.load, free_memory(case.device)
    calls: dict[Plan, Call] = {}
    for plan in candidates(load, free):
        with contextlib.suppress(MixedRows):
            call = case.with_plan(plan)
            calls.setdefault(call.plan, call)
    seconds: dict[Plan, float] = {}
    for plan, call in calls.items():
        try:
            seconds[plan] = _seconds(call, run, min(seconds.values(), default=math.inf))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    if not seconds:  # no candidate fits, or all had rows that cannot be taken apart
        call = adapted(case, None)
        seconds[call.plan] = _seconds(call, run, math.inf)
    best, near = min(seconds.values()), list[Plan]()
    while len(found := [plan for plan in seconds if plan in near or seconds[plan] <= _NEAR * best]) > max(1, len(near)):
        near = found
        seconds |= _in_turn({plan: calls[plan] for plan in near}, run)
        best = min(seconds.values())
    return Tuned(next(plan for plan in found if seconds[plan] <= _ALIKE * best), seconds)


def _seconds(call: Call, run: Callable[[Call], Any], best: float) -> float:
    """The median of several calls, the first of which compiles."""
    jax.block_until_ready(run(call))
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < SECONDS:
        taken.append(_timed(call, run))
        if taken[0] > _HOPELESS * best:
            break
    return statistics.median(taken)


def _in_turn(calls: Mapping[Plan, Call], run: Callable[[Call], Any]) -> dict[Plan, float]:
    """The median of several calls each: whatever else the machine does, it does to all."""
    taken: dict[Plan, list[float]] = {plan: [] for plan in calls}
    while any(len(times) < 3 or sum(times) < SECONDS for times in taken.values()):
        for plan, call in calls.items():
            taken[plan].append(_timed(call, run))
    return {plan: statistics.median(times) for plan, times in taken.items()}


def _timed(call: Call, run: Callable[[Call], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(call))
    return time.perf_counter() - start


def _name(case: Case) -> str:
    """The same for the same work on the same device with the same versions, in whatever process."""
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")}
    versions["jaxensemble"] = VERSION
    call = (case.call.each, case.call.different, case.call.update, case.members)
    program = re.sub(r"0x[0-9a-f]+", "", str(case.program))  # addresses
    parts = (program, call, case.rows_in, device_name(case.device), sorted(versions.items()), _precision())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _precision() -> Any:
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _file(name: str) -> Path:
    return cache_directory() / "plans" / f"{name}.json"


def _read(name: str) -> Tuned | None:
    """What the case's file holds; None where there is none, and for one that is damaged, or is not ours."""
    try:
        content = json.loads(_file(name).read_text())
        plan, seconds = Plan(**content["plan"]), {Plan(**plan): float(taken) for plan, taken in content["seconds"]}
    except (OSError, RuntimeError, ValueError, RecursionError, TypeError, KeyError, OverflowError):
        return None  # RuntimeError: there is no home directory
    sound = plan in seconds and all(math.isfinite(taken) and taken > 0 for taken in seconds.values())
    return Tuned(plan, seconds) if sound else None


def _remember(name: str, found: Tuned) -> None:
    """Writes a measurement; where the disk does not let it, memory is enough."""
    content = {
        "plan": dataclasses.asdict(found.plan),
        "seconds": [[dataclasses.asdict(plan), taken] for plan, taken in found.seconds.items()],
    }
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(name)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(file, json.dumps(content).encode())


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
