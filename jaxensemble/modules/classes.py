"""Classes that are made from the source of networks."""

import hashlib
import linecache
import sys
import types
from functools import cache
from typing import Any

from jaxensemble.network.network import Network
from jaxensemble.source.plan.outline import Outline
from jaxensemble.source.write.module import Printer


def load_class(network: Network) -> type[Any]:
    """Loads the class of a network from its source: an `nnx.Module` made with `rngs` and called with the inputs.

    Tracebacks and `inspect.getsource` show the lines of the source. Networks with equal source share one class.

    **Raises:** `InputError` as `print_source` does.
    """
    printer = Printer(Outline(network))
    return _load_source(printer.text(), printer.class_name)


def definition_source(made: Any) -> tuple[str, str] | None:
    """The source that a class or a function was made from, and the name of its network's class; None without one."""
    return _SOURCES.get(made.__module__)


def load_definition(text: str, class_name: str, name: str) -> Any:
    """Loads a class or a function by its name from the source of a network: the inverse of `definition_source`."""
    return getattr(sys.modules[_load_source(text, class_name).__module__], name)


_SOURCES: dict[str, tuple[str, str]] = {}  # source and class name, by name of the module


@cache
def _load_source(text: str, class_name: str) -> type[Any]:
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    filename = f"<jaxensemble {class_name} {digest}>"
    module = types.ModuleType(f"jaxensemble_{class_name}_{digest}")
    module.__file__ = filename
    sys.modules[module.__name__] = module  # where inspect and pickle look for it
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec", dont_inherit=True), module.__dict__)
    _SOURCES[module.__name__] = text, class_name
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            kind.__reduce__, kind.__copy__ = _reduce, _copy  # type: ignore[attr-defined]
    return getattr(module, class_name)


def _reduce(module: Any) -> Any:
    from jaxensemble.modules.pickling import reduce_module  # that module imports this one

    return reduce_module(module)


def _copy(module: Any) -> Any:
    """Copies a module; both share their arrays, as copies of other modules do."""
    copied = object.__new__(type(module))
    copied.__setstate__(module.__getstate__())
    return copied
