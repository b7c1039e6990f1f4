"""`Operations`: the operations that a graph may keep, because lowering has rules for them or refuses them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Operations(NamedTuple):
    """Tables by the name of an operation, with its overload: `aten.relu.default`.

    - `rules`: the operations that can be lowered. Only their names are used here.
    - `refusals`: the operations that cannot be ported, and why.
    - `decompositions`: functions of other operations, by the operation itself, where PyTorch has none.
    """

    rules: Mapping[str, Any]
    refusals: Mapping[str, str]
    decompositions: Mapping[Any, Callable[..., Any]]

    def knows(self, target: Any) -> bool:
        """Returns whether a graph may keep an operation. All others are decomposed."""
        return str(target) in self.rules or str(target) in self.refusals
