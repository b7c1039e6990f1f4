"""Programs without side effects, of operations that have a rule."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from jaxensemble.errors import UnsupportedError, describe_error
from torch_bridge.compat import (
    decomposition_table,
    fix_complex_means,
    is_mutating,
)
from torch_bridge.graph.nodes import has_tensors
from torch_bridge.graph.operations import Operations
from torch_bridge.graph.settings import ignore_torch_warnings


def is_whole(program: ExportedProgram, operations: Operations) -> bool:
    """Whether nothing has to be taken apart, as in most networks: it would take longer than all else."""
    return _is_functional(program.graph) and all(operations.knows(node.target) for node in _computing(program.graph))


def decompose(model: nn.Module, program: ExportedProgram, operations: Operations) -> ExportedProgram:
    """The graph without side effects. Operations that have no rule are taken apart, as far as torch knows how."""
    table: dict[Any, Any] = {}
    whole: ExportedProgram | None = None
    known = torch.export.default_decompositions()
    known.update(operations.decompositions)
    while True:
        with ignore_torch_warnings(), fix_complex_means():
            try:
                program = program.run_decompositions(dict(table))
            except Exception as error:  # as of a forward that sets a tensor's storage
                raise UnsupportedError(
                    f"torch.export cannot write {type(model).__name__}.forward without side effects: "
                    f"{describe_error(error)}",
                    details=str(error),
                ) from error
        unruled = {node.target for node in _computing(program.graph) if not operations.knows(node.target)}
        new = unruled - set(table)
        more = {target: known[target] for target in new if target in known}
        if not more:  # by what PyTorch has for other compilers, if that leads anywhere
            if any(str(target).startswith("prims.") for target in unruled):
                return whole or program
            whole = whole or program
            more = {target: decomposition_table[target] for target in new if target in decomposition_table}
        if not more:
            return program
        table |= more


def _is_functional(graph: fx.Graph) -> bool:
    return not any(map(is_mutating, graph.nodes))


def _computing(graph: fx.Graph) -> Iterator[fx.Node]:
    """The operations on tensors that depend on some input or weight; all others are folded."""
    depending = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not depending.isdisjoint(node.all_input_nodes):
            depending.add(node)
            if node.op == "call_function" and node.target is not operator.getitem and has_tensors(node):
                yield node
