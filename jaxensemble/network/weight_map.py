"""The origin of a ported ensemble: key and layout in PyTorch, path and layout in Flax of every tensor.

This is plain data and needs no PyTorch. An ensemble that is loaded where PyTorch is not installed still knows how its
weights go back to PyTorch.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from jaxensemble.dtypes import PORTED
from jaxensemble.errors import InputError

INPUT_LAYOUTS = ("torch", "NHWC")


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """Steps from PyTorch's array to the stored one: reshape to `split`, flip, transpose by `order`, reshape to `shape`.

    They move elements and change none, so that `invert` returns the same bits.

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
    """One tensor: all its names in PyTorch (several if it is tied), and its path in the Flax network.

    `shape` and `dtype` are PyTorch's. `persistent` is false for a buffer that PyTorch's state dict leaves out. `frozen`
    is true for a parameter that PyTorch does not train (`requires_grad=False`).
    """

    keys: tuple[str, ...]
    path: str
    shape: tuple[int, ...]
    dtype: str
    rearrangement: Rearrangement
    persistent: bool = True
    frozen: bool = False

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


@dataclasses.dataclass(frozen=True)
class Origin:
    """Origin of a ported ensemble: its PyTorch class, the map of its weights, and the layout of its inputs."""

    name: str
    weights: WeightMap
    batch_axis: int | tuple[int | None, ...] | None = 0
    input_layout: str = "torch"


def check_origin(origin: Origin, where: str = "origin") -> None:
    """Checks that an origin, which may come from a file, is consistent.

    **Raises:** `InputError` listing all problems: unknown dtypes, names given twice, and rearrangements that are no
    permutation of their tensor's elements.

    >>> kernel = Entry(("fc.weight",), "fc.kernel", (2, 3), "float32", Rearrangement((2, 3), (1, 1), (3, 2)))
    >>> check_origin(Origin("Net", WeightMap((kernel,))))
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: the map of PyTorch's keys does not hold together:
      origin: 'fc.kernel': order [1, 1] is no permutation of 2 axes
    """
    problems = list(_problems(origin, where))
    if problems:
        raise InputError("the map of PyTorch's keys does not hold together:\n  " + "\n  ".join(problems))


def _problems(origin: Origin, where: str) -> Iterator[str]:
    if origin.input_layout not in INPUT_LAYOUTS:
        yield f"{where}.input_layout: expected one of {', '.join(INPUT_LAYOUTS)}, got {origin.input_layout!r}"
    entries = origin.weights.entries
    for name, count in Counter(key for entry in entries for key in entry.keys).items():
        if count > 1:
            yield f"{where}: the key {name!r} is given {count} times"
    for name, count in Counter(entry.path for entry in entries).items():
        if count > 1:
            yield f"{where}: the path {name!r} is given {count} times"
    for entry in entries:
        yield from (f"{where}: {entry.path!r}: {problem}" for problem in _entry_problems(entry))


def _entry_problems(entry: Entry) -> Iterator[str]:
    rearrangement = entry.rearrangement
    if not entry.keys:
        yield "a tensor needs a key"
    if entry.dtype not in PORTED.values():
        yield f"{entry.dtype!r} is no dtype of a tensor that can be ported"
    shapes = {"shape": entry.shape, "split": rearrangement.split, "stored shape": rearrangement.shape}
    for what, shape in shapes.items():
        if min(shape, default=0) < 0:
            yield f"{what} {list(shape)} has a negative size"
        elif math.prod(shape) != entry.size:
            yield f"{what} {list(shape)} does not have the {entry.size} elements of shape {list(entry.shape)}"
    axes = range(len(rearrangement.split))
    if sorted(rearrangement.order) != list(axes):
        yield f"order {list(rearrangement.order)} is no permutation of {len(axes)} axes"
    if len(set(rearrangement.flipped)) < len(rearrangement.flipped) or not set(rearrangement.flipped) <= set(axes):
        yield f"flipped {list(rearrangement.flipped)} must be some of {len(axes)} axes, each once"
