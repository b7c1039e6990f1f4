"""Devices: their names and free memory."""

import math
import os
import platform
from pathlib import Path
from typing import Any

import jax

from jaxensemble.compat import Tracer


def device_of(tree: Any) -> Any:
    """The device of the arrays, or the default device while they are traced."""
    leaves = jax.tree.leaves(tree)
    known = bool(leaves) and isinstance(leaves[0], jax.Array) and not isinstance(leaves[0], Tracer)
    return next(iter(leaves[0].devices())) if known else jax.local_devices()[0]


def default_device() -> Any:
    """The device of arrays that are put nowhere else: `jax_default_device`, or JAX's first one."""
    config: Any = jax.config
    chosen = config.jax_default_device
    return jax.local_devices(backend=chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def device_name(device: Any) -> str:
    """The name of a device: its kind, and for CPUs the model and the cores that this process may use.

    >>> import jax
    >>> device_name(jax.devices("cpu")[0]).startswith("cpu, ")
    True
    """
    if device.platform != "cpu":
        return f"{device.platform}, {device.device_kind}"
    return f"cpu, {processor()}, {cores()} cores"


def processor() -> str:
    """The model of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: Any) -> float:
    """The bytes that a device has left for arrays; infinity where nothing says so."""
    if device.platform == "cpu":
        return min(_left_on_host(), _left_in_container())
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return math.inf
    return float(stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def _left_on_host() -> float:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def _left_in_container() -> float:
    """The bytes that the control group of this process may still take (cgroup v2)."""
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return math.inf
    return float(limit.read_text()) - float(used.read_text())


def human_bytes(size: float) -> str:
    """A size in bytes, as people write it.

    >>> human_bytes(4_680_000_000), human_bytes(12)
    ('4.68 GB', '12 bytes')
    """
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"
