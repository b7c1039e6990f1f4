"""ATen operations to Flax layers and JAX calls. Each family of operations enters its rules into one table."""

from torch_bridge.lowering import conv, linear, pointwise, pool, resize, shape
from torch_bridge.lowering.lower import Lowered, lower
from torch_bridge.lowering.table import register

__all__ = ["Lowered", "conv", "linear", "lower", "pointwise", "pool", "register", "resize", "shape"]
