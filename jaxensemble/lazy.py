"""Public names of a package that are imported when they are first asked for.

So the command lines answer `--version`, complete what is typed, and run `doctor`, without JAX or where it is broken.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def lazy_attributes(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package: the names in its module `public`, and its modules.

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
