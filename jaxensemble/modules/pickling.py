"""Modules and their structures as `pickle` takes them."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.arrays import require_x64
from jaxensemble.dtypes import is_key
from jaxensemble.modules.state import KINDS, merge, split
from jaxensemble.modules.structure import Structure

if TYPE_CHECKING:
    pass


def reduce_module(module: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What `__reduce__` of a module whose class was made from source returns."""
    state = split(module)
    return _restore_module, (state.graphdef, *(jax.tree.map(pack_leaf, getattr(state, kind)) for kind in KINDS))


def _restore_module(graphdef: Structure, *trees: Any) -> Any:
    return merge(graphdef, *(jax.tree.map(unpack_leaf, tree) for tree in trees))


def pack_leaf(leaf: Any) -> Any:
    if is_key(leaf):
        return _Keys(str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)))
    return np.asarray(leaf)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Random keys: JAX's name of their generator, and their words."""

    generator: str
    words: np.ndarray


def unpack_leaf(leaf: Any) -> jax.Array:
    if isinstance(leaf, _Keys):
        return jax.random.wrap_key_data(jnp.asarray(leaf.words), impl=leaf.generator)
    require_x64(leaf.dtype, "an array of the pickled ensemble")
    return jnp.asarray(leaf)
