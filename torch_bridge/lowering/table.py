"""The table of rules: which function lowers which ATen operation."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch_bridge.graph.operations import Operations

Rule = Callable[..., Any]
"""`rule(builder, *args, **kwargs)` with the operation's own arguments, arrays as `Value`s; returns `Value`s."""

F = TypeVar("F", bound=Rule)

RULES: dict[str, Rule] = {}

REFUSALS: dict[str, str] = {}
"""Operations that cannot be carried at all, and why."""

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Functions of other operations, by the operation itself, that torch's table of decompositions lacks."""

OPERATIONS = Operations(RULES, REFUSALS, DECOMPOSITIONS)
"""The operations that a captured graph may keep."""


def register(*operations: str) -> Callable[[F], F]:
    """Makes a function the rule of ATen operations, named with their overload: `aten.relu.default`.

    The rule is called with the builder and the operation's arguments: arrays as `Value`, constant tensors as
    `torch.Tensor`, sizes as numbers or expressions in the batch size, all else as it is. It returns a `Value`, or a
    tuple of them.

    **Raises:** `ValueError` if an operation has a rule already.
    """

    def enter(rule: F) -> F:
        taken = [operation for operation in operations if operation in RULES]
        if taken:
            raise ValueError(f"there is a rule for {', '.join(taken)} already")
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return enter


def refuse(operations: str, reason: str) -> None:
    """Enters operations, named with their overload and separated by blanks, that cannot be carried, and why."""
    REFUSALS.update(dict.fromkeys(operations.split(), reason))
