"""States and networks with arrays of another dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxensemble.modules.build import skeleton
from jaxensemble.modules.state import State, merge, split
from jaxensemble.network.network import Network, with_param_dtype


def cast_state(state: State, network: Any, dtype: Any) -> tuple[State, Any]:
    """Casts the floating-point and complex arrays of a state, and returns the network that goes with them.

    Embeddings keep the dtype that they were made with as an attribute, which changes too.
    """
    cast = jax.tree.map(lambda leaf: leaf.astype(_dtype_of(leaf, dtype)) if _is_inexact(leaf) else leaf, state)
    module = merge(*cast)
    changed = network
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Embed) and layer.dtype == layer.param_dtype:  # its outputs have this dtype
            wanted = _dtype_of(layer.embedding, dtype)
            layer.dtype, layer.param_dtype = wanted, getattr(jnp, wanted.name)
            if isinstance(changed, Network):
                changed = with_param_dtype(changed, {".".join(map(str, path))}, wanted.name)
    if isinstance(changed, Network) and changed is not network:
        _set_classes(module, changed)
    return cast._replace(graphdef=split(module).graphdef), changed


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _dtype_of(array: Any, dtype: Any) -> np.dtype:
    """The dtype that an array is cast to: the specified one, or the complex dtype that goes with it."""
    if not jnp.iscomplexobj(array):
        return np.dtype(dtype)
    return np.dtype("complex128" if np.dtype(dtype) == np.float64 else "complex64")


def _set_classes(module: nnx.Module, network: Network) -> None:
    """Gives a module, and all modules in it, the classes that the source of this network defines."""
    types = {path: type(layer) for path, layer in nnx.iter_modules(merge(*skeleton(network)))}
    for path, layer in nnx.iter_modules(module):
        layer.__class__ = types.get(path, type(layer))
