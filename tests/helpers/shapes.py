"""Checks of annotated shapes and dtypes, which jaxtyping and beartype make in some rooms while tests run."""

import doctest
import inspect
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

ROOMS = ("jaxensemble.ops", "jaxensemble.layers", "jaxensemble.uncertainty", "jaxensemble.training.losses")


def install_checks() -> None:
    """Lets every call of the rooms' functions check its shapes, if the rooms are not imported yet."""
    install_import_hook(ROOMS, f"{__name__}.checked")
    doctest.DocTestFinder._from_module = _is_of_module  # type: ignore[attr-defined]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that checks the shapes in its annotations, and nothing else: wrong types have errors of ours.

    Constructors are not checked, since JAX calls those of trees with objects other than arrays. Nor are functions
    within functions, which are made at each call: to make the checks takes longer than such a call.
    """
    if function.__qualname__.endswith(".__init__") or "<locals>" in function.__qualname__:
        return function
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    return is_array or any(map(_has_shape, typing.get_args(hint)))


_is_of_own = doctest.DocTestFinder._from_module  # type: ignore[attr-defined]


def _is_of_module(finder: doctest.DocTestFinder, module: ModuleType | None, value: Any) -> bool:
    """Returns whether a module defines a value. A checked function is a wrapper, which has the globals of jaxtyping."""
    return _is_of_own(finder, module, inspect.unwrap(value))
