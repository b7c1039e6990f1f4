"""Operations that cannot be lowered, all named by one error."""

from typing import Any

from torch import Tensor, fx

from jaxensemble.errors import UnsupportedError
from jaxensemble.network.network import Ref
from torch_bridge.compat import free_unbacked_symbols, pytree
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.constants import is_constant, is_structural
from torch_bridge.lowering.table import REFUSALS, RULES
from torch_bridge.lowering.values import sizes


class Refusals:
    """The operations that cannot be lowered. One error names them all.

    Lowering goes on after a refused node, with made-up results of the known shapes. A node that takes a result without
    a known shape is lost, and is not lowered.
    """

    def __init__(self, builder: Builder, env: dict[fx.Node, Any]):
        self.builder, self.env = builder, env
        self.errors: list[UnsupportedError] = []
        self.unknown = 0
        self.lost: set[fx.Node] = set()

    def can_lower(self, node: fx.Node) -> bool:
        """Returns whether a node has a rule and all its arguments. A node without a rule is noted."""
        if not (is_structural(node) or str(node.target) in RULES or is_constant(node)):
            self.unknown += 1
            self.add(node, self.builder.unsupported(REFUSALS.get(str(node.target), "")))
            return False
        if self.lost.isdisjoint(node.all_input_nodes):
            return True
        self.lost.add(node)
        return False

    def add(self, node: fx.Node, error: UnsupportedError) -> None:
        """Notes why a node cannot be lowered."""
        self.errors.append(error)
        results = pytree.tree_leaves(node.meta.get("val"))
        if any(not isinstance(one, Tensor) or any(map(free_unbacked_symbols, one.shape)) for one in results):
            self.lost.add(node)
            return
        made_up = lambda one: self.builder.new(Ref(node.name), sizes(one.shape), one.dtype)  # noqa: E731
        self.env[node] = pytree.tree_map(made_up, node.meta["val"])

    def raise_if_any(self) -> None:
        """Checks that no node was refused.

        **Raises:** `UnsupportedError` naming all refused nodes.
        """
        if len(self.errors) == 1 and not self.unknown:
            raise self.errors[0]
        if self.errors:
            name, which = type(self.builder.captured.model).__name__, "cannot be carried exactly"
            if self.unknown:
                which = "have no rule" if self.unknown == len(self.errors) else f"have no rule, or {which}"
            listing = "\n".join(f"  {line}" for line in dict.fromkeys(error.details for error in self.errors))
            raise UnsupportedError(
                f"{name} uses operations that {which}:\n{listing}\nWrite the forward with other operations"
                + (", or register a rule with torch_bridge.register." if self.unknown else ".")
            )
