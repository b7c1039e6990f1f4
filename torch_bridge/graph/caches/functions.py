"""Tensors that functions of a forward remember between calls, under `functools.lru_cache`."""

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

_LRU_CACHE = type(functools.lru_cache(lambda: None))


@contextlib.contextmanager
def isolate_function_caches() -> Iterator[None]:
    """Empties the caches of functions that hold tensors, before and after it.

    Otherwise a table of positions that was made in float32, or by the exporter without values, would be used for a
    call in float64, or with values, that has the same arguments.

    >>> import torch
    >>> table = functools.lru_cache(lambda n: torch.arange(n) * torch.get_default_dtype().itemsize)
    >>> table(3)
    tensor([0, 4, 8])
    >>> torch.set_default_dtype(torch.float64)
    >>> with isolate_function_caches():
    ...     table(3)
    tensor([ 0,  8, 16])
    >>> torch.set_default_dtype(torch.float32)
    >>> table(3)
    tensor([0, 4, 8])
    """
    clear_function_caches()
    try:
        yield
    finally:
        clear_function_caches()


def clear_function_caches() -> bool:
    """Empties every cache whose results hold a tensor. Returns whether there was any."""
    remembering = [cached for cached in _caches() if _remembers(cached)]
    for cached in remembering:
        cached.cache_clear()
    return bool(remembering)


def has_cached_tensors() -> bool:
    """Returns whether any cached function remembers a tensor."""
    return any(map(_remembers, _caches()))


def is_cached(function: object) -> bool:
    """Returns whether a function is decorated with `functools.lru_cache` or `functools.cache`."""
    return type(function) is _LRU_CACHE


def _remembers(cached: Any) -> bool:
    own = vars(cached)
    return any(_holds_tensors(held) for held in gc.get_referents(cached) if held is not own)


_known: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""The caches of the last search that may hold tensors."""

_counted = -1
"""The number of references to the class of caches at the last search, without those of its living instances."""

_instances: "weakref.WeakSet[Any]" = weakref.WeakSet()

_WITHOUT_TENSORS = {"jax", "sympy", "numpy", *sys.stdlib_module_names}
"""Packages whose cached functions return no tensors of PyTorch."""


def _caches() -> Iterable[Any]:
    """Returns the caches of the process that may hold tensors.

    Searching all objects takes a tenth of a second. Every cache holds a reference to its class. So the objects are
    searched again only if unknown caches have changed the number of these references.
    """
    global _counted
    if sys.getrefcount(_LRU_CACHE) - len(_instances) != _counted:
        _instances.update(found for found in gc.get_objects() if type(found) is _LRU_CACHE)
        _known.update(found for found in _instances if not _gives_no_tensors(found))
        _counted = sys.getrefcount(_LRU_CACHE) - len(_instances)
    return list(_known)


def _gives_no_tensors(cached: Any) -> bool:
    return (getattr(cached, "__module__", None) or "").partition(".")[0] in _WITHOUT_TENSORS


def _holds_tensors(held: object) -> bool:
    if isinstance(held, dict):
        return any(map(_holds_tensors, held.values()))
    return any(map(_holds_tensors, held)) if isinstance(held, tuple | list) else isinstance(held, Tensor)
