"""Checks of annotated shapes and dtypes, which jaxtyping and beartype make in some rooms while tests run."""

import doctest
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOMS = ("jaxensemble.ops", "jaxensemble.layers", "jaxensemble.uncertainty", "jaxensemble.training.losses")

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as PEP 484 has it


def install_checks() -> None:
    """Lets every call of the rooms' functions check its annotations, if the rooms are not imported yet."""
    install_import_hook(ROOMS, f"{__name__}.checked")
    doctest.DocTestFinder._from_module = _is_of_module  # type: ignore[attr-defined]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its annotations checked, except constructors and functions within functions.

    JAX calls the constructors of trees with objects that are no arrays. A function within another is made at each
    call, and checks take longer to make than such a call takes.
    """
    name = function.__qualname__
    return function if name.endswith(".__init__") or "<locals>" in name else _check(function)


_is_of_own = doctest.DocTestFinder._from_module  # type: ignore[attr-defined]


def _is_of_module(finder: doctest.DocTestFinder, module: ModuleType | None, value: Any) -> bool:
    """Returns whether a module defines a value. A checked function is a wrapper, which has the globals of jaxtyping."""
    return _is_of_own(finder, module, inspect.unwrap(value))
