"""Factories of models, named as `package.module:factory`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jaxensemble.errors import InputError, describe_error

if TYPE_CHECKING:
    import torch


def load_factory(factory: str, *, evaluating: bool) -> "Callable[[], torch.nn.Module]":
    """Returns a function that makes one model. If `evaluating`, the model is in evaluation mode."""
    import torch

    make = _import_factory(factory)

    def make_model() -> torch.nn.Module:
        try:
            model = make()
        except Exception as error:
            raise InputError(
                f"{factory} cannot be called without arguments: {describe_error(error)}", details=str(error)
            ) from error
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"{factory} must return a torch.nn.Module; got {type(model).__name__}")
        return model.eval() if evaluating else model

    return make_model


def _import_factory(name: str) -> Callable[[], Any]:
    """Imports `package.module:factory`, from the working directory as well."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise typer.BadParameter(f"expected package.module:factory; got {name!r}", param_hint="FACTORY")
    if "/" in module or Path(module).is_file():
        dotted = ".".join(Path(module).with_suffix("").parts)
        raise typer.BadParameter(f"a module is named without .py: {dotted}:{attribute}", param_hint="FACTORY")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise InputError(f"module {module!r} cannot be imported: it needs {error.name!r}") from error
        raise InputError(f"there is no module {module!r} here or installed; expected package.module:factory") from error
    except Exception as error:
        raise InputError(
            f"module {module!r} cannot be imported: {describe_error(error)}", details=str(error)
        ) from error
    make = getattr(found, attribute, None)
    if not callable(make):
        raise InputError(f"module {module!r} has no function or class {attribute!r}")
    return make
