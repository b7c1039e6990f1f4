"""The table of rules: for each ATen operation the function that lowers it."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch_bridge.graph.operations import Operations

Rule = Callable[..., Any]
"""`rule(builder, *args, **kwargs)` with the operation's own arguments, arrays as `Value`s. It returns `Value`s."""

F = TypeVar("F", bound=Rule)

RULES: dict[str, Rule] = {}

REFUSALS: dict[str, str] = {}
"""Operations that cannot be carried at all, with the reason."""

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Functions written in other operations, by the operation that torch's table of decompositions lacks."""

OPERATIONS = Operations(RULES, REFUSALS, DECOMPOSITIONS)
"""The operations that a captured graph may keep."""


def register(*operations: str) -> Callable[[F], F]:
    """Makes a function the rule of ATen operations, which are named with their overload: `aten.relu.default`.

    The rule is called with the builder and the operation's arguments: arrays as `Value`, constant tensors as
    `torch.Tensor`, sizes as numbers or expressions in the batch size, everything else unchanged. It returns a `Value`,
    or a tuple of them.

    **Raises:** `ValueError` if an operation already has a rule.
    """

    def enter(rule: F) -> F:
        taken = [operation for operation in operations if operation in RULES]
        if taken:
            raise ValueError(f"there is a rule for {', '.join(taken)} already")
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return enter


def refuse(operations: str, reason: str) -> None:
    """Enters operations that cannot be carried: names with overloads, separated by blanks, and the reason."""
    REFUSALS.update(dict.fromkeys(operations.split(), reason))
