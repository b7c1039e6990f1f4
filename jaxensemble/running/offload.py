"""Members that stay in the memory of the host: a few at a time are on the device, the next ones on their way."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.devices.placement import Placement
from jaxensemble.dtypes import is_key
from jaxensemble.errors import InputError
from jaxensemble.running.plan import Plan

IN_FLIGHT = 2
"""The groups of members that are on the device at once: one computes while the next is copied."""


def check_offload(plan: Plan, *, traced: bool, placement: Placement | None) -> None:
    """Checks that members can be copied to the device in turn.

    **Raises:** `InputError` within transformations, and for members on a mesh.
    """
    if traced:
        raise InputError(f"{plan} copies members to the device in turn, which jax.jit and other transformations cannot")
    if placement is not None:
        raise InputError(f"{plan} is for members on the host, and these are on a mesh: call `over(None)` first")


def group_starts(members: int, size: int) -> list[int]:
    """The first member of each group. All groups have one size: the last one repeats members where it does not divide.

    >>> group_starts(10, 4)
    [0, 4, 6]
    """
    size = min(size, members)
    return [min(start, members - size) for start in range(0, members, size)]


def take_group(tree: Any, start: int, size: int, device: Any) -> Any:
    """Returns some members of arrays `[M, ...]` on a device. Nothing else of the arrays leaves the host."""

    def take(leaf: Any) -> jax.Array:
        if is_key(leaf):
            words = jax.device_put(np.asarray(jax.random.key_data(leaf))[start : start + size], device)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        return jax.device_put(np.asarray(leaf)[start : start + size], device)

    return jax.tree.map(take, tree)


def run_groups(run: Callable[[int], Any], members: int, size: int) -> Iterator[tuple[int, Any]]:
    """Yields the first member and the result of each group, while the next group is copied or computed."""
    waiting = collections.deque[tuple[int, Any]]()
    for start in group_starts(members, size):
        waiting.append((start, run(start)))
        if len(waiting) == IN_FLIGHT:
            yield jax.block_until_ready(waiting.popleft())
    yield from waiting


def join_groups(parts: Iterable[tuple[int, Any]]) -> Any:
    """Returns the results of groups as arrays `[M, ...]`, each member once."""
    done, trees = 0, list[Any]()
    for start, tree in parts:
        fresh = done - start  # members before these are in the group before, too
        trees.append(jax.tree.map(lambda leaf: leaf[fresh:], tree) if fresh else tree)  # noqa: B023
        done = start + jax.tree.leaves(tree)[0].shape[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def write_groups(parts: Iterable[tuple[int, Any]], like: Any) -> Any:
    """Returns the results of groups as arrays with the shapes of those of `like`, and where these are."""
    found = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    for start, tree in parts:
        for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
            whole[start : start + part.shape[0]] = np.asarray(part)
    return jax.tree.map(lambda whole, leaf: _put_back(whole, leaf), found, like)


def _put_back(values: np.ndarray, leaf: Any) -> Any:
    return jax.device_put(values, leaf.sharding) if isinstance(leaf, jax.Array) else values
