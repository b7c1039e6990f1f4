"""Tensors that functions of a forward remember from one call to the next, as `functools.lru_cache` has them do."""

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor

_LRU_CACHE = type(functools.lru_cache(lambda: None))


@contextlib.contextmanager
def tensors_forgotten() -> Iterator[None]:
    """Within it and after it, cached functions compute their tensors anew.

    A table of positions that was made in float32, or by the exporter without any values, would be taken for the one
    that a call in float64, or with values, makes from the same arguments.

    >>> import torch
    >>> table = functools.lru_cache(lambda n: torch.arange(n) * torch.get_default_dtype().itemsize)
    >>> table(3)
    tensor([0, 4, 8])
    >>> torch.set_default_dtype(torch.float64)
    >>> with tensors_forgotten():
    ...     table(3)
    tensor([ 0,  8, 16])
    >>> torch.set_default_dtype(torch.float32)
    >>> table(3)
    tensor([0, 4, 8])
    """
    forget_tensors()
    try:
        yield
    finally:
        forget_tensors()


def forget_tensors() -> bool:
    """Empties every cache whose results hold a tensor, and leaves all others as they are. Whether there was any."""
    forgotten = False
    for cached in _caches():
        misses = cached.cache_info().misses
        if _without_tensors.get(cached) == misses:  # nothing was added since
            continue
        own = vars(cached)
        if any(_holds_tensors(held) for held in gc.get_referents(cached) if held is not own):
            cached.cache_clear()
            forgotten, misses = True, 0
        _without_tensors[cached] = misses
    return forgotten


_without_tensors: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
"""The caches that were looked into, with their number of misses at that time."""

_other_references = -1
"""References to the class of caches that are not those which its instances hold."""


def _caches() -> list[Any]:
    """All caches of the process.

    Looking for them among all objects takes a tenth of a second. Every instance holds a reference to its class, so
    they are looked for only where the number of references is not the one that the known caches explain.
    """
    global _other_references
    known = list(_without_tensors)
    if sys.getrefcount(_LRU_CACHE) - len(known) != _other_references:
        known = [found for found in gc.get_objects() if type(found) is _LRU_CACHE]
        _other_references = sys.getrefcount(_LRU_CACHE) - len(known)
    return known


def _holds_tensors(held: object) -> bool:
    if isinstance(held, dict):
        return any(map(_holds_tensors, held.values()))
    return any(map(_holds_tensors, held)) if isinstance(held, tuple | list) else isinstance(held, Tensor)
