"""Lengths of sequences for which tables of embeddings have a row for every place."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from jaxensemble.network.network import Sizes
from torch_bridge.compat import pytree
from torch_bridge.graph.nodes import has_tensors
from torch_bridge.graph.sizes.likeness import number_of

Valued = Callable[[Any, Mapping[str, int]], Any]
"""Function from an expression in open sizes, and sizes by name, to its value."""


def limit_to_tables(
    program: ExportedProgram, limits: Mapping[str, Sizes], given: Mapping[str, int], value: Valued
) -> dict[str, Sizes]:
    """Narrows limits so that every index made of open sizes only, such as `torch.arange(x.shape[1])`, has a row.

    PyTorch refuses larger indices, but the exporter does not say so. `given` are the sizes of the example.
    """
    found = dict(limits)
    for index, rows in _lookups(program):
        for name, sizes in limits.items():
            has_rows = functools.partial(_has_rows, index, rows, name, given, value)
            inside, outside = given[name], 2 * max(rows, given[name]) + 2
            if has_rows(outside):
                continue
            while outside - inside > 1:
                middle = (inside + outside) // 2
                inside, outside = (middle, outside) if has_rows(middle) else (inside, middle)
            most = inside // sizes.multiple * sizes.multiple
            found[name] = dataclasses.replace(found[name], most=min(found[name].most or most, most))
    return found


def _lookups(program: ExportedProgram) -> Iterator[tuple[fx.Node, int]]:
    """Yields indices of embeddings that are computed from sizes only, and the number of rows for them."""
    from_inputs: set[fx.Node] = set()
    for node in program.graph.nodes:
        if has_tensors(node) and (node.op != "call_function" or not from_inputs.isdisjoint(node.all_input_nodes)):
            from_inputs.add(node)
        if node.target == torch.ops.aten.embedding.default and node.args[1] not in from_inputs:
            yield node.args[1], int(node.args[0].meta["val"].shape[0])


def _has_rows(index: fx.Node, rows: int, name: str, given: Mapping[str, int], value: Valued, size: int) -> bool:
    """Returns whether all places have a row if the open size `name` is `size`."""
    places = _compute_value(index, lambda expression: value(expression, {**given, name: size}))
    return not places.numel() or (int(places.min()) >= 0 and int(places.max()) < rows)


def _compute_value(node: fx.Node, value: Callable[[Any], Any]) -> Tensor:
    def argument(leaf: Any) -> Any:
        return (
            _compute_value(leaf, value) if isinstance(leaf, fx.Node) and has_tensors(leaf) else number_of(leaf, value)
        )

    args, kwargs = pytree.tree_map(argument, (node.args, dict(node.kwargs)))
    with torch.random.fork_rng(devices=[]):  # a place may be random
        return node.target(*args, **kwargs)  # type: ignore[operator]
