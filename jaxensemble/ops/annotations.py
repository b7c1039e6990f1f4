"""Types for the annotations of operations and layers."""

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:  # numpy's arrays have the methods, but type checkers would have each result converted
    AnyArray = jax.Array
else:
    AnyArray = jax.Array | np.ndarray
