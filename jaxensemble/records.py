"""Outputs with named fields, as a PyTorch forward may return them: dataclasses, named tuples, mappings.

The classes are made from their names and fields alone, so that a saved network has them too. Records are pytrees, in
which a field that is None has no leaf. Two classes of equal kind, name and fields are one class.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


@functools.cache
def dataclass(name: str, *fields: str) -> type[Any]:
    """A frozen dataclass.

    >>> Output = dataclass("Output", "mean", "scale")
    >>> Output(mean=1, scale=None)
    Output(mean=1, scale=None)
    """
    namespace = {"__module__": __name__, "__reduce__": _reduce_method("dataclass", name, fields)}
    made = dataclasses.make_dataclass(name, fields, frozen=True, eq=False, namespace=namespace)
    return jax.tree_util.register_dataclass(made, data_fields=list(fields), meta_fields=[])


@functools.cache
def namedtuple(name: str, *fields: str) -> type[Any]:
    """A named tuple, as `collections.namedtuple` makes it.

    >>> mean, scale = namedtuple("Output", "mean", "scale")(mean=1, scale=2)
    >>> mean
    1
    """
    made: Any = collections.namedtuple(name, fields, module=__name__)
    made.__reduce__ = _reduce_method("namedtuple", name, fields)
    return made


@functools.cache
def mapping(name: str, *fields: str) -> type[Any]:
    """A dict whose items are also attributes, and can be read by position, as in Hugging Face's `ModelOutput`.

    Fields that are None are attributes alone.

    >>> output = mapping("Output", "loss", "logits")(loss=None, logits=1)
    >>> output.logits, output["logits"], output[0], output.loss, list(output)
    (1, 1, 1, None, ['logits'])
    """
    namespace = {"_names": fields, "__reduce__": _reduce_method("mapping", name, fields), "__module__": __name__}
    made = type(name, (Attributes,), namespace)

    def flatten(record: Attributes) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(field), record.get(field)) for field in fields], None

    jax.tree_util.register_pytree_with_keys(made, flatten, lambda _, values: _make_record(made, fields, [*values]))
    return made


KINDS: dict[str, Callable[..., type[Any]]] = {"dataclass": dataclass, "namedtuple": namedtuple, "mapping": mapping}
"""The kinds of records by the names that a network has for them."""


class Attributes(dict[Any, Any]):
    """The base of the classes that `mapping` makes."""

    _names: tuple[str, ...] = ()

    def __init__(self, **fields: Any) -> None:
        super().__init__((name, fields.get(name)) for name in self._names if fields.get(name) is not None)

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self._names)}")

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"


def items_of(record: Any, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The fields of a record and their values."""
    for field in fields:
        yield field, record.get(field) if isinstance(record, dict) else getattr(record, field)


def _make_record(made: type[Any], fields: Sequence[str], values: Sequence[Any]) -> Any:
    return made(**dict(zip(fields, values, strict=True)))


def _reduce_method(kind: str, name: str, fields: tuple[str, ...]) -> Callable[[Any], Any]:
    """Makes the `__reduce__` of a record, whose class is in no module where `pickle` could find it."""
    return lambda record: (_restore_record, (kind, name, fields, [value for _, value in items_of(record, fields)]))


def _restore_record(kind: str, name: str, fields: tuple[str, ...], values: Sequence[Any]) -> Any:
    return _make_record(KINDS[kind](name, *fields), fields, values)
