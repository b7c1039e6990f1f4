"""Timing of several functions side by side, in one process."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

from torch_bridge.timing.statistics import middle_half


@dataclasses.dataclass(frozen=True)
class Timed:
    """Time of a call in milliseconds: the median of the samples, and the range of their middle half."""

    median: float
    quartiles: tuple[float, float]
    samples: int


def side_by_side(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 20, warm_ups: int = 3
) -> dict[str, Timed]:
    """Times calls in turn, a sample of each per round, so that a change of the machine's speed affects all alike.

    Every variant has to wait for its own result (`jax.block_until_ready`, `torch.cuda.synchronize`).

    >>> timed = side_by_side({"one": lambda: sum(range(100)), "two": lambda: sum(range(200))}, rounds=5)
    >>> list(timed)
    ['one', 'two']
    """
    for call in variants.values():
        for _ in range(warm_ups):
            call()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timed:
    return Timed(statistics.median(values), middle_half(values), len(values))
