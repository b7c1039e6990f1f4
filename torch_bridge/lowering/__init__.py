"""ATen operations to Flax layers and JAX calls. Each family of operations enters its rules into one table."""

from torch_bridge.lowering import (
    activation,
    attention,
    conv,
    create,
    dropout,
    embedding,
    fourier,
    index,
    join,
    linalg,
    linear,
    norm,
    pointwise,
    pool,
    reduce,
    resize,
    shape,
)
from torch_bridge.lowering.lower import Lowered, lower
from torch_bridge.lowering.table import register

__all__ = [
    "Lowered",
    "activation",
    "attention",
    "conv",
    "create",
    "dropout",
    "embedding",
    "fourier",
    "index",
    "join",
    "linalg",
    "linear",
    "lower",
    "norm",
    "pointwise",
    "pool",
    "reduce",
    "register",
    "resize",
    "shape",
]
