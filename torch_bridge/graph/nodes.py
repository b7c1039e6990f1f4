"""Nodes of a graph: their values, and the user's lines behind them."""

import torch
from torch import Tensor, fx

from torch_bridge.compat import pytree


def is_size(node: fx.Node) -> bool:
    """Returns whether a node's value is an open size."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def has_tensors(node: fx.Node) -> bool:
    """Returns whether there is a tensor among a node's values."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def source_line(node: fx.Node) -> str | None:
    """Returns the user's line behind a node, `file.py:12: x = self.fc(x)`, or None if torch did not record it."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for k in range(len(trace) - 1, -1, -1):
        if trace[k].startswith("File ") and "/torch/nn/" not in trace[k]:
            file, line = trace[k].split(", ")[:2]
            code = f": {trace[k + 1]}" if k + 1 < len(trace) else ""
            return f"{file[6:-1].rsplit('/', 1)[-1]}:{line.removeprefix('line ')}{code}"
    return None
