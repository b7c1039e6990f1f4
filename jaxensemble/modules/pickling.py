"""Pickles of modules whose classes were made from source."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.arrays import require_x64
from jaxensemble.dtypes import is_key
from jaxensemble.modules.state import KINDS, merge, split
from jaxensemble.modules.structure import Structure


def reduce_module(module: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The result of `__reduce__` for a module whose class was made from source."""
    state = split(module)
    return _restore_module, (state.graphdef, *(jax.tree.map(pack_leaf, getattr(state, kind)) for kind in KINDS))


def _restore_module(graphdef: Structure, *trees: Any) -> Any:
    return merge(graphdef, *(jax.tree.map(unpack_leaf, tree) for tree in trees))


def pack_leaf(leaf: Any) -> "_Keys | np.ndarray":
    """Converts an array or random keys to an object that `pickle` takes."""
    if is_key(leaf):
        return _Keys(str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)))
    return np.asarray(leaf)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Random keys as numbers: JAX's name of their generator, and their words."""

    generator: str
    words: np.ndarray


def unpack_leaf(leaf: _Keys | np.ndarray) -> jax.Array:
    """Restores an array or random keys: the inverse of `pack_leaf`.

    **Raises:** `InputError` for 64-bit floats that JAX would round.
    """
    if isinstance(leaf, _Keys):
        return jax.random.wrap_key_data(jnp.asarray(leaf.words), impl=leaf.generator)
    require_x64(leaf.dtype, "an array of the pickled ensemble")
    return jnp.asarray(leaf)
