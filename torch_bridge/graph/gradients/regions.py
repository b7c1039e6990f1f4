"""Regions of a forward under `torch.no_grad`, `torch.enable_grad` or `torch.autocast`.

`torch.export` keeps each region as a separate module. Here regions become part of the graph around them, and the
results of a region without gradients are detached.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from jaxensemble.errors import UnsupportedError

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_REGIONS = (_SET_GRAD, _AUTOCAST, _CHECKPOINT)


class _Region(NamedTuple):
    """A region's body, its operands, and whether its results are detached."""

    body: fx.GraphModule
    operands: Sequence[Any]
    detached: bool


def inline_regions(module: fx.GraphModule) -> None:
    """Replaces every region, nested ones too, by its nodes.

    **Raises:** `UnsupportedError` for a region under `torch.autocast`, whose casts depend on PyTorch's own lists.
    """
    while regions := [node for node in module.graph.nodes if node.target in _REGIONS]:
        for node in regions:
            _inline(module, node, _region(module, node))
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    module.recompile()


def _region(module: fx.GraphModule, node: fx.Node) -> _Region:
    if node.target is _SET_GRAD:
        enabled, body, *operands = node.args
        return _Region(_body(module, body), operands, not enabled)
    if node.target is _CHECKPOINT:
        body, *operands = node.args
        return _Region(_body(module, body), operands, False)
    device, dtype, enabled, _, body, *operands = node.args
    if enabled:
        raise UnsupportedError(
            f"a part of the forward runs under torch.autocast({device!r}, dtype={dtype}), which casts by PyTorch's own "
            "lists of operations; port the model without it, and use ensemble.astype for another precision."
        )
    return _Region(_body(module, body), operands, False)


def _body(module: fx.GraphModule, node: Any) -> fx.GraphModule:
    return getattr(module, node.target)


def _inline(module: fx.GraphModule, node: fx.Node, region: _Region) -> None:
    graph = module.graph
    operands = iter(region.operands)
    copies: dict[fx.Node, Any] = {}
    own: set[fx.Node] = set()  # computed here, not in a nested region

    def result(inner: Any) -> Any:
        """Returns the value that leaves the region, or that enters a nested one."""
        copy = copies[inner] if isinstance(inner, fx.Node) else inner
        return _add_detach(graph, copy) if region.detached and inner in own else copy

    results: Sequence[Any] = ()
    with graph.inserting_before(node):
        for inner in region.body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(operands)
            elif inner.op == "output":
                results = [result(leaf) for leaf in inner.args[0]]
            elif inner.op == "get_attr":
                name = f"{node.name}_{inner.target}"
                setattr(module, name, getattr(region.body, str(inner.target)))
                copies[inner] = graph.get_attr(name)
            elif inner.target in _REGIONS:
                copies[inner] = graph.node_copy(inner, result)
            else:
                copies[inner] = graph.node_copy(inner, lambda given: copies[given])
                if inner.target is not operator.getitem or inner.args[0].target not in _REGIONS:
                    own.add(inner)
    for user in list(node.users):
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(node)


def _add_detach(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), Tensor):
        return node
    new = graph.call_function(torch.ops.aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new
