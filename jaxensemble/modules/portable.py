"""Parts of structures that other processes can make: what `pickle` does not find there, replaced by what makes it."""

import dataclasses
import functools
import pkgutil
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxensemble.modules.classes import definition_source, load_definition

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(frozen=True)
class _DeferredCall:
    """A call that has been made where it is unpickled."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def make_portable(value: Any) -> Any:
    """A part of a structure, with what `pickle` does not find in other processes replaced by what makes it there."""
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


def _make_partial(function: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    return functools.partial(function, *arguments, **named)


def _find_object(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):  # as of what was made within a function
        return None
