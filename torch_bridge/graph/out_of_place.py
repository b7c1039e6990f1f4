"""Memory of a captured graph's results: operations in place, and memory formats."""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from torch_bridge.compat import (
    is_mutating,
)
from torch_bridge.graph.stand_ins import stand_in

_ATEN = torch.ops.aten

OWN_MEMORY = {
    *(getattr(getattr(_ATEN, f"conv{n}d"), overload) for n in (1, 2, 3) for overload in ("default", "padding")),
    _ATEN.linear.default,
    _ATEN.add.Tensor,
    _ATEN.mul.Tensor,
    _ATEN.cat.default,
    _ATEN.scaled_dot_product_attention.default,
}
"""Operations whose result is memory that nothing else refers to."""


def remove_memory_formats(*programs: ExportedProgram) -> bool:
    """Removes `contiguous` from graphs where nothing writes into the array. Returns whether any graph has changed.

    The exporter itself drops `contiguous` of a contiguous array. PyTorch 2.11 drops it after attention in evaluation
    only. A `view` may need the removed operation, so it becomes a `reshape`.
    """
    changed = [_remove_formats(program.graph_module) for program in programs]
    return any(changed)


def _remove_formats(module: fx.GraphModule) -> bool:
    unwritten = _unwritten_nodes(module.graph)
    removed = False
    for node in unwritten:
        if node.target == _ATEN.view.default:
            node.target = _ATEN.reshape.default
        elif node.target == _ATEN.contiguous.default and not _is_output(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
            removed = True
    module.recompile()
    return removed


def _is_output(node: fx.Node) -> bool:
    """Returns whether a graph returns a node. The graph's signature then has its name."""
    return any(user.op == "output" for user in node.users)


def _unwritten_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes whose memory no node writes into. Nodes outside `OWN_MEMORY` may share that of their inputs."""
    parents: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while node in parents:
            node = parents[node]
        return node

    for node in graph.nodes:
        for given in () if node.target in OWN_MEMORY or node.op == "output" else node.all_input_nodes:
            if root(given) is not root(node):
                parents[root(given)] = root(node)
    written = {root(node) for node in graph.nodes if is_mutating(node)}
    return [node for node in graph.nodes if root(node) not in written]


_ATEN = torch.ops.aten


_OUT_OF_PLACE = {
    getattr(_ATEN, f"{name}_").default: getattr(_ATEN, name).default
    for name in ("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "leaky_relu", "elu", "sigmoid", "tanh", "mish")
} | {_ATEN.add_.Tensor: _ATEN.add.Tensor}
"""Frequent operations in place, and the same out of place."""


def write_out_of_place(module: fx.GraphModule) -> None:
    """Writes `relu_(conv(x))` as `relu(conv(x))` where nothing else uses the operand.

    Torch's own functionalisation gives the same result, and would take most of the time of porting.
    """
    own_memory = OWN_MEMORY | {stand_in("batch_norm")}
    for node in module.graph.nodes:
        operand = node.args[0] if node.target in _OUT_OF_PLACE else None
        if (
            isinstance(operand, fx.Node)
            and operand.target in own_memory | set(_OUT_OF_PLACE.values())
            and list(operand.users) == [node]
            and all(_has_same_type(other, node) for other in node.all_input_nodes)
        ):
            node.target = _OUT_OF_PLACE[node.target]
    module.recompile()


def _has_same_type(node: fx.Node, other: fx.Node) -> bool:
    """Returns whether two results have one shape and dtype, so that nothing is broadcast or promoted."""
    a, b = node.meta["val"], other.meta["val"]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.dtype == b.dtype and [str(size) for size in a.shape] == [str(size) for size in b.shape]
