"""Inputs of comparisons: with other batch sizes, for each member, and as the ensemble takes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bridge.compat import pytree
from torch_bridge.graph.examples import Arguments, BatchAxis, axes_of, map_tensors
from torch_bridge.graph.forward import Inputs
from torch_bridge.members.finite import has_fractions


def ensemble_inputs(inputs: Inputs, layout: str) -> tuple[Any, ...]:
    """PyTorch's inputs by position, as an ensemble with this `input_layout` takes them."""
    entries = Arguments.of(inputs).entries
    if layout == "torch":
        return entries
    return map_tensors(lambda x: x.movedim(1, -1) if x.ndim >= 3 else x, entries)


def stack_inputs(inputs_per_member: Sequence[Inputs]) -> Any:
    """Inputs `[M, ...]` from the inputs of every member. Arguments that are not tensors are the same for all."""
    return pytree.tree_map(lambda *xs: torch.stack(xs) if isinstance(xs[0], Tensor) else xs[0], *inputs_per_member)


def resize_inputs(inputs: Inputs, size: int, batch_axis: BatchAxis, seed: int = 0) -> Arguments:
    """Inputs with another batch size: rows taken in turn. Floating-point rows are scaled so that no two are equal."""
    inputs = Arguments.of(inputs)
    axes = axes_of(inputs, batch_axis)
    given = batch_size(inputs, batch_axis)
    generator = torch.Generator().manual_seed(seed)

    def resize(x: Any, axis: int | None) -> Any:
        if not isinstance(x, Tensor) or axis is None or x.ndim <= axis or x.shape[axis] != given:
            return x
        rows = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
        if not has_fractions(x):
            return rows
        shape = [size if k == axis else 1 for k in range(x.ndim)]
        scale = torch.rand(shape, generator=generator, dtype=torch.float64).to(x)
        return rows * (0.75 + 0.5 * scale)

    pairs = zip(inputs.entries, axes, strict=True)
    return inputs.replaced([pytree.tree_map(lambda x, axis=axis: resize(x, axis), value) for value, axis in pairs])


def batch_size(inputs: Inputs, batch_axis: BatchAxis) -> int | None:
    """The size of the batch axis, taken from the first tensor that has this axis."""
    arguments = Arguments.of(inputs)
    for value, axis in zip(arguments.entries, axes_of(arguments, batch_axis), strict=True):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and axis is not None and leaf.ndim > axis:
                return leaf.shape[axis]
    return None


def inputs_per_member(inputs: Inputs, members: int, batch_axis: BatchAxis) -> list[Inputs]:
    """Inputs of equal shapes for each member."""
    size = batch_size(inputs, batch_axis)
    if size is None:
        return [pytree.tree_map(lambda x, k=k: _scale(x, 1 + 0.1 * k), inputs) for k in range(members)]
    return [resize_inputs(inputs, size, batch_axis, seed=k + 1) for k in range(members)]


def _scale(x: Any, factor: float) -> Any:
    """A floating-point tensor times a factor. Other arguments stay as they are."""
    return x * factor if isinstance(x, Tensor) and has_fractions(x) else x
