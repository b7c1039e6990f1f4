"""Comparisons of nodes in two graphs of one forward."""

from typing import Any

import torch
from torch import Tensor, fx

from torch_bridge.compat import map_aggregate
from torch_bridge.graph.nodes import is_size
from torch_bridge.graph.stand_ins import (
    FLAGGED,
    all_args,
    stand_in,
)

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def attention_rate(node: fx.Node) -> float:
    """Returns the rate of dropout in an attention."""
    return float(all_args(node)[FLAGGED["attention"][1]])


def has_reversed_flag(node: fx.Node, twin: fx.Node) -> bool:
    """Returns whether a stand-in is in training mode in the evaluation graph only."""
    return is_stand_in(node) and (node.args[-1], twin.args[-1]) == ("always", "never")


def is_stand_in(node: fx.Node) -> bool:
    """Returns whether a node is a stand-in for an operation with a mode. The mode is its last argument."""
    return any(node.target is stand_in(name) for name in FLAGGED)


def all_arguments(node: fx.Node) -> Any:
    return (node.args, dict(node.kwargs))


def nodes_in(tree: Any) -> list[fx.Node]:
    """Returns the nodes among the leaves of a tree, in order."""
    found: list[fx.Node] = []
    map_aggregate(tree, lambda leaf: found.append(leaf) if isinstance(leaf, fx.Node) else None)
    return found


def node_key(node: fx.Node) -> str:
    """Returns text that is equal for nodes that do the same at the same place, whatever their training flags."""
    args = list(node.args)
    if is_stand_in(node):
        args[-1] = None
    kwargs = dict(node.kwargs)
    if node.target is ATTENTION:
        args, kwargs = all_args(node), {}
        args[FLAGGED["attention"][1]] = None
    described = map_aggregate((args, kwargs), _describe_leaf)
    scope = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]
    return repr((str(node.target), scope, described, map_aggregate(node.meta["val"], _describe_leaf)))


def _describe_leaf(leaf: Any) -> str:
    if isinstance(leaf, fx.Node):
        return (
            f"size {leaf.meta['val']}" if is_size(leaf) else repr(map_aggregate(leaf.meta.get("val"), _describe_leaf))
        )
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {[str(size) for size in leaf.shape]}"
    return repr(leaf)


def has_same_result(node: fx.Node, twin: fx.Node) -> bool:
    """Returns whether two nodes give a tensor of one dtype and shape."""
    a, b = node.meta.get("val"), twin.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and _describe_leaf(a) == _describe_leaf(b)


def is_same_tensor(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have one dtype, one shape and equal values."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
