"""Whether two programs of one forward are alike: that for open sizes, and another for some of those alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from torch_bridge.compat import pytree
from torch_bridge.modes import has_tensors


def is_same(program: ExportedProgram, of_one: ExportedProgram, value: Callable[[Any], Any]) -> bool:
    """Whether a program for open sizes does for the least ones what the other, made for those alone, does.

    `value` says what an expression in open sizes is then.
    """
    ours, theirs = ([node for node in each.graph.nodes if has_tensors(node)] for each in (program, of_one))
    if len(ours) != len(theirs):
        return False
    twins = dict(zip(ours, theirs, strict=True))
    return all(node.target == twin.target and _alike(node, twin, twins, value) for node, twin in twins.items())


def _alike(node: fx.Node, twin: fx.Node, twins: dict[fx.Node, fx.Node], value: Callable[[Any], Any]) -> bool:
    """Whether two nodes have the same arguments, and results with as many dimensions, of which `squeeze` drops some."""
    if node.op == "placeholder":
        return True
    ours, theirs = (pytree.tree_leaves((each.args, each.kwargs)) for each in (node, twin))
    return (
        _ranks(node) == _ranks(twin)
        and len(ours) == len(theirs)
        and all(twins[a] is b if a in twins else _number(a, value) == b for a, b in zip(ours, theirs, strict=True))
    )


def _number(argument: Any, value: Callable[[Any], Any]) -> Any:
    """What an argument that may be computed from open sizes is."""
    val = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    return value(val.node.expr) if isinstance(val, torch.SymInt | torch.SymFloat) else val


def _ranks(node: fx.Node) -> list[int]:
    return [leaf.ndim for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
