"""Dtypes of arrays: their names, their codes in safetensors, and what JAX makes of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


class DtypeRow(NamedTuple):
    """Properties of a dtype.

    - `code`: the code of safetensors; None for a dtype that safetensors lacks.
    - `parts`: the dtype of the real and the imaginary part, if an artifact stores these along a further axis.
    - `is_wide`: whether JAX needs 64-bit types for the dtype.
    - `narrow`: the dtype that takes the place of a 64-bit integer while 64-bit types are off.
    - `ported`: JAX's name of a dtype that inputs and ported tensors may have; None for any other dtype.
    """

    code: str | None
    ported: str | None = None
    narrow: str | None = None
    is_wide: bool = False
    parts: str | None = None


TABLE = {
    "float64": DtypeRow("F64", "float64", is_wide=True),
    "float32": DtypeRow("F32", "float32"),
    "float16": DtypeRow("F16", "float16"),
    "bfloat16": DtypeRow("BF16", "bfloat16"),
    "float8_e4m3fn": DtypeRow("F8_E4M3"),
    "float8_e5m2": DtypeRow("F8_E5M2"),
    "float8_e4m3fnuz": DtypeRow("F8_E4M3FNUZ"),
    "float8_e5m2fnuz": DtypeRow("F8_E5M2FNUZ"),
    "float8_e8m0fnu": DtypeRow("F8_E8M0"),
    "int64": DtypeRow("I64", "int64", narrow="int32", is_wide=True),
    "int32": DtypeRow("I32", "int32"),
    "int16": DtypeRow("I16", "int16"),
    "int8": DtypeRow("I8", "int8"),
    "uint64": DtypeRow("U64", narrow="uint32", is_wide=True),
    "uint32": DtypeRow("U32"),
    "uint16": DtypeRow("U16"),
    "uint8": DtypeRow("U8", "uint8"),
    "bool": DtypeRow("BOOL", "bool_"),
    "complex64": DtypeRow("C64", "complex64"),
    "complex128": DtypeRow(None, "complex128", is_wide=True, parts="float64"),
}
"""All dtypes, by their names in NumPy and `ml_dtypes`."""


CODES = {name: dtype.code for name, dtype in TABLE.items() if dtype.code}
"""The dtypes that safetensors has, and its codes."""


PAIRS = {name: dtype.parts for name, dtype in TABLE.items() if dtype.parts}
"""The complex dtypes that safetensors lacks, and the dtype of their two parts."""


PORTED = {name: dtype.ported for name, dtype in TABLE.items() if dtype.ported}
"""The dtypes that inputs and ported tensors may have, and JAX's names for them."""


NARROW = {name: dtype.narrow for name, dtype in TABLE.items() if dtype.narrow}
"""The 64-bit integers, and the integers that take their place while JAX has 64-bit types off."""


WIDE = frozenset(name for name, dtype in TABLE.items() if dtype.is_wide)
"""The dtypes for which JAX needs 64-bit types."""


class KeyType(NamedTuple):
    """Kind of random keys: JAX's name of the generator, and the number of 32-bit words in a key."""

    generator: str
    words: int


KEYS = {"key<fry>": KeyType("threefry2x32", 2), "key<rbg>": KeyType("rbg", 4), "key<urbg>": KeyType("unsafe_rbg", 4)}
"""Random keys by their dtype."""


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype that has a name in `TABLE`.

    >>> numpy_dtype("bfloat16").itemsize, numpy_dtype("bool").itemsize
    (2, 1)
    """
    return np.dtype(getattr(ml_dtypes, name, name))


def is_key(leaf: Any) -> bool:
    """Returns whether an array holds random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
