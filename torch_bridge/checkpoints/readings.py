"""`Reading`: one way to read a set of weights, compared with the model."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_bridge.checkpoints.expected import Expected, Shape
from torch_bridge.checkpoints.sets import WeightSet, name_beginnings

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "ema_model.")
"""Prefixes that `DataParallel`, `AveragedModel`, `torch.compile`, Lightning modules and averages put before names."""

_WRAPPERS = (".module.", "._orig_mod.")
"""Parts of names within a model of which `DataParallel` or `torch.compile` wraps a part."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to read a set of weights: the prefix that is removed, and old names by new names."""

    weights: WeightSet
    prefix: str
    names: Mapping[str, str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {new: self.weights.tensors[old] for new, old in self.names.items()}

    @property
    def has_known_prefix(self) -> bool:
        """True if the prefix is made of `PREFIXES`, which need no argument.

        >>> [Reading(WeightSet((), {}, True), prefix, {}).has_known_prefix for prefix in ("", "model.module.", "my.")]
        [True, True, False]
        """
        rest = self.prefix
        while found := next((known for known in PREFIXES if rest.startswith(known)), None):
            rest = rest.removeprefix(found)
        return not rest

    def used_names(self, expected: Expected) -> dict[str, str]:
        """Returns the names that the model uses, old names by new names."""
        return {new: old for new, old in self.names.items() if new in expected.tensors}

    def count_matches(self, expected: Expected) -> int:
        """Returns the number of the model's names that are present."""
        return len(expected.tensors) - len(expected.missing_names(self.names))

    def fits(self, expected: Expected) -> bool:
        """Returns whether every name of the model, except counters, has a tensor of the right shape."""
        if len(self.names) < expected.distinct_count or not expected.suffices(self.names):
            return False
        used = self.used_names(expected)
        return all(tensor_shape(self.weights.tensors[old]) == expected.tensors[new][0] for new, old in used.items())


def distinct_readings(readings: Iterable[Reading], expected: Expected) -> list[Reading]:
    """Returns the readings that give the model different weights: a renaming may have the effect of a prefix."""
    found: dict[Any, Reading] = {}
    for reading in readings:
        found.setdefault((reading.weights.path, frozenset(reading.used_names(expected).items())), reading)
    return [*found.values()]


def possible_renamings(names: Iterable[str], expected: Expected) -> Iterator[dict[str, str]]:
    """Yields renamings that may give the model's names: without wrappers, or with a beginning of the model's names."""
    wrapped = [lead[:-1] for name in names for lead in name_beginnings(name) if lead.endswith(_WRAPPERS)]
    yield {lead: ".".join(part for part in lead.split(".") if f".{part}." not in _WRAPPERS) for lead in wrapped}
    for lead in dict.fromkeys(lead for name in expected.tensors for lead in name_beginnings(name)[1:]):
        yield {"": lead[:-1]}


def has_model_shapes(tensors: Iterable[Tensor], expected: Expected) -> bool:
    """Returns whether the tensors have all shapes of the model's parameters, under any names."""
    shapes = Counter(tensor_shape(tensor) for tensor in tensors if _has_fractions(tensor.dtype))
    return bool(expected.trained) and shapes >= expected.trained


def _has_fractions(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def tensor_shape(tensor: Tensor) -> Shape | None:
    """Returns the shape of a tensor; None for a nested tensor."""
    return None if tensor.is_nested else tuple(tensor.shape)
