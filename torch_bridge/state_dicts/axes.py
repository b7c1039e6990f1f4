"""In which order the elements along an axis lie: in PyTorch's channels-first networks, and in channels-last Flax ones.

Axes of values are followed through a network. Axes that hold the same thing, such as the features of an array and the
rows of the kernel it is multiplied with, are made one by [`unify`][]. What merges axes (a flatten) or takes one apart
(an unflatten) is recorded as parts of the axis, and convolutions and pools tell which axes are channels and which are
spatial. From that [`permutation`][] reads off how PyTorch's order along the axis differs from Flax's, or says that it
cannot be known.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

Mark = Literal["channel", "spatial"]


class Unclear(Exception):
    """The order along an axis cannot be told. The text says why."""


class Role:
    """What an axis is for. Shared by axes that are for the same, though they may differ in size or content."""

    def __init__(self, marks: Iterable[Mark] = ()) -> None:
        self.marks: set[Mark] = set(marks)
        self._link: Role | None = None

    def find(self) -> "Role":
        while self._link is not None:
            self = self._link
        return self

    def unite(self, other: "Role") -> None:
        ours, theirs = self.find(), other.find()
        if ours is not theirs:
            theirs._link = ours
            ours.marks |= theirs.marks


class Axis:
    """One axis of one or more values, which all have the same things along it.

    - `parts`: the axes that it was merged from or taken apart into, slowest first.
    - `merged`: whether a reshape made it out of them.
    - `segments`: the axes that were concatenated to make it.
    - `sources`: axes that it was computed from in a way that is not followed, and `reason`: by what.
    - `feeds`: axes that are computed from it in such ways.
    - `opaque`: the operation into which it goes and in which it is not followed.
    - `raw`: whether it is an axis of an input of the network; `last`: the last one of it.
    - `pinned`: the sizes of the parts, channels last, as the user states them; () for nothing to permute.
    """

    def __init__(
        self,
        size: int,
        parts: Sequence["Axis"] = (),
        *,
        merged: bool = False,
        segments: Sequence["Axis"] = (),
        sources: Sequence["Axis"] = (),
        reason: str = "",
        role: Role | None = None,
        raw: bool = False,
        last: bool = False,
    ) -> None:
        self.size = size
        self.parts = list(parts)
        self.merged = merged
        self.segments = list(segments)
        self.sources = list(sources)
        self.reason = reason
        self.role = role or Role()
        self.raw = raw
        self.last = last
        self.feeds: list[Axis] = []
        self.opaque = ""
        self.pinned: tuple[int, ...] | None = None
        self._link: Axis | None = None
        for axis in (*self.sources, *self.segments):
            axis.find().feeds.append(self)

    def find(self) -> "Axis":
        while self._link is not None:
            self = self._link
        return self

    @property
    def marks(self) -> set[Mark]:
        return self.find().role.find().marks

    def mark(self, mark: Mark) -> None:
        self.marks.add(mark)

    def depend(self, sources: Sequence["Axis"], reason: str) -> None:
        """States that it has to do with other axes in a way that is not followed."""
        self.sources += sources
        self.reason = self.reason or reason

    def absorb(self, other: "Axis") -> None:
        """Makes `other` this axis. Both have to be what `find` gives."""
        other._link = self
        self.role.unite(other.role)
        self.parts = self.parts or other.parts
        self.merged |= other.merged
        self.segments = self.segments or other.segments
        self.sources += other.sources
        self.reason = self.reason or other.reason
        self.feeds += other.feeds
        self.opaque = self.opaque or other.opaque
        self.raw |= other.raw
        self.last |= other.last


def unify(a: Axis, b: Axis) -> None:
    """States that two axes of one size hold the same things in the same order."""
    a, b = a.find(), b.find()
    if a is b:
        return
    ours, theirs = a.parts, b.parts
    a.absorb(b)
    if not ours or not theirs:
        return
    for left, right in aligned([part.size for part in ours], [part.size for part in theirs]):
        lefts, rights = [ours[k] for k in left], [theirs[k] for k in right]
        if len(lefts) == 1:
            lefts = split(lefts[0], [part.size for part in rights])
        elif len(rights) == 1:
            rights = split(rights[0], [part.size for part in lefts])
        if len(lefts) != len(rights):
            a.reason = "it is taken apart in two ways that do not fit together"
            continue
        for x, y in zip(lefts, rights, strict=True):
            unify(x, y)


def aligned(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Positions in two shapes of equal size, in the shortest runs with equal products. Axes of size 1 are left out.

    >>> aligned([2, 7, 7, 64], [2, 49, 1, 8, 8])
    [([0], [0]), ([1, 2], [1]), ([3], [3, 4])]
    """
    if math.prod(ours) == 0:
        return []
    lefts = [k for k, size in enumerate(ours) if size != 1]
    rights = [k for k, size in enumerate(theirs) if size != 1]
    runs = []
    while lefts:
        left, right = [lefts.pop(0)], [rights.pop(0)]
        while (a := math.prod(ours[k] for k in left)) != (b := math.prod(theirs[k] for k in right)):
            if a < b:
                left.append(lefts.pop(0))
            else:
                right.append(rights.pop(0))
        runs.append((left, right))
    return runs


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The axis taken apart into axes of these sizes, slowest first. Sizes of 1 are for `reshape`."""
    axis = axis.find()
    if len(sizes) == 1:
        return [axis]
    if not axis.parts:
        role = axis.role.find()
        axis.parts = [Axis(size, role=role if role.marks else None, raw=axis.raw, last=axis.last) for size in sizes]
        return axis.parts
    return reshape(axis.parts, sizes)


def reshape(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """The axes of a value after a reshape."""
    result = [Axis(size) for size in sizes]
    for ins, outs in aligned([axis.size for axis in axes], sizes):
        sources = [axes[k] for k in ins]
        wanted = [sizes[k] for k in outs]
        if len(ins) == 1:
            made = split(sources[0], wanted)
        elif len(outs) == 1:
            made = [Axis(wanted[0], sources, merged=True)]
        else:
            made = [Axis(size, sources=sources, reason="a reshape that cuts across axes") for size in wanted]
        for k, axis in zip(outs, made, strict=True):
            result[k] = axis
    return result


def permutation(axis: Axis, inside: tuple[Axis, ...] = ()) -> np.ndarray | None:
    """For each position along Flax's axis the position along PyTorch's; None if they are the same.

    PyTorch's networks are taken to have channels before spatial axes wherever there are convolutions or pools.

    **Raises:** [`Unclear`][].

    >>> height, width, channels = Axis(1, role=Role(["spatial"])), Axis(2, role=Role(["spatial"])), Axis(3)
    >>> channels.mark("channel")
    >>> permutation(Axis(6, [height, width, channels], merged=True)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    axis = axis.find()
    if axis in inside:  # what a residual connection adds to itself
        return None
    inside = (*inside, axis)
    if axis.pinned is not None:
        return channels_last_index(axis.pinned)
    if axis.opaque:
        raise Unclear(f"it goes into {axis.opaque}, where it is not followed")
    if axis.reason and not axis.sources and not axis.segments:
        raise Unclear(axis.reason)
    if any(_moved(source, inside) for source in axis.sources):
        raise Unclear(f"it depends through {axis.reason} on a flattened feature map")
    for fed in _fed(axis):
        if _flattened(fed, inside) is not None:
            raise Unclear(f"it goes through {fed.reason} into what a flattened feature map is combined with")
    return _concatenated(axis, inside) if axis.segments else _flattened(axis, inside)


def _flattened(axis: Axis, inside: tuple[Axis, ...]) -> np.ndarray | None:
    parts = [part for part in _leaves(axis) if part.size != 1]
    if len(parts) < 2:
        return None
    if any(part is not axis and _moved(part, inside) for part in parts):
        raise Unclear("it is flattened from axes that were flattened before")
    order = _torch_order(axis, parts)
    return None if order == sorted(order) else _index([part.size for part in parts], order)


def _fed(axis: Axis) -> list[Axis]:
    """The axes into which this one goes in ways that are not followed, at any remove."""
    found: list[Axis] = []
    waiting = list(axis.feeds)
    while waiting:
        fed = waiting.pop().find()
        if fed is not axis and fed not in found:
            found.append(fed)
            waiting += fed.feeds
    return found


def channels_last_index(sizes: Sequence[int]) -> np.ndarray | None:
    """The permutation for channels-last sizes `(H, W, C)`, which PyTorch has in the order `(C, H, W)`.

    >>> channels_last_index((1, 2, 3)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return None if len(sizes) < 2 else _index(sizes, [len(sizes) - 1, *range(len(sizes) - 1)])


def kinds_order(axes: Sequence[Axis]) -> list[int] | None:
    """PyTorch's order of several axes of one array: channels before spatial ones; None where nothing tells."""
    sized = [axis for axis in axes if axis.size != 1]
    if len(sized) < 2 or not all(len(axis.marks) == 1 for axis in sized):
        return None
    return _channels_first(axes)


def _index(sizes: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """`order` names the axes, in Flax's order, from PyTorch's slowest to its fastest."""
    torch_positions = np.arange(math.prod(sizes)).reshape([sizes[k] for k in order])
    return torch_positions.transpose(np.argsort(order, kind="stable")).reshape(-1)


def _concatenated(axis: Axis, inside: tuple[Axis, ...]) -> np.ndarray | None:
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


def _leaves(axis: Axis) -> list[Axis]:
    """The axes that this one consists of: parts of parts, but a channel axis is one even where groups are formed."""
    axis = axis.find()
    if not axis.parts or (axis.marks and not axis.merged):
        return [axis]
    return [leaf for part in axis.parts for leaf in _leaves(part)]


def _moved(axis: Axis, inside: tuple[Axis, ...]) -> bool:
    try:
        return permutation(axis, inside) is not None
    except Unclear:
        return True


def _torch_order(axis: Axis, parts: Sequence[Axis]) -> list[int]:
    sizes = tuple(part.size for part in parts)
    if all(len(part.marks) == 1 for part in parts):
        order = _channels_first(parts)
        if order != sorted(order) and any(part.find().merged and len(_leaves(part)) > 1 for part in axis.parts):
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
