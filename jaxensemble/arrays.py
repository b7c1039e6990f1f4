"""Arrays from anywhere as JAX arrays: NumPy, PyTorch and other libraries, by value and never by reference.

JAX may keep reading the memory of a NumPy array or a DLPack tensor that it was given. A later change in place would
then change results, so that every array that is not a JAX array is copied here.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.compat import Tracer
from jaxensemble.dtypes import NARROW, WIDE
from jaxensemble.errors import InputError, first_line

SCALARS = (bool, int, float, complex)
ENABLE_X64 = "enable 64-bit types (jax.config.update('jax_enable_x64', True), or `with jax.enable_x64(True):`; --x64)"
"""The advice of errors about 64-bit types."""


def as_arrays(tree: Any, name: str) -> Any:
    """Converts every leaf of a tree of arrays to a JAX array; `name` is the name of the tree in errors.

    JAX arrays, tracers and Python numbers stay as they are. Any object with `__array__` or `__dlpack__` is converted:
    NumPy arrays, and PyTorch tensors that require gradients, are strided or are bfloat16. Dtypes are kept. While JAX
    has 64-bit types switched off, int64 becomes int32 where every value fits.

    **Raises:** `InputError`, with the place in the tree, for other objects; for float64 and complex128 while 64-bit
    types are off, which JAX itself would round silently; and for an integer that does not fit.

    >>> as_arrays({"ids": np.array([1, 2])}, "inputs")
    {'ids': Array([1, 2], dtype=int32)}
    """
    if all(isinstance(leaf, jax.Array) and leaf.dtype.itemsize < 8 for leaf in jax.tree.leaves(tree)):
        return tree  # the most frequent case, without the time that paths take
    return jax.tree_util.tree_map_with_path(lambda path, leaf: as_array(leaf, name + jax.tree_util.keystr(path)), tree)


def as_array(value: Any, name: str) -> Any:
    """Converts one array to a JAX array: see [`as_arrays`][]."""
    if isinstance(value, jax.Array):
        if isinstance(value, Tracer) or not is_too_wide(value.dtype):
            return value
        value = np.asarray(value)
    if isinstance(value, SCALARS) and not isinstance(value, np.generic):
        if isinstance(value, int):
            _require_fit(np.asarray(value), np.dtype("int64" if is_x64_on() else "int32"), name)
        return value
    if not isinstance(value, np.ndarray | np.generic):
        value = _import_array(value, name)
        if isinstance(value, jax.Array):
            return value
    if not (jnp.issubdtype(value.dtype, np.number) or value.dtype == bool):
        raise InputError(f"`{name}` must hold numbers or booleans; got a numpy array of dtype {value.dtype}")
    dtype = value.dtype if value.dtype.isnative else value.dtype.newbyteorder("=")
    value = np.array(value, dtype)  # a copy that nothing else refers to
    return jnp.asarray(_narrow(value, name) if is_too_wide(dtype) else value)


def is_too_wide(dtype: Any) -> bool:
    """Returns whether a dtype has 64-bit numbers while JAX has 64-bit types switched off."""
    return str(dtype) in WIDE and not is_x64_on()


def is_traced(tree: Any) -> bool:
    """Returns whether any leaf of a tree is a tracer, as within `jax.jit`."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def are_deleted(arrays: Iterable[Any]) -> bool:
    """Returns whether any array has given its memory away, as donated arguments of a function of JAX do."""
    return any(
        isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_deleted() for array in arrays
    )


def is_x64_on() -> bool:
    """Returns whether JAX has 64-bit types now."""
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def require_x64(dtype: Any, name: str) -> None:
    """Checks that JAX, as it is configured, does not round arrays of a dtype to 32 bits.

    **Raises:** `InputError` if JAX would round them.
    """
    if is_too_wide(dtype):
        raise InputError(f"{name} is {dtype}, which JAX would round to 32 bits now: {ENABLE_X64}, or cast to 32 bits")


def _narrow(value: np.ndarray, name: str) -> np.ndarray:
    if str(value.dtype) not in NARROW:
        require_x64(value.dtype, f"`{name}`")
    narrow = np.dtype(NARROW[str(value.dtype)])
    _require_fit(value, narrow, name)
    return value.astype(narrow)


def _require_fit(value: np.ndarray, dtype: np.dtype, name: str) -> None:
    limits = np.iinfo(dtype)
    outside = (value < limits.min) | (value > limits.max)
    if outside.any():
        first = value[outside].flat[0]
        raise InputError(f"`{name}` is {value.dtype} and holds {first}, which does not fit {dtype}: {ENABLE_X64}")


def _import_array(value: Any, name: str) -> np.ndarray | jax.Array:
    """Imports an array of another library: through NumPy if possible, else (bfloat16, accelerators) through DLPack."""
    if not (hasattr(value, "__array__") or hasattr(value, "__dlpack__")):
        raise InputError(f"`{name}` must be an array; got {type(value).__module__}.{type(value).__name__}")
    for method in ("detach", "resolve_conj", "resolve_neg"):  # PyTorch exports neither gradients nor lazy views
        value = getattr(value, method, lambda value=value: value)()
    try:
        return np.asarray(value)
    except (TypeError, RuntimeError) as error:  # PyTorch: a dtype that NumPy lacks, or memory of a device
        if not hasattr(value, "__dlpack__"):
            raise InputError(f"`{name}` cannot be read: {first_line(error)}") from error
        return _from_dlpack(value, name)


def _from_dlpack(value: Any, name: str) -> jax.Array:
    try:
        value = getattr(value, "contiguous", lambda: value)()  # JAX imports no other strides
        with jax.enable_x64(True):  # without it JAX imports 64-bit numbers as 32-bit ones
            array = jnp.array(jax.dlpack.from_dlpack(value), copy=True)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(f"`{name}` cannot be read through DLPack: {first_line(error)}") from error
    return as_array(array, name)
