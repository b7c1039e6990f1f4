"""Comparison of two programs of one forward: one for open sizes, and one for specified sizes."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from torch_bridge.compat import pytree
from torch_bridge.graph.nodes import has_tensors
from torch_bridge.graph.stand_ins import NAMES, Mode, all_args, stand_in, stand_in_args

Valued: TypeAlias = Callable[[Any], Any]
"""Function from an expression in open sizes to its value for specified sizes."""


_SLICE = torch.ops.aten.slice.Tensor


def has_same_steps(program: ExportedProgram, of_some: ExportedProgram, value: Valued) -> bool:
    """Returns whether a program for open sizes does the same for some sizes as `of_some`, the program for these."""
    (ours, whole), (theirs, others_whole) = _steps(program, value), _steps(of_some, value)
    twins: dict[Any, fx.Node] = dict(zip(ours, theirs, strict=False))
    twins |= {node: twins.get(source, source) for node, source in whole.items()}
    return len(ours) == len(theirs) and all(
        _is_twin(node, twins[node], twins, others_whole, value) for node in ours if node.op != "placeholder"
    )


def _steps(program: ExportedProgram, value: Valued) -> tuple[list[fx.Node], dict[Any, fx.Node]]:
    """Returns the operations on tensors, and separately the slices that cover their whole operand."""
    steps: list[fx.Node] = []
    whole: dict[Any, Any] = {}
    for node in filter(has_tensors, program.graph.nodes):
        if node.target == torch.ops.aten.alias.default or (node.target == _SLICE and _is_whole(node, value)):
            whole[node] = whole.get(node.args[0], node.args[0])
        else:
            steps.append(node)
    return steps, whole


def _is_whole(node: fx.Node, value: Valued) -> bool:
    x, dim, start, end, step = (number_of(argument, value) for argument in all_args(node))
    return start in (None, 0) and step == 1 and (end is None or end >= number_of(x.shape[dim], value))


def _is_twin(
    node: fx.Node, twin: fx.Node, twins: Mapping[Any, fx.Node], others_whole: Mapping[Any, fx.Node], value: Valued
) -> bool:
    """Returns whether two nodes have the same arguments, and results of the same ranks (`squeeze` may differ)."""
    name = NAMES.get(twin.target)
    given: Any = (twin.args, twin.kwargs)
    if name is not None and node.target == stand_in(name):  # a recurrent layer of open length
        given = (stand_in_args(name, all_args(twin), Mode(node.args[-1])), {})  # type: ignore[arg-type]
    elif node.target != twin.target:
        return False
    ours, theirs = (pytree.tree_leaves(each) for each in ((node.args, node.kwargs), given))
    if node.target == _SLICE:
        ours, theirs = ([entry or 0 for entry in all_args(each)] for each in (node, twin))  # None is the start, too
    return (
        _ranks(node) == _ranks(twin)
        and len(ours) == len(theirs)
        and all(
            twins[a] is others_whole.get(b, b) if a in twins else number_of(a, value) == b
            for a, b in zip(ours, theirs, strict=True)
        )
    )


def number_of(argument: Any, value: Valued) -> Any:
    """Returns the value of an argument that may be computed from open sizes."""
    val = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    return value(val.node.expr) if isinstance(val, torch.SymInt | torch.SymFloat) else val


def _ranks(node: fx.Node) -> list[int]:
    return [leaf.ndim for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
