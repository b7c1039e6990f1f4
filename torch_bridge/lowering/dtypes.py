"""PyTorch's promotion of dtypes, and the casts that JAX needs to give the same.

The two agree on arrays. They differ where a number, or an array without dimensions, meets an array of a lower kind:
`int_array * 2.5` has the default dtype in PyTorch, but is float64 in JAX when x64 is on. A float64 scalar does not
widen a float32 array in PyTorch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from jaxensemble.errors import InputError
from jaxensemble.network.network import Arg, Dtype
from torch_bridge.arrays import jax_dtype
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.values import DTYPE_NAMES, Value, is_array


def dtype_argument(b: Builder, dtype: torch.dtype) -> Dtype:
    """A dtype as an argument: 64-bit integers become 32-bit integers where x64 is off.

    **Raises:** `UnsupportedError` for 64-bit floats where x64 is off, and for dtypes that JAX lacks.
    """
    if dtype not in DTYPE_NAMES:
        raise b.unsupported(f"JAX has no {dtype}; cast to another dtype")
    name = DTYPE_NAMES[dtype]
    if name == "bool_" or name == "bfloat16":
        return Dtype(name)
    try:
        return Dtype(jax_dtype(np.dtype(name), "a result").name)
    except InputError as error:
        raise b.unsupported(error.details) from error


def param_dtype(weight: Value) -> dict[str, Arg]:
    """The option `param_dtype` of a layer with this weight, left out where it is the default."""
    name = DTYPE_NAMES[weight.dtype]
    return {} if name == "float32" else {"param_dtype": Dtype(name)}


def cast(b: Builder, operand: Any, dtype: torch.dtype) -> Any:
    """Casts an operand to another dtype. Numbers stay as they are."""
    drops = isinstance(operand, Tensor | Value) and operand.dtype.is_complex and not dtype.is_complex
    if isinstance(operand, Tensor):
        return operand.real.to(dtype) if drops and dtype != torch.bool else operand.to(dtype)
    if not isinstance(operand, Value) or operand.dtype == dtype:
        return operand
    if drops and dtype != torch.bool:
        operand = b.elementwise("jnp.real", operand, dtype=operand.dtype.to_real())
        return cast(b, operand, dtype)
    return b.elementwise(".astype", operand, dtype_argument(b, dtype), dtype=dtype)


def promote_operands(b: Builder, operands: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Casts operands as far as JAX needs it to compute in `dtype`, which PyTorch computes in."""
    result = [_cast_wide(b, operand, dtype) for operand in operands]
    arrays = [k for k, operand in enumerate(result) if is_array(operand)]
    if (dtype.is_floating_point or dtype.is_complex) and all(result[k].dtype != dtype for k in arrays):
        first = arrays[0]
        result[first] = cast(b, result[first], dtype)
    return result


def _cast_wide(b: Builder, operand: Any, dtype: torch.dtype) -> Any:
    wide = is_array(operand) and torch.promote_types(operand.dtype, dtype) != dtype
    return cast(b, operand, dtype) if wide else operand


def common_dtype(*operands: Any) -> torch.dtype:
    """The dtype in which PyTorch compares two operands."""
    first, second = (_stand_in(operand) for operand in operands)
    return torch.result_type(first, second)


def _stand_in(operand: Any) -> Any:
    """An operand with the same dtype and rank for `torch.result_type`."""
    if isinstance(operand, Value):
        return torch.empty((1,) * operand.ndim, dtype=operand.dtype, device="meta")
    if isinstance(operand, sympy.Expr):  # computed from open sizes
        return 0 if operand.is_integer else 0.0
    return operand


def apply(b: Builder, target: str, *operands: Any, compute: torch.dtype | None = None, **kwargs: Arg) -> Value:
    """Emits a call on operands that broadcast, in the dtype of PyTorch's result unless `compute` is given."""
    dtype = compute or b.dtype
    return b.elementwise(target, *promote_operands(b, operands, dtype), dtype=dtype, **kwargs)


def apply_predicate(b: Builder, target: str, *operands: Any) -> Value:
    """Emits a comparison or another test of elements, in the dtype in which PyTorch compares."""
    dtype = common_dtype(*operands) if len(operands) == 2 else operands[0].dtype
    return b.elementwise(target, *promote_operands(b, operands, dtype), dtype=torch.bool)
