"""Names that depend on PyTorch's version: every operation with a rule exists in PyTorch."""

import pytest
import torch

from torch_bridge.compat import REMOVED
from torch_bridge.graph.stand_ins import stand_in
from torch_bridge.lowering import REFUSALS, RULES


def _exists(operation: str) -> bool:
    library, name, overload = operation.split(".")
    packet = getattr(getattr(torch.ops, library), name, None)
    return packet is not None and overload in packet.overloads()


def test_operations_with_rules_exist() -> None:
    """A misspelt operation would never meet its rule."""
    stand_in("dropout")  # defines all of them
    assert {operation for operation in RULES | REFUSALS if not _exists(operation)} <= set(REMOVED)


def test_removed_operations_have_rules() -> None:
    assert set(REMOVED) <= set(RULES)


@pytest.mark.parametrize("operation", ["aten.relu.Tensor", "aten.rleu.default", "torch_bridge.relu.default"])
def test_misspelt_operations_are_found(operation: str) -> None:
    assert not _exists(operation)
