"""Public names of a package that are imported when they are first used.

The command lines then answer `--version`, complete commands, and run `doctor` where JAX is missing or broken.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def lazy_attributes(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Functions `__getattr__` and `__dir__` of a package: for the names in its module `public`, and for its modules.

    >>> get, names = lazy_attributes("jaxensemble")
    >>> get("Ensemble").__name__, "Ensemble" in names()
    ('Ensemble', True)
    """

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(_public_names(package))
        if not name.startswith("_"):
            if importlib.util.find_spec(f"{package}.{name}"):
                return importlib.import_module(f"{package}.{name}")
            found = _public_names(package)
            if name in found:
                setattr(sys.modules[package], name, found[name])
                return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(sys.modules[package]), *_public_names(package)})


def _public_names(package: str) -> dict[str, Any]:
    names = vars(importlib.import_module(f"{package}.public"))
    return {name: value for name, value in names.items() if not name.startswith("_")}
