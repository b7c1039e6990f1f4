"""Operations that PyTorch has only below its autograd, written by operations that a forward calls."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torch_bridge.compat import (
    decompositions_below_autograd,
)
from torch_bridge.graph.operations import Operations

_ATEN = torch.ops.aten


def _cdist_backward(gradient: Tensor, x: Tensor, y: Tensor, p: float, distances: Tensor) -> Any:
    if p != 2:
        return NotImplemented
    share = torch.where(distances == 0, 0, gradient / distances)
    return (share.unsqueeze(-1) * (x.unsqueeze(-2) - y.unsqueeze(-3))).sum(-2)


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Computes `nn.Bilinear` and its backward: a sum of products of three arrays, each without some dimensions."""
    rank = a.ndim + len(expand1)
    kept = lambda left_out: [k for k in range(rank) if k not in left_out]  # noqa: E731
    return torch.einsum(a, kept(expand1), b, kept(expand2), c, kept(expand3), kept(sumdim))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _ATEN._cdist_backward.default: _cdist_backward,
    _ATEN._trilinear.default: _trilinear,
}
"""Decompositions that are missing in torch's table, by the same keys."""

_FORWARDS: dict[Any, Any] = {
    _ATEN._cdist_forward.default: _ATEN.cdist.default,
    _ATEN._linalg_det.default: _ATEN.linalg_det.default,
    _ATEN._linalg_slogdet.default: _ATEN.linalg_slogdet.default,
}
"""Operations that were called, by the ones that also return results for their own backward."""


def simplify_trace(graph: fx.Graph) -> None:
    """Writes a trace by operations that a forward calls, where only their results are used."""
    for node in list(graph.nodes):
        if node.target is _ATEN._linalg_check_errors.default:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is _ATEN._new_zeros_with_same_feature_meta.default:
            node.target, node.kwargs = _ATEN.new_zeros.default, {}
            node.args = (node.args[0], list(node.meta["val"].shape))
        elif node.target is _ATEN._linalg_solve_ex.default:
            _solve(graph, node)
        elif node.target in _FORWARDS:
            _forward(graph, node)
    graph.eliminate_dead_code()


def _forward(graph: fx.Graph, node: fx.Node) -> None:
    taken: set[Any] = {user.args[1] for user in node.users if user.target is operator.getitem}  # type: ignore[misc]
    several = len(_FORWARDS[node.target]._schema.returns) > 1
    if taken <= {0, 1} if several else taken <= {0}:
        node.target = _FORWARDS[node.target]
        for user in list(node.users):
            if not several and user.target is operator.getitem:
                user.replace_all_uses_with(node)
                graph.erase_node(user)


def _solve(graph: fx.Graph, node: fx.Node) -> None:
    """Writes `linalg_solve`, and its backward by the factors, which solves with the transposed matrix."""
    matrix, sides = node.args[:2]
    left = node.kwargs.get("left", True)
    for part in list(node.users):
        with graph.inserting_after(node):
            if part.args[1] == 0:
                new = graph.call_function(_ATEN.linalg_solve.default, (matrix, sides), {"left": left})
                new.meta = dict(part.meta)
                part.replace_all_uses_with(new)
        for user in list(part.users):
            if user.target is _ATEN.linalg_lu_solve.default and part.args[1] == 1:
                with graph.inserting_before(user):
                    given = graph.call_function(_ATEN.mT.default, (matrix,)) if user.kwargs.get("adjoint") else matrix
                    options = {"left": user.kwargs.get("left", True)}
                    new = graph.call_function(_ATEN.linalg_solve.default, (given, user.args[2]), options)
                user.replace_all_uses_with(new)


def decompositions_for(operations: Operations) -> dict[Any, Any]:
    """Returns the decompositions, below autograd, of operations that have no rule."""
    every = {**decompositions_below_autograd(), **DECOMPOSITIONS}
    return {target: way for target, way in every.items() if not operations.knows(target)}
