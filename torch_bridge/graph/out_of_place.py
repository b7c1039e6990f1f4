"""Which results of a captured graph may share memory, and how arrays lie in it."""

import torch
from torch import fx
from torch.export import ExportedProgram

from torch_bridge.compat import writes

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


def without_memory_formats(*programs: ExportedProgram) -> bool:
    """Removes `contiguous` from graphs where nothing writes into the array. Returns whether any graph has changed.

    The exporter itself drops `contiguous` of an array that is contiguous already. In PyTorch 2.11, that of attention's
    result is dropped in evaluation only. A `view` may need the removed operation; a `reshape` does not.
    """
    changed = [_remove_formats(program.graph_module) for program in programs]
    return any(changed)


def _remove_formats(module: fx.GraphModule) -> bool:
    unwritten = _unwritten(module.graph)
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
    """Whether the graph returns a node, which its signature then knows by name."""
    return any(user.op == "output" for user in node.users)


def _unwritten(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose memory no node writes into. What is not known to have memory of its own shares its inputs'."""
    parents: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while node in parents:
            node = parents[node]
        return node

    for node in graph.nodes:
        for given in () if node.target in OWN_MEMORY or node.op == "output" else node.all_input_nodes:
            if root(given) is not root(node):
                parents[root(given)] = root(node)
    written = {root(node) for node in graph.nodes if writes(node)}
    return [node for node in graph.nodes if root(node) not in written]
