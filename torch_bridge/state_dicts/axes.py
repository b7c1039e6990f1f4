"""Axes of the values in a Flax network, and what is known of the elements along each.

Axes of values are followed through a network. Axes that hold the same things, such as the features of an array and the
rows of the kernel that multiplies it, are made one by [`unify_axes`][]. A reshape that merges axes (a flatten), or
splits one (an unflatten), is recorded as parts of the axis. Convolutions and pools say which axes are channels, and
which are spatial. [`permutation`][] reads the order along an axis off these records.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

Mark = Literal["channel", "spatial"]


class Role:
    """Purpose of an axis. Axes of the same purpose share it, though their sizes or contents may differ."""

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
    """One axis of one or more values, with the same elements along it.

    - `parts`: the axes from which it was merged, or into which it was split, slowest first.
    - `merged`: whether a reshape merged it from these parts.
    - `segments`: the axes that were concatenated to make it.
    - `sources`: axes from which it was computed in a way that is not followed; `reason`: the operation.
    - `feeds`: axes that are computed from it in ways that are not followed.
    - `opaque`: the operation in which it is not followed.
    - `raw`: whether it is an axis of an input of the network; `last`: whether it is the input's last axis.
    - `pinned`: the sizes of the parts, channels last, as stated by the user; () for nothing to permute.
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
        """Records that the axis depends on other axes in a way that is not followed."""
        self.sources += sources
        self.reason = self.reason or reason

    def absorb(self, other: "Axis") -> None:
        """Makes `other` the same axis as this one. Both must come from `find`."""
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


def unify_axes(a: Axis, b: Axis) -> None:
    """Records that two axes of one size have the same elements in the same order."""
    a, b = a.find(), b.find()
    if a is b:
        return
    ours, theirs = a.parts, b.parts
    a.absorb(b)
    if not ours or not theirs:
        return
    for left, right in align_shapes([part.size for part in ours], [part.size for part in theirs]):
        lefts, rights = [ours[k] for k in left], [theirs[k] for k in right]
        if len(lefts) == 1:
            lefts = split_axis(lefts[0], [part.size for part in rights])
        elif len(rights) == 1:
            rights = split_axis(rights[0], [part.size for part in lefts])
        if len(lefts) != len(rights):
            a.reason = "it is split in two ways that do not fit together"
            continue
        for x, y in zip(lefts, rights, strict=True):
            unify_axes(x, y)


def align_shapes(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Returns positions in two shapes of equal size, in the shortest runs of equal products, without axes of size 1.

    >>> align_shapes([2, 7, 7, 64], [2, 49, 1, 8, 8])
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


def split_axis(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Splits an axis into axes of these sizes, slowest first. `reshape_axes` handles sizes of 1."""
    axis = axis.find()
    if len(sizes) == 1:
        return [axis]
    if not axis.parts:
        role = axis.role.find()
        axis.parts = [Axis(size, role=role if role.marks else None, raw=axis.raw, last=axis.last) for size in sizes]
        return axis.parts
    return reshape_axes(axis.parts, sizes)


def reshape_axes(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Returns the axes of a value after a reshape."""
    result = [Axis(size) for size in sizes]
    for ins, outs in align_shapes([axis.size for axis in axes], sizes):
        sources = [axes[k] for k in ins]
        wanted = [sizes[k] for k in outs]
        if len(ins) == 1:
            made = split_axis(sources[0], wanted)
        elif len(outs) == 1:
            made = [Axis(wanted[0], sources, merged=True)]
        else:
            made = [Axis(size, sources=sources, reason="a reshape that cuts across axes") for size in wanted]
        for k, axis in zip(outs, made, strict=True):
            result[k] = axis
    return result
