"""The arguments of one call that a network is captured with, and which of their dimensions stay open."""

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from jaxensemble.errors import InputError
from torch_bridge.compat import pytree

BatchAxis = int | None | tuple[int | None, ...]


def prepared(example_inputs: tuple[Any, ...], batch_axis: BatchAxis) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The inputs to export with, and which of their dimensions are dynamic.

    A batch of one is doubled: `torch.export` takes sizes 0 and 1 for constants.
    """
    if not isinstance(example_inputs, tuple) or not example_inputs:
        raise InputError(
            f"`example_inputs` must be a tuple with the positional arguments of one call; got "
            f"{type(example_inputs).__name__}. For a single tensor x, pass (x,)."
        )
    others = [
        f"{type(leaf).__name__} in input {k}"
        for k, value in enumerate(example_inputs)
        for leaf in pytree.tree_leaves(value)
        if not isinstance(leaf, Tensor)
    ]
    if others:
        raise InputError(
            f"`example_inputs` must hold tensors only, since anything else would be fixed in the ported network; got "
            f"{', '.join(others)}. Leave it out where it has a default, or fix it in a module around this one."
        )
    axes = batch_axis if isinstance(batch_axis, tuple) else (batch_axis,) * len(example_inputs)
    if len(axes) != len(example_inputs):
        raise InputError(
            f"`batch_axis` must hold one axis for each of the {len(example_inputs)} example inputs; got {len(axes)}."
        )
    if not all(axis is None or (isinstance(axis, int) and axis >= 0) for axis in axes):
        raise InputError(
            f"`batch_axis` must be None or an axis counted from 0, or one for each input; got {batch_axis!r}."
        )
    size = _batch_size(example_inputs, axes, explicit=isinstance(batch_axis, tuple))
    if size is None and any(axes):
        raise InputError(f"`batch_axis` is {batch_axis!r}, but no example input has as many axes.")
    batch = Dim("batch")
    pairs = [
        pytree.tree_map(lambda leaf, axis=axis: _with_batch(leaf, axis, size, batch), value)
        for value, axis in zip(example_inputs, axes, strict=True)
    ]
    is_pair = lambda node: isinstance(node, _Example)  # noqa: E731
    return (
        tuple(pytree.tree_map(lambda pair: pair.value, pair, is_leaf=is_pair) for pair in pairs),
        tuple(pytree.tree_map(lambda pair: pair.dynamic, pair, is_leaf=is_pair) for pair in pairs),
    )


@dataclasses.dataclass(frozen=True)
class _Example:
    value: Any
    dynamic: Any


def _with_batch(leaf: Tensor, axis: int | None, size: int | None, batch: Any) -> _Example:
    leaf = leaf.detach()
    if axis is None or leaf.ndim <= axis or leaf.shape[axis] != size:
        return _Example(leaf, {})
    if size == 1:
        leaf = torch.cat([leaf, leaf], axis)
    return _Example(leaf, {axis: batch})


def _batch_size(inputs: tuple[Any, ...], axes: tuple[int | None, ...], *, explicit: bool) -> int | None:
    """The one batch size of the inputs: the first tensor's; other inputs of another size have no batch."""
    sizes = [
        (index, leaf.shape[axis])
        for index, (value, axis) in enumerate(zip(inputs, axes, strict=True))
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, Tensor) and axis is not None and leaf.ndim > axis
    ]
    if explicit and len({size for _, size in sizes}) > 1:
        listing = ", ".join(f"input {index}: {size}" for index, size in sizes)
        raise InputError(f"the batch sizes along `batch_axis` must be equal; got {listing}.")
    return sizes[0][1] if sizes else None


def by_parameter(model: nn.Module, dynamic: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry for each parameter of the forward: those that `*args` takes are one tuple, if there are any."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    starred = next((k for k, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), None)
    if starred is None or starred >= len(dynamic):
        return dynamic
    return (*dynamic[:starred], tuple(dynamic[starred:]))
