"""What the arrays of an artifact can be, and what safetensors calls it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
"""NumPy's names of dtypes, those of `ml_dtypes` included, and safetensors' codes."""


PAIRS = {"complex128": "float64"}
"""Complex dtypes that safetensors lacks, and that of their two parts, which stand in a further axis of the array."""


class KeyType(NamedTuple):
    """Random keys of one kind: JAX's name of the generator, and the number of 32-bit words in a key."""

    generator: str
    words: int


KEYS = {"key<fry>": KeyType("threefry2x32", 2), "key<rbg>": KeyType("rbg", 4), "key<urbg>": KeyType("unsafe_rbg", 4)}
"""Random keys by their dtype."""


def numpy_dtype(name: str) -> np.dtype:
    """
    >>> numpy_dtype("bfloat16").itemsize, numpy_dtype("bool").itemsize
    (2, 1)
    """
    return np.dtype(getattr(ml_dtypes, name, name))


def is_key(leaf: Any) -> bool:
    """Whether an array holds random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
