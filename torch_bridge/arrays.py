"""Tensors to arrays and back, bit for bit, never sharing memory."""

import jax
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from jaxensemble.errors import InputError

_BITS = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}
"""Dtypes NumPy has no name for: the dtype that carries their bits, and the one that names them there."""


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's values as a NumPy array. May be a view: copy before keeping it.

    **Raises:** `InputError` for tensors that have no plain values: meta, sparse, quantised or nested ones.
    """
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "meta" if tensor.is_meta else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise InputError(f"a plain dense tensor is needed; got a {kind} tensor of shape {tuple(tensor.shape)}")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype in _BITS:
        carrier, name = _BITS[tensor.dtype]
        return tensor.contiguous().view(carrier).numpy().view(name)
    return tensor.numpy()


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A tensor of its own with the array's values; the inverse of `to_numpy`."""
    array = np.array(array, order="C")
    if dtype in _BITS:
        carrier, _ = _BITS[dtype]
        return torch.from_numpy(array.view(np.int16)).view(dtype) if carrier is torch.int16 else torch.tensor(array)
    return torch.from_numpy(array).to(dtype)


def jax_dtype(dtype: np.dtype, what: str) -> np.dtype:
    """The dtype in which JAX can hold such values now: 64-bit integers become 32-bit ones where x64 is off.

    **Raises:** `InputError` for 64-bit floats where x64 is off: they would be rounded.
    """
    if jax.config.read("jax_enable_x64"):
        return dtype
    if dtype in (np.float64, np.complex128):
        raise InputError(
            f"{what} is {dtype}, which JAX holds only with x64 on; expected float32, got {dtype}. Port within "
            "`with jax.enable_x64(True):`, or cast the models first: model.float()."
        )
    return np.dtype({"int64": "int32", "uint64": "uint32"}.get(dtype.name, dtype))


def checked_cast(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """The array in another integer dtype. **Raises:** `InputError` if a value does not fit; nothing ever wraps."""
    if array.dtype == dtype:
        return array
    cast = array.astype(dtype)
    if not np.array_equal(cast.astype(array.dtype), array):
        raise InputError(
            f"{what} holds {array.dtype} values outside of {dtype}: {array[cast.astype(array.dtype) != array].flat[0]}."
            " Port within `with jax.enable_x64(True):`."
        )
    return cast
