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
    """Returns whether nothing has to be decomposed, as in most networks: decomposing is the slowest step."""
    return _is_functional(program.graph) and all(operations.knows(node.target) for node in _computing(program.graph))


def decompose(model: nn.Module, program: ExportedProgram, operations: Operations) -> ExportedProgram:
    """Returns the program without side effects. Operations without a rule are decomposed as far as PyTorch can.

    **Raises:** `UnsupportedError` if PyTorch cannot remove the side effects.
    """
    table: dict[Any, Any] = {}
    whole: ExportedProgram | None = None
    known = torch.export.default_decompositions()
    known.update(operations.decompositions)
    while True:
        with ignore_torch_warnings(), fix_complex_means():
            try:
                program = program.run_decompositions(dict(table))
            except Exception as error:  # for example, a forward that sets a tensor's storage
                raise UnsupportedError(
                    f"torch.export cannot write {type(model).__name__}.forward without side effects: "
                    f"{describe_error(error)}",
                    details=str(error),
                ) from error
        unruled = {node.target for node in _computing(program.graph) if not operations.knows(node.target)}
        new = unruled - set(table)
        more = {target: known[target] for target in new if target in known}
        if not more:  # try the decompositions that PyTorch has for other compilers
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
    """Yields the operations on tensors that depend on an input or a weight. All others are folded."""
    depending = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not depending.isdisjoint(node.all_input_nodes):
            depending.add(node)
            if node.op == "call_function" and node.target is not operator.getitem and has_tensors(node):
                yield node
