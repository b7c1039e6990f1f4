"""Traces of one forward for several batch sizes, combined into one trace for every size."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torch_bridge.compat import pytree


class TracesDiffer(Exception):
    """Traces that are not instances of one trace. The text says why."""


_OTHER = "it computes differently for some batch sizes"


def generalise_traces(traces: Sequence[fx.GraphModule], place: int, axis: int) -> None:
    """Makes the first of some traces right for every batch: numbers that differ are computed from the batch's size.

    **Arguments:**

    - `place`: the position of an input, counted from the end; the last one is 1.
    - `axis`: the batch axis of this input.

    **Raises:** `TracesDiffer` if traces differ in other ways, or in numbers that are no simple functions of the size.
    """
    graph, rows = traces[0].graph, [list(trace.graph.nodes) for trace in traces]
    if len({len(nodes) for nodes in rows}) > 1:
        raise TracesDiffer(_OTHER)
    inputs = [[node for node in nodes if node.op == "placeholder"] for nodes in rows]
    sizes = [int(nodes[-place].meta["val"].shape[axis]) for nodes in inputs]
    with graph.inserting_after(inputs[0][-1]):
        size = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0][-place], axis))
    made: dict[tuple[Any, ...], fx.Node] = {}
    twins: list[dict[Any, fx.Node]] = [{} for _ in rows]
    for same in zip(*rows, strict=True):
        _check(traces, same)
        flat = [pytree.tree_flatten((node.args, node.kwargs)) for node in same]
        if len({str(spec) for _, spec in flat}) > 1:
            raise TracesDiffer(_OTHER)
        leaves: list[Any] = []
        for values in zip(*[leaves for leaves, _ in flat], strict=True):
            if isinstance(values[0], fx.Node):
                if any(known.get(value) is not values[0] for known, value in zip(twins, values, strict=True)):
                    raise TracesDiffer(_OTHER)
            elif not all(_is_equal(value, values[0]) for value in values):
                if values not in made:
                    with graph.inserting_before(same[0]):
                        made[values] = _compute_number(graph, size, sizes, values)
                leaves.append(made[values])
                continue
            leaves.append(values[0])
        args, kwargs = pytree.tree_unflatten(leaves, flat[0][1])
        same[0].args, same[0].kwargs = tuple(args), kwargs
        for known, node in zip(twins, same, strict=True):
            known[node] = same[0]
    traces[0].recompile()


def _check(traces: Sequence[fx.GraphModule], nodes: Sequence[fx.Node]) -> None:
    if len({(node.op, str(node.target)) for node in nodes}) > 1:
        raise TracesDiffer(_OTHER)
    if nodes[0].op == "get_attr":
        tensors = [getattr(trace, str(node.target)) for trace, node in zip(traces, nodes, strict=True)]
        first = tensors[0]
        if all(x.shape == first.shape and torch.equal(x, first) for x in tensors):
            return
        fill = first.flatten()[0].item()
        if not all(x.dtype == first.dtype and x.ndim == first.ndim and bool((x == fill).all()) for x in tensors):
            raise TracesDiffer("it makes a tensor of the batch's size from Python numbers")
        for node, x in zip(nodes, tensors, strict=True):
            node.op, node.target = "call_function", torch.ops.aten.full.default
            node.args, node.kwargs = (list(x.shape), fill), {"dtype": x.dtype}


def _is_equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or repr(a) == repr(b))


def _compute_number(graph: fx.Graph, size: fx.Node, sizes: Sequence[int], values: Sequence[Any]) -> fx.Node:
    """Computes a number from the batch's size, as a product, a sum or a quotient that fits all its values."""
    (n, m, *_), (a, b, *_) = sizes, values
    pairs = list(zip(sizes, values, strict=True))
    if all(isinstance(value, int) for value in values) and (b - a) % (m - n) == 0:
        slope = (b - a) // (m - n)
        rest = a - slope * n
        if all(value == slope * number + rest for number, value in pairs):
            product = size if slope == 1 else graph.call_function(operator.mul, (size, slope))
            return product if rest == 0 else graph.call_function(operator.add, (product, rest))
        factor = a // n**2
        if all(value == factor * number**2 for number, value in pairs):
            square = graph.call_function(operator.mul, (size, size))
            return square if factor == 1 else graph.call_function(operator.mul, (square, factor))
    if all(isinstance(value, float) for value in values):
        whole = round(a * n)
        if all(value == whole / number for number, value in pairs):
            return graph.call_function(operator.truediv, (whole, size))
    raise TracesDiffer(f"a number that is {', '.join(map(str, values))} for batches of {', '.join(map(str, sizes))}")
