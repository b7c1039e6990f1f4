"""Rules from ATen operations to Flax layers and JAX calls, which families of operations enter into one table."""

from torch_bridge.lowering import rules
from torch_bridge.lowering.assembly import Lowered
from torch_bridge.lowering.lower import lower
from torch_bridge.lowering.table import OPERATIONS, REFUSALS, RULES, register

__all__ = ["OPERATIONS", "REFUSALS", "RULES", "Lowered", "lower", "register", "rules"]
