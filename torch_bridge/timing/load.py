"""Load of other processes on the cores that a measurement runs on."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path

BUSY = 0.1
"""Share of the cores that other processes may take before a machine is called busy."""


@dataclasses.dataclass(frozen=True)
class LoadReading:
    """Counters at one moment, in seconds: the clock, all work of our cores, and the work of our own processes."""

    clock: float
    work: float
    own: dict[int, float]

    @classmethod
    def now(cls, pids: Iterable[int]) -> "LoadReading | None":
        """Reads `/proc`; None on a system without it."""
        allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
        try:
            lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        ours = [fields for fields in lines if fields[0] in allowed]
        if not ours:
            return None
        idle = (4, 5)  # idle, and waiting for disks; work of guests (9, 10) is already counted as a user's
        work = sum(int(value) for fields in ours for k, value in enumerate(fields[:9]) if k and k not in idle)
        return cls(time.monotonic(), work / tick, {pid: _seconds_of(pid, tick) for pid in pids})


def _seconds_of(pid: int, tick: int) -> float:
    """Returns the seconds that a process has worked; zero for a process that is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / tick
    return 0.0


def other_load(spans: Iterable[tuple[LoadReading | None, LoadReading | None]]) -> float | None:
    """Returns the number of cores that other processes used over several spans of time; None if it is not known.

    >>> other_load([(LoadReading(0.0, 5.0, {7: 1.0}), LoadReading(2.0, 8.0, {7: 2.0}))])
    1.0
    """
    seconds = foreign = 0.0
    for before, after in spans:
        if before is None or after is None:
            return None
        own = sum(max(0.0, spent - before.own.get(pid, spent)) for pid, spent in after.own.items())
        seconds += after.clock - before.clock
        foreign += after.work - before.work - own
    return max(0.0, foreign / seconds) if seconds else None


def describe_load(before: float | None, during: float | None, cores: int) -> str:
    """Returns a text about the load of other processes.

    >>> describe_load(0.0, 1.5, 2)
    'BUSY: other processes kept 1.5 of 2 cores at work during the measurement, 0.0 before it'
    """
    if before is None or during is None:
        return "this system does not say what other processes do"
    busy = "BUSY: " if is_busy(before, during, cores) else ""
    text = f"{during:.1f} of {cores} cores at work during the measurement, {before:.1f} before it"
    return f"{busy}other processes kept {text}"


def is_busy(before: float | None, during: float | None, cores: int) -> bool:
    """Returns whether other processes took so much that figures cannot be trusted."""
    return max(before or 0.0, during or 0.0) > BUSY * cores
