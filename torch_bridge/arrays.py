"""Conversions of tensors to arrays and back, bit for bit."""

import jax
import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from jaxensemble.dtypes import NARROW, PORTED
from jaxensemble.errors import InputError

DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): ported for name, ported in PORTED.items()}
"""PyTorch's dtypes, and the names that JAX has for them."""

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_BITS = {torch.bfloat16: ml_dtypes.bfloat16}
"""16-bit dtypes that NumPy lacks, and the dtypes used for them there."""


def to_numpy(tensor: Tensor, what: str = "the tensor") -> np.ndarray:
    """Returns the tensor's values as a NumPy array, which may be a view: copy it before keeping it.

    **Raises:** `InputError` for tensors without plain values: uninitialised, meta, sparse, quantised, nested ones.
    """
    if kind := unsupported_kind(tensor):
        raise InputError(f"{what} must be a plain dense tensor; got {kind}")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype in _BITS:
        return tensor.contiguous().view(torch.int16).numpy().view(_BITS[tensor.dtype])
    return tensor.numpy()


def unsupported_kind(tensor: Tensor) -> str | None:
    """Returns what is wrong with a tensor that has no plain values, or None."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "an uninitialised one: run the model once, so that its lazy modules take shape"
    if tensor.is_meta:
        return "a meta tensor, which has no values: load the weights first"
    if tensor.is_quantized:
        return f"a quantised one ({tensor.dtype}): dequantise the model first"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"one of layout {tensor.layout}: call .to_dense() first"
    return None if tensor.dtype in DTYPE_NAMES else f"one of dtype {tensor.dtype}"


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Returns a tensor with a copy of the array's values. The inverse of `to_numpy`."""
    array = np.array(array, order="C")
    if dtype in _BITS:
        return torch.from_numpy(array.view(np.int16)).view(dtype)
    return torch.from_numpy(array).to(dtype)


def jax_dtype(dtype: np.dtype, what: str) -> np.dtype:
    """Returns the dtype in which JAX holds values of a dtype: 64-bit integers become 32-bit if x64 is off.

    **Raises:** `InputError` for 64-bit floats if x64 is off: they would be rounded.
    """
    if jax.config.read("jax_enable_x64"):
        return dtype
    if dtype in (np.float64, np.complex128):
        raise InputError(
            f"{what} is {dtype}, which JAX holds only with x64 on; expected float32, got {dtype}. Port within "
            "`with jax.enable_x64(True):`, or cast the models first: model.float()."
        )
    return np.dtype(NARROW.get(dtype.name, dtype))


def cast_exactly(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Returns the array in a different integer dtype.

    **Raises:** `InputError` if a value does not fit. No value ever wraps.
    """
    if array.dtype == dtype:
        return array
    cast = array.astype(dtype)
    if not np.array_equal(cast.astype(array.dtype), array):
        raise InputError(
            f"{what} holds {array.dtype} values outside of {dtype}: {array[cast.astype(array.dtype) != array].flat[0]}."
            " Port within `with jax.enable_x64(True):`."
        )
    return cast
