"""Permutations between PyTorch's and Flax's order of the elements along an axis, read off the records of [`Axis`][]."""

import math
from collections.abc import Sequence

import numpy as np

from torch_bridge.state_dicts.axes import Axis


class Unclear(Exception):
    """The order along an axis is not known. The text says why."""


def permutation(axis: Axis, inside: tuple[Axis, ...] = ()) -> np.ndarray | None:
    """Returns the position along PyTorch's axis for each position along Flax's; None if they are the same.

    PyTorch's networks are assumed to have channels before spatial axes wherever there are convolutions or pools.

    **Raises:** [`Unclear`][] for an order that is not known.

    >>> from torch_bridge.state_dicts.axes import Role
    >>> height, width, channels = Axis(1, role=Role(["spatial"])), Axis(2, role=Role(["spatial"])), Axis(3)
    >>> channels.mark("channel")
    >>> permutation(Axis(6, [height, width, channels], merged=True)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    axis = axis.find()
    if axis in inside:  # a residual connection adds the axis to itself
        return None
    inside = (*inside, axis)
    if axis.pinned is not None:
        return channels_last_index(axis.pinned)
    if axis.opaque:
        raise Unclear(f"it goes into {axis.opaque}, where it is not followed")
    if axis.reason and not axis.sources and not axis.segments:
        raise Unclear(axis.reason)
    if any(_is_moved(source, inside) for source in axis.sources):
        raise Unclear(f"it depends through {axis.reason} on a flattened feature map")
    for fed in _fed_axes(axis):
        if _flattening_order(fed, inside) is not None:
            raise Unclear(f"it goes through {fed.reason} into an axis that is combined with a flattened feature map")
    return _concatenated_order(axis, inside) if axis.segments else _flattening_order(axis, inside)


def _flattening_order(axis: Axis, inside: tuple[Axis, ...]) -> np.ndarray | None:
    parts = [part for part in _leaf_axes(axis) if part.size != 1]
    if len(parts) < 2:
        return None
    if any(part is not axis and _is_moved(part, inside) for part in parts):
        raise Unclear("it is flattened from axes that were flattened before")
    order = _torch_order(axis, parts)
    return None if order == sorted(order) else _positions([part.size for part in parts], order)


def _fed_axes(axis: Axis) -> list[Axis]:
    """Returns the axes computed from this one, directly or not, in ways that are not followed."""
    found: list[Axis] = []
    waiting = list(axis.feeds)
    while waiting:
        fed = waiting.pop().find()
        if fed is not axis and fed not in found:
            found.append(fed)
            waiting += fed.feeds
    return found


def channels_last_index(sizes: Sequence[int]) -> np.ndarray | None:
    """Returns the permutation for channels-last sizes `(H, W, C)`, which PyTorch has in the order `(C, H, W)`.

    >>> channels_last_index((1, 2, 3)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return None if len(sizes) < 2 else _positions(sizes, [len(sizes) - 1, *range(len(sizes) - 1)])


def channels_first_order(axes: Sequence[Axis]) -> list[int] | None:
    """Returns PyTorch's order of several axes of one array, channels before spatial axes; None if not known."""
    sized = [axis for axis in axes if axis.size != 1]
    if len(sized) < 2 or not all(len(axis.marks) == 1 for axis in sized):
        return None
    return _channels_first(axes)


def _positions(sizes: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """Returns the positions for an `order` of Flax's axes, from PyTorch's slowest to its fastest."""
    torch_positions = np.arange(math.prod(sizes)).reshape([sizes[k] for k in order])
    return torch_positions.transpose(np.argsort(order, kind="stable")).reshape(-1)


def _concatenated_order(axis: Axis, inside: tuple[Axis, ...]) -> np.ndarray | None:
    indices = [permutation(segment, inside) for segment in axis.segments]
    if all(index is None for index in indices):
        return None
    sizes = [segment.size for segment in axis.segments]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate(
        [
            start + (np.arange(size) if index is None else index)
            for start, size, index in zip(starts, sizes, indices, strict=True)
        ]
    )


def _leaf_axes(axis: Axis) -> list[Axis]:
    """Returns the parts of parts of an axis. A channel axis is one part, even if it is split into groups."""
    axis = axis.find()
    if not axis.parts or (axis.marks and not axis.merged):
        return [axis]
    return [leaf for part in axis.parts for leaf in _leaf_axes(part)]


def _is_moved(axis: Axis, inside: tuple[Axis, ...]) -> bool:
    try:
        return permutation(axis, inside) is not None
    except Unclear:
        return True


def _torch_order(axis: Axis, parts: Sequence[Axis]) -> list[int]:
    sizes = tuple(part.size for part in parts)
    if all(len(part.marks) == 1 for part in parts):
        order = _channels_first(parts)
        if order != sorted(order) and any(part.find().merged and len(_leaf_axes(part)) > 1 for part in axis.parts):
            raise Unclear(f"it is flattened in several steps, from axes {sizes}, as sequences of tokens are")
        return order
    if any(part.marks for part in parts):
        raise Unclear(f"it is flattened from axes {sizes}, of which not all are known as spatial ones or channels")
    if all(part.raw for part in parts) and any(part.last for part in parts):
        raise Unclear(f"it is flattened from axes {sizes} of an input, which may or may not have PyTorch's layout")
    return list(range(len(parts)))


def _channels_first(axes: Sequence[Axis]) -> list[int]:
    spatial = [k for k, axis in enumerate(axes) if "spatial" in axis.marks]
    return [k for k in range(len(axes)) if k not in spatial] + spatial
