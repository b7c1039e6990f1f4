"""Exchange of arrays between processes, without pickle."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np


def save_arrays(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Writes arrays in order. Arrays of dtypes that NumPy itself does not know (bfloat16) are written as plain bits."""
    named = {f"{k} {array.dtype.name}": array for k, array in enumerate(arrays)}
    known = {
        name: array if array.dtype.isbuiltin == 1 else array.view(f"u{array.itemsize}") for name, array in named.items()
    }
    np.savez(path, **known)  # type: ignore[arg-type]  # the stubs take a name for an option


def load_arrays(path: Path) -> list[np.ndarray]:
    """Reads the arrays that `save_arrays` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return [file[name].view(jnp.dtype(name.partition(" ")[2])) for name in file.files]
