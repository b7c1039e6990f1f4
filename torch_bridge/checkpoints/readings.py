"""`Reading`: one way to read a set of weights, and whether it gives the model's."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_bridge.checkpoints.expected import Expected, Shape
from torch_bridge.checkpoints.sets import WeightSet

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "ema_model.")
"""What `DataParallel` and `AveragedModel`, `torch.compile`, Lightning modules and averages put before every name."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to read a set of weights: what is removed from its names, and these by what they become."""

    weights: WeightSet
    prefix: str
    names: Mapping[str, str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {new: self.weights.tensors[old] for new, old in self.names.items()}

    @property
    def has_known_prefix(self) -> bool:
        """Whether the prefix is made of those that need no argument.

        >>> [Reading(WeightSet((), {}, True), prefix, {}).has_known_prefix for prefix in ("", "model.module.", "my.")]
        [True, True, False]
        """
        rest = self.prefix
        while found := next((known for known in PREFIXES if rest.startswith(known)), None):
            rest = rest.removeprefix(found)
        return not rest

    def used(self, expected: Expected) -> dict[str, str]:
        """The names that the model has a use for."""
        return {new: old for new, old in self.names.items() if new in expected.tensors}

    def matched(self, expected: Expected) -> int:
        """How many names of the model there are."""
        return len(expected.tensors) - len(expected.lacking(self.names))

    def fits(self, expected: Expected) -> bool:
        """Whether there is a tensor of the right shape for every name of the model, but for counters."""
        if len(self.names) < expected.distinct or not expected.suffices(self.names):
            return False
        used = self.used(expected)
        return all(shape_of(self.weights.tensors[old]) == expected.tensors[new][0] for new, old in used.items())


def distinct(readings: Iterable[Reading], expected: Expected) -> list[Reading]:
    """Those that give the model different weights: a renaming may do what a prefix does."""
    found: dict[Any, Reading] = {}
    for reading in readings:
        found.setdefault((reading.weights.path, frozenset(reading.used(expected).items())), reading)
    return [*found.values()]


def resemble(tensors: Iterable[Tensor], expected: Expected) -> bool:
    """Whether tensors could be the model's weights, whatever their names: all shapes of its parameters are there."""
    shapes = Counter(shape_of(tensor) for tensor in tensors if _has_fractions(tensor.dtype))
    return bool(expected.trained) and shapes >= expected.trained


def _has_fractions(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def shape_of(tensor: Tensor) -> Shape | None:
    """None for a nested tensor, which has none."""
    return None if tensor.is_nested else tuple(tensor.shape)
