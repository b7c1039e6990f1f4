"""Explanations of prepared programs: instructions, work, and how far the time is above the least possible."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxensemble.programs.compiled import read_instructions
from jaxensemble.running.compiled import MembersProgram
from jaxensemble.running.device import device_name, human_bytes
from jaxensemble.running.tuning import SECONDS, format_seconds


def explain_program(program: MembersProgram, run: Callable[[], Any], input_bytes: int) -> str:
    """Explains a compiled program; `run` calls it, and is timed.

    The floor is the larger of two times: that of its products and convolutions at the speed of one large product, and
    that of reading weights and inputs and writing outputs, once each, at the speed of one large copy. Both speeds are
    measured on the device, once in a process.
    """
    device = program.device
    read = sum(map(_array_bytes, program.division.shapes)) + input_bytes
    moved = read + sum(map(_array_bytes, jax.tree.leaves(run())))
    flops, made = program.flops, read_instructions(program.run.as_text() or "")
    peak, bandwidth = _peaks(device)
    floor, taken = max(flops / peak, moved / bandwidth), _time(run)
    memory: Any = program.run.memory_analysis()
    beside = sum(program.sizes)
    kinds = ", ".join(f"{count} {kind}" for kind, count in made.counts.most_common(5))
    lines = [
        f"{program.call.plan!r} on {device_name(device)}",
        f"weights: {human_bytes(sum(map(_array_bytes, program.division.shapes)))} as the program reads them, "
        f"{human_bytes(beside)} of these beside the ensemble's own",
        f"instructions: {made.total} ({kinds}), {made.moves} of which only move {human_bytes(made.moved_bytes)}",
        f"work: {flops / 1e9:.3g} GFLOP, {human_bytes(moved)} read and written; "
        f"{human_bytes(memory.temp_size_in_bytes)} of intermediate arrays",
        f"floor: {format_seconds(floor)}, by {'arithmetic' if flops / peak > moved / bandwidth else 'memory'} at "
        f"{peak / 1e9:,.0f} GFLOP/s and {bandwidth / 1e9:,.0f} GB/s, which one large product and one copy reach here",
        f"measured: {format_seconds(taken)}, {taken / floor:.3g} times the floor",
    ]
    return "\n".join(lines)


@functools.cache
def _peaks(device: Any) -> tuple[float, float]:
    """The operations a second of a large product, and the bytes a second of a large copy."""
    size = 1024 if device.platform == "cpu" else 8192
    with jax.default_device(device):
        square, long = jnp.ones((size, size)), jnp.ones(1 << 24)
        product, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
        return 2 * size**3 / _time(lambda: product(square, square)), 2 * long.nbytes / _time(lambda: copy(long))


def _time(run: Callable[[], Any]) -> float:
    """The median time of a call, in seconds."""
    jax.block_until_ready(run())
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _array_bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
