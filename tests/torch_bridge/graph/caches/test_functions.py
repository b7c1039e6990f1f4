"""Tensors that cached functions remember are cleared, whenever they were computed."""

import functools
import gc
from typing import Any

import pytest
import torch

from torch_bridge.graph.caches.functions import clear_function_caches


def test_caches_made_later_are_found_and_objects_are_not_searched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_function_caches()
    table = functools.lru_cache(torch.ones)
    for _ in range(2):
        first = table(3)
        assert table(3) is first
        assert clear_function_caches()
        assert table(3) is not first
    del table
    clear_function_caches()
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("all objects were searched"))
    assert not clear_function_caches()


def test_a_remembered_container_may_be_filled_later() -> None:
    @functools.cache
    def tables() -> dict[str, Any]:
        return {}

    tables()
    assert not clear_function_caches()
    tables()["ones"] = torch.ones(3)
    assert clear_function_caches()
    assert tables() == {}


def test_a_cache_may_be_emptied_by_its_owner() -> None:
    table = functools.lru_cache(lambda n: torch.ones(n) if n > 2 else None)
    table(1)
    assert not clear_function_caches()
    table.cache_clear()
    table(3)
    assert clear_function_caches()


def test_what_others_remember_stays() -> None:
    names = functools.lru_cache(str)
    assert names(3) is names(3)
    clear_function_caches()
    assert names.cache_info().currsize == 1
