"""Parts of structures in a form that other processes can unpickle."""

import dataclasses
import functools
import pkgutil
import types
from collections.abc import Callable, Mapping
from typing import Any

from jaxensemble.modules.classes import definition_source, load_definition


@dataclasses.dataclass(frozen=True)
class _DeferredCall:
    """A call that unpickling makes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def make_portable(value: Any) -> Any:
    """Replaces the objects that `pickle` cannot find in other processes by calls that make them there."""
    if isinstance(value, functools.partial):
        return _DeferredCall(
            _make_partial, (make_portable(value.func), make_portable(value.args), make_portable(value.keywords))
        )
    if type(value) in (tuple, list):
        return type(value)(map(make_portable, value))
    if type(value) is dict:
        return {key: make_portable(item) for key, item in value.items()}
    if isinstance(value, type | types.FunctionType):
        source = definition_source(value)
        return value if source is None else _DeferredCall(load_definition, (*source, value.__qualname__))
    if hasattr(value, "__wrapped__"):
        name = f"{value.__module__}:{value.__qualname__}"
        if _find_object(name) is value:
            return _DeferredCall(pkgutil.resolve_name, (name,))
    return value


def _make_partial(function: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    return functools.partial(function, *arguments, **named)


def _find_object(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):  # for example for a function in a function
        return None
