"""Frozen dataclasses to plain data, which JSON can hold, and back; nothing in a file is trusted.

The annotations of a dataclass are the schema: the data have exactly its fields, and each field exactly its type.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from jaxensemble.errors import InputError, first_line

T = TypeVar("T")

_SHOWN = 60
"""Most characters of a value that an error shows."""


def to_plain(value: Any) -> Any:
    """Returns plain data: dataclasses become dicts, and tuples become lists, at every depth.

    >>> from jaxensemble.network.weight_map import Rearrangement
    >>> to_plain(Rearrangement(split=(2, 3), order=(1, 0), shape=(3, 2)))
    {'split': [2, 3], 'order': [1, 0], 'shape': [3, 2], 'flipped': []}
    """
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """Returns an instance of the dataclass `kind`: the inverse of `to_plain`.

    Fields may be `str`, `int`, `float`, `bool`, dataclasses, `tuple[X, ...]`, `Mapping[str, X]` and unions of these.
    A boolean is no integer here, and an integer is no float.

    **Raises:** `InputError` listing all fields that are missing, unknown or of another type; `where` names the data.

    >>> from jaxensemble.network.weight_map import Rearrangement
    >>> from_plain(Rearrangement, {"split": [2, 3], "order": [1, True], "shape": [3, 2]}, "rearrangement")
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: the data do not have the expected form:
      rearrangement.order.1: expected int, got True
      rearrangement: `flipped` is missing
    """
    problems: list[str] = []
    value = _read(kind, data, where, problems)
    if problems:
        raise InputError("the data do not have the expected form:\n  " + "\n  ".join(problems))
    return value


def parse_json(text: str | bytes, where: str) -> Any:
    """Reads JSON as strictly as it is defined: no NaN, no infinity, no key twice in one object.

    **Raises:** `InputError` for any other text, and for one that nests too deep; `where` names the text.

    >>> parse_json('{"a": 1, "a": 2}', "the manifest")
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: the manifest is no JSON: 'a' appears twice in one object
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_with_unique_keys)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{where} is no JSON: {first_line(error)}") from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} appears twice in one object")
    return found


def _read(kind: Any, data: Any, where: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, data, where, problems)
    if origin is tuple and isinstance(data, list):
        return tuple(_read(arguments[0], item, f"{where}.{k}", problems) for k, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping) and isinstance(data, dict):
        return {key: _read(arguments[1], item, f"{where}.{_short_repr(key)}", problems) for key, item in data.items()}
    if dataclasses.is_dataclass(kind) and isinstance(data, dict):
        return _read_fields(typing.cast(Callable[..., Any], kind), data, where, problems)
    if type(data) is kind:
        return data
    problems.append(f"{where}: expected {_type_name(kind)}, got {_short_repr(data)}")
    return None


def _read_union(kinds: tuple[Any, ...], data: Any, where: str, problems: list[str]) -> Any:
    """Reads the data as the first of several types that fits."""
    tries: list[list[str]] = []
    for kind in kinds:
        found: list[str] = []
        value = _read(kind, data, where, found)
        if not found:
            return value
        tries.append(found)
    nested = [found for found in tries if not found[0].startswith(f"{where}: expected")]
    problems += (
        nested[0] if nested else [f"{where}: expected {' or '.join(map(_type_name, kinds))}, got {_short_repr(data)}"]
    )
    return None


def _read_fields(kind: Callable[..., Any], data: dict[str, Any], where: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(kind)
    before = len(problems)
    values = {name: _read(hints[name], data[name], f"{where}.{name}", problems) for name in hints if name in data}
    problems += [f"{where}: `{name}` is missing" for name in hints if name not in data]
    problems += [f"{where}: {_short_repr(name)} is not known" for name in data if name not in hints]
    return kind(**values) if len(problems) == before else None


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) is tuple:
        return "a list"
    return "an object" if typing.get_origin(kind) or dataclasses.is_dataclass(kind) else kind.__name__


def _short_repr(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
