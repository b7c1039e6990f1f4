"""Sets of weights in a checkpoint file: dicts of tensors at any depth."""

import dataclasses
import glob
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from jaxensemble.errors import InputError

_DEPTH = 8
"""Most dicts around a set of weights: a set in the state of a callback is three dicts deep."""

_LEADS = 12
"""Most dots of a name that are read: a name in a file may consist of dots only."""


@dataclasses.dataclass(frozen=True)
class WeightSet:
    """Tensors of one dict by name, or of one list by number; `path` holds the keys that lead there."""

    path: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    named: bool

    @property
    def key(self) -> str:
        return ".".join(self.path)


def weight_sets(loaded: Any, path: tuple[str, ...] = ()) -> list[WeightSet]:
    """Returns all sets of weights in a loaded object, without the states of optimizers; each object once.

    >>> import torch
    >>> loaded = {"model": {"weight": torch.ones(1)}, "ema": {"shadow": [torch.ones(1)], "decay": 0.9}}
    >>> [found.key for found in weight_sets(loaded)]
    ['model', 'ema.shadow']
    """
    found: list[WeightSet] = []
    seen: set[int] = set()

    def walk(node: Any, path: tuple[str, ...]) -> None:
        below = children_by_key(node) if len(path) <= _DEPTH and id(node) not in seen else {}
        if not below:
            return
        seen.add(id(node))
        tensors = {name: child for name, child in below.items() if isinstance(child, Tensor)}
        if tensors:
            found.append(WeightSet(path, tensors, isinstance(node, Mapping)))
        for name, child in below.items():
            walk(child, (*path, name))

    walk(loaded, path)
    return found


def children_by_key(node: Any) -> dict[str, Any]:
    """Returns the items of a dict or list by key; none for an optimizer's state.

    **Raises:** `InputError` for keys that are written alike: `0` and `"0"`.
    """
    if isinstance(node, Mapping):
        if "state" in node and "param_groups" in node:
            return {}
        found: dict[str, Any] = {}
        for k, (name, child) in enumerate(type(node).items(node)):  # a file may set `items` of one dict to anything
            key = str(name) if isinstance(name, str | int) else f"{type(name).__name__} {k}"
            if key in found:
                raise InputError(
                    f"has a dict with two keys that are both written {key!r}, for example a number and a text; save "
                    "it again with other keys"
                )
            found[key] = child
        return found
    return {str(k): child for k, child in enumerate(node)} if isinstance(node, list | tuple) else {}


def find_places(loaded: Any, key: str) -> list[tuple[tuple[str, ...], Any]]:
    """Returns the objects at a dotted key, with the keys on the way: keys in a file may have dots themselves.

    >>> find_places({"a": {"b.c": 1}, "a.b": {"c": 2}}, "a.b.c")
    [(('a', 'b.c'), 1), (('a.b', 'c'), 2)]
    """
    if not key:
        return [((), loaded)]
    found = []
    for name, child in children_by_key(loaded).items():
        if key == name:
            found.append(((name,), child))
        elif key.startswith(f"{name}."):
            found += [((name, *path), node) for path, node in find_places(child, key[len(name) + 1 :])]
    return found


def keys_beside(loaded: Any, path: tuple[str, ...]) -> list[str]:
    """Returns the keys of everything except the tensors of the set of weights at `path`.

    >>> keys_beside({"epoch": 3, "ema": {"decay": 0.9, "state_dict": {}}}, ("ema", "state_dict"))
    ['epoch', 'ema.decay']
    """
    found, node = [], loaded
    for k, name in enumerate(path):
        below = children_by_key(node)
        tensors = [other for other, child in below.items() if isinstance(child, Tensor)]
        others = [other for other in below if other != name and other not in tensors]
        found += [".".join((*path[:k], other)) for other in (*others, *group_by_pattern(tensors, ()))]
        node = below[name]
    others = [name for name, child in children_by_key(node).items() if not isinstance(child, Tensor)]
    return found + [".".join((*path, name)) for name in others]


def name_beginnings(name: str) -> list[str]:
    """Returns the beginnings of a name, from the empty one, each with its dot.

    >>> name_beginnings("net.fc.weight")
    ['', 'net.', 'net.fc.']
    """
    ends = itertools.islice((k + 1 for k, letter in enumerate(name) if letter == "."), _LEADS)
    return ["", *(name[:end] for end in ends)]


def group_by_pattern(names: Iterable[str], kept: Collection[str]) -> dict[str, list[str]]:
    """Groups names by the shortest pattern that fits none of the `kept` names.

    >>> group_by_pattern(["loss.a", "loss.b", "net.head.a", "step"], ["net.fc.weight"])
    {'loss.*': ['loss.a', 'loss.b'], 'net.head.*': ['net.head.a'], 'step': ['step']}
    """
    taken = {lead for name in kept for lead in name_beginnings(name)}
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        lead = next((lead for lead in name_beginnings(name)[1:] if lead not in taken), None)
        found[glob.escape(name) if lead is None else f"{glob.escape(lead)}*"].append(name)
    return dict(found)
