"""Tensors that cached functions remember are forgotten, whenever the function was made."""

import functools
import gc

import pytest
import torch

from torch_bridge.memos import forget_tensors


def test_caches_made_later_are_found_and_nothing_is_searched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_tensors()
    table = functools.lru_cache(torch.ones)
    for _ in range(2):
        first = table(3)
        assert table(3) is first
        assert forget_tensors()
        assert table(3) is not first
    del table
    forget_tensors()
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("all objects were looked at"))
    assert not forget_tensors()


def test_what_others_remember_stays() -> None:
    names = functools.lru_cache(str)
    assert names(3) is names(3)
    forget_tensors()
    assert names.cache_info().currsize == 1
