"""ATen operations to Flax layers and JAX calls. Each family of operations enters its rules into one table."""

from torch_bridge.lowering import rules
from torch_bridge.lowering.lower import Lowered, lower
from torch_bridge.lowering.table import OPERATIONS, REFUSALS, RULES, register

__all__ = ["OPERATIONS", "REFUSALS", "RULES", "Lowered", "lower", "register", "rules"]
