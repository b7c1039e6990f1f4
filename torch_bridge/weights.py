"""`WeightMap`: PyTorch's key and layout of every tensor beside its path and layout in the Flax network, both ways."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """How PyTorch's array becomes the stored one: reshape to `split`, flip, transpose by `order`, reshape to `shape`.

    It moves elements and changes none, so that `invert` gives back the same bits.

    >>> r = Rearrangement(split=(2, 3), order=(1, 0), shape=(3, 2))
    >>> r.apply(np.arange(6).reshape(2, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    >>> r.invert(r.apply(np.arange(6).reshape(2, 3)), (2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    flipped: tuple[int, ...] = ()

    def apply(self, array: np.ndarray) -> np.ndarray:
        return np.flip(array.reshape(self.split), self.flipped).transpose(self.order).reshape(self.shape)

    def invert(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        moved = array.reshape([self.split[k] for k in self.order]).transpose(np.argsort(self.order, kind="stable"))
        return np.flip(moved, self.flipped).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: all its names in PyTorch (tied ones share it), and its path in the Flax network.

    `persistent` is false for a buffer that PyTorch's state dict leaves out.
    """

    keys: tuple[str, ...]
    path: str
    shape: tuple[int, ...]
    dtype: str
    rearrangement: Rearrangement
    persistent: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Every tensor of a module's state, in the order of PyTorch's state dict."""

    entries: tuple[Entry, ...]

    @property
    def by_key(self) -> Mapping[str, Entry]:
        return {key: entry for entry in self.entries for key in entry.keys}
