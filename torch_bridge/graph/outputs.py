"""Outputs of a forward, split into tensors and the tree that holds them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jaxensemble.errors import UnsupportedError
from jaxensemble.network.network import Fixed, Record, RecordKind, Ref, ReferenceTree

LEAVES = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


@contextlib.contextmanager
def flatten_outputs(model: nn.Module) -> Iterator[list[ReferenceTree]]:
    """Has the model return a flat tuple of tensors within it. Yields a list of the trees of its outputs.

    So a forward may return dataclasses that are not registered with PyTorch.
    """
    trees: list[ReferenceTree] = []
    calls: list[nn.Module] = []  # of the model, nested if it calls itself

    def take_apart(module: nn.Module, args: Any, outputs: Any) -> Any:
        calls.pop()
        if calls:
            return outputs
        leaves: list[Any] = []
        trees.append(_tree(outputs, leaves, type(model).__name__))
        return tuple(leaves)

    before = model.register_forward_pre_hook(lambda module, args: calls.append(module))
    after = model.register_forward_hook(take_apart)
    try:
        yield trees
    finally:
        before.remove()
        after.remove()


def _tree(value: Any, leaves: list[Any], name: str) -> ReferenceTree:
    """Returns the tree of a value, with the number of each tensor as a reference."""
    if isinstance(value, LEAVES):
        leaves.append(value)
        return Ref(str(len(leaves) - 1))
    if value is None or type(value) in (bool, int, float, complex, str):
        return None if value is None else Fixed(value)
    record = record_of(value)
    if record is not None:
        kind, fields = record
        return Record(type(value).__name__, kind, {key: _tree(item, leaves, name) for key, item in fields.items()})
    match value:
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _tree(item, leaves, name) for key, item in value.items()}
        case dict():
            raise UnsupportedError(f"dicts of outputs must have strings for keys; got {list(value)}")
        case list():
            return [_tree(item, leaves, name) for item in value]
        case tuple():
            return tuple(_tree(item, leaves, name) for item in value)
    kind = type(value)
    raise UnsupportedError(
        f"{name}.forward returns an object of {kind.__module__}.{kind.__qualname__}; a ported network returns arrays, "
        "numbers and strings, and tuples, lists, dicts, named tuples and dataclasses of them. Leave it out, in a "
        "module around this one or, for a cache of keys and values, with `use_cache=False` in the model's "
        "configuration."
    )


def record_of(value: Any) -> tuple[RecordKind, dict[str, Any]] | None:
    """The kind of a value with named fields, as `jaxensemble.records` has them, and its fields; None for any other.

    A mapping is a dict whose items are attributes, too, as Hugging Face's `ModelOutput`, which is a dataclass besides.

    >>> import collections
    >>> record_of(collections.namedtuple("Pair", "mean scale")(1, 2))
    ('namedtuple', {'mean': 1, 'scale': 2})
    """
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        return ("namedtuple", dict(zip(names, value, strict=True))) if names else None
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    names = [field.name for field in dataclasses.fields(value)] if is_dataclass else []
    if isinstance(value, dict):
        keys = list(value)
        has_attributes = bool(keys) and all(isinstance(key, str) and _is_attribute(value, key) for key in keys)
        if is_dataclass or (type(value) is not dict and has_attributes):
            return "mapping", {name: value.get(name) for name in dict.fromkeys([*names, *keys])}
        return None
    return ("dataclass", {name: getattr(value, name) for name in names}) if is_dataclass else None


def _is_attribute(value: Mapping[str, Any], key: str) -> bool:
    return getattr(value, key, None) is value[key]


def fill_tree(tree: Any, leaves: list[Any]) -> Any:
    """Returns the tree with every reference replaced by its leaf."""
    match tree:
        case Ref(number):
            return leaves[int(number)]
        case Record():
            return dataclasses.replace(tree, fields={key: fill_tree(item, leaves) for key, item in tree.fields.items()})
        case dict():
            return {key: fill_tree(item, leaves) for key, item in tree.items()}
        case tuple() | list():
            return type(tree)(fill_tree(item, leaves) for item in tree)
    return tree


def output_leaves(outputs: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the places and leaves of either framework's outputs, in the same order for both frameworks."""
    record = record_of(outputs)
    fields = record[1] if record else outputs
    if isinstance(fields, dict):
        for key in sorted(fields):
            yield from output_leaves(fields[key], f"{place}[{key!r}]")
    elif isinstance(fields, tuple | list):
        for k, item in enumerate(fields):
            yield from output_leaves(item, f"{place}[{k}]")
    elif outputs is not None:
        yield place or "output", outputs


def arrays_of(outputs: Any) -> dict[str, Any]:
    """Returns the arrays or tensors of outputs by place."""
    return {place: leaf for place, leaf in output_leaves(outputs) if hasattr(leaf, "dtype")}


def constants_of(outputs: Any) -> dict[str, str]:
    """Returns the numbers and strings of outputs by place, as text."""
    return {place: repr(leaf) for place, leaf in output_leaves(outputs) if not hasattr(leaf, "dtype")}
