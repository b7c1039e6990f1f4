"""Files as faults leave them: cut short, or with some bytes changed."""

from collections.abc import Iterator

import numpy as np


def cut(content: bytes, every: int) -> Iterator[bytes]:
    """Yields the file cut short, after each multiple of `every` bytes."""
    return (content[:size] for size in range(0, len(content), every))


def changed(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yields the file with one to eight of its bytes changed, many times; half of the changes are near either end.

    The ends of files say how to read the rest.
    """
    generator = np.random.default_rng(seed)
    for k in range(count):
        other = bytearray(content)
        near = min(len(content), 512) if k % 2 else len(content)
        for position in generator.integers(0, near, generator.integers(1, 9)):
            other[position if generator.integers(2) else -1 - position] = generator.integers(256)
        yield bytes(other)
