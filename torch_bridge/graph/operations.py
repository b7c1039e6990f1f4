"""`Operations`: those that a graph may keep, which lowering has rules for or refuses."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Operations(NamedTuple):
    """Tables by the name of an operation, with its overload: `aten.relu.default`.

    - `rules`: the operations that can be lowered; of a rule, no more is known here.
    - `refusals`: the operations that cannot be carried, and why.
    - `decompositions`: by the operation itself, functions of other operations in its place, where PyTorch has none.
    """

    rules: Mapping[str, Any]
    refusals: Mapping[str, str]
    decompositions: Mapping[Any, Callable[..., Any]]

    def knows(self, target: Any) -> bool:
        """Whether a graph may keep an operation: all others are decomposed."""
        return str(target) in self.rules or str(target) in self.refusals
