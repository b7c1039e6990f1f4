"""Layouts of arrays while a network is being ported: PyTorch's dimensions and the order in which they are stored.

Every value has *dims*, the dimensions that PyTorch sees, and *axes*, the axes of the JAX array that holds the value.
Both consist of the same *atoms*: indivisible pieces of an index range. A feature map `[N, C, H, W]` that is stored
channels-last is

    dims (n)(c)(h)(w)      axes (n)(h)(w)(c)

and after `flatten(1)` it is the same array with `dims (n)(c h w)`. So reshapes and transposes cost nothing and emit
nothing. Code is emitted only where an operation needs an arrangement that the array does not have. A dimension of size
one has no atoms.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import sympy

Size: TypeAlias = int | sympy.Expr
"""A number, or an expression in the sizes that are open."""


@dataclasses.dataclass(frozen=True, eq=False)
class Atom:
    """A piece of an index range. Two atoms are the same only if they are one object."""

    size: Size


Group: TypeAlias = tuple[Atom, ...]
"""The atoms of one dimension or axis, outermost first."""


class Layout(NamedTuple):
    """The dimensions that PyTorch sees, and the axes that are stored. Both sides hold the same atoms."""

    dims: tuple[Group, ...]
    axes: tuple[Group, ...]

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape that PyTorch sees."""
        return tuple(group_size(dim) for dim in self.dims)

    @property
    def stored_shape(self) -> tuple[Size, ...]:
        """The shape of the stored array."""
        return tuple(group_size(axis) for axis in self.axes)


class Steps(NamedTuple):
    """The steps that rearrange an array: reshape to `split`, transpose by `order`, reshape to `merged`; None skips."""

    split: tuple[Group, ...] | None
    order: tuple[int, ...] | None
    merged: tuple[Group, ...] | None


def group_size(group: Group) -> Size:
    """The number of indices in a group."""
    return math.prod((atom.size for atom in group), start=1)


def atoms_of(groups: Sequence[Group]) -> Group:
    """The atoms of all groups, in order."""
    return tuple(atom for group in groups for atom in group)


def new_group(size: Size) -> Group:
    """A dimension of this size with an atom of its own. A dimension of size one has no atom."""
    return () if size == 1 else (Atom(size),)


def plain_layout(shape: Sequence[Size]) -> Layout:
    """The layout of an array that is stored as PyTorch sees it."""
    dims = tuple(map(new_group, shape))
    return Layout(dims, dims)


def reshape_layout(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout after `torch.reshape`, or None where the new dimensions cut across atoms of the old ones."""
    pending = list(atoms_of(layout.dims))
    dims: list[Group] = []
    halves: dict[Atom, Group] = {}
    for size in shape:
        group: list[Atom] = []
        rest: Size = size
        while rest != 1:
            if not pending:
                return None
            atom = pending.pop(0)
            if (quotient := divide(rest, atom.size)) is not None:
                rest = quotient
                group.append(atom)
            elif (inner := divide(atom.size, rest)) is not None:
                outer_atom, inner_atom = Atom(rest), Atom(inner)
                halves[atom] = (outer_atom, inner_atom)
                pending.insert(0, inner_atom)
                group.append(outer_atom)
                rest = 1
            else:
                return None
        dims.append(tuple(group))
    if pending:
        return None
    return Layout(tuple(dims), replace_atoms(layout.axes, halves))


def divide(size: Size, by: Size) -> Size | None:
    """`size / by` where the quotient is a whole number for all open sizes, else None."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    quotient = sympy.cancel(sympy.sympify(size) / sympy.sympify(by))
    numerator, denominator = sympy.fraction(quotient)
    if quotient.is_Integer:
        return int(quotient)
    polynomial = numerator.as_poly()  # None if the numerator is a plain number
    if denominator != 1 or polynomial is None or not all(c.is_Integer for c in polynomial.coeffs()):
        return None
    return quotient


def replace_atoms(groups: Sequence[Group], parts: dict[Atom, Group]) -> tuple[Group, ...]:
    """The groups with every atom of `parts` replaced by its parts. Parts that are in `parts` are replaced as well."""

    def expand(atom: Atom) -> Group:
        return atoms_of([expand(part) for part in parts[atom]]) if atom in parts else (atom,)

    return tuple(atoms_of([expand(atom) for atom in group]) for group in groups)


def refinement(first: Group, second: Group) -> tuple[dict[Atom, Group], dict[Atom, Group]] | None:
    """The parts into which the atoms of two groups split so that both groups have the same sizes in order, or None.

    The parts of `second` are the atoms of `first` themselves: after splitting, the two groups are equal. None means
    that no such split exists.
    """
    left, right = list(first), list(second)
    parts_left: dict[Atom, list[Atom]] = {}
    parts_right: dict[Atom, list[Atom]] = {}
    origin_left = {atom: atom for atom in left}
    origin_right = {atom: atom for atom in right}
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a.size == b.size:
            common = a
        elif (inner := divide(a.size, b.size)) is not None:
            common, rest = Atom(b.size), Atom(inner)
            left.insert(0, rest)
            origin_left[rest] = origin_left[a]
        elif (inner := divide(b.size, a.size)) is not None:
            common, rest = a, Atom(inner)
            right.insert(0, rest)
            origin_right[rest] = origin_right[b]
        else:
            return None
        parts_left.setdefault(origin_left[a], []).append(common)
        parts_right.setdefault(origin_right[b], []).append(common)
    if left or right:
        return None
    return (
        {atom: tuple(parts) for atom, parts in parts_left.items() if tuple(parts) != (atom,)},
        {atom: tuple(parts) for atom, parts in parts_right.items() if tuple(parts) != (atom,)},
    )


def rearrangement_steps(axes: Sequence[Group], target: Sequence[Group]) -> Steps:
    """The steps from an array stored as `axes` to one stored as `target`. Both hold the same atoms."""
    now, then = atoms_of(axes), atoms_of(target)
    if now == then:
        return Steps(None, None, None if tuple(axes) == tuple(target) else tuple(target))
    blocks = _blocks(now, then, axes, target)
    position = {atom: k for k, atom in enumerate(then)}
    order = tuple(sorted(range(len(blocks)), key=lambda k: position[blocks[k][0]]))
    moved = tuple(blocks[k] for k in order)
    return Steps(
        blocks if blocks != tuple(axes) else None,
        order,
        tuple(target) if moved != tuple(target) else None,
    )


def _blocks(now: Group, then: Group, axes: Sequence[Group], target: Sequence[Group]) -> tuple[Group, ...]:
    """The coarsest pieces that move as one, cut at every boundary of either side so that few reshapes are needed."""
    successor = dict(itertools.pairwise(then))
    last_of_group = {group[-1] for group in (*axes, *target) if group}
    blocks: list[list[Atom]] = [[now[0]]]
    for previous, atom in itertools.pairwise(now):
        if successor.get(previous) is atom and previous not in last_of_group:
            blocks[-1].append(atom)
        else:
            blocks.append([atom])
    return tuple(tuple(block) for block in blocks)


def tidy_axes(layout: Layout) -> tuple[Group, ...]:
    """One axis for each dimension, in the order that is nearest to the stored one, so that rearranging costs least.

    A dimension of size one goes before the dimension that follows it in PyTorch's order, but never after the stored
    last dimension, so that channels stay last.
    """
    place = {atom: k for k, atom in enumerate(atoms_of(layout.axes))}
    filled = [dim for dim in layout.dims if dim]
    by_place = sorted(filled, key=lambda dim: max(place[atom] for atom in dim))
    following: dict[Group | None, int] = {}
    for k, dim in enumerate(layout.dims):
        if not dim:
            after = next((later for later in layout.dims[k:] if later), None)
            following[after] = following.get(after, 0) + 1
    axes: list[Group] = []
    for dim in by_place:
        axes += [()] * following.get(dim, 0)
        axes.append(dim)
    trailing = following.get(None, 0)
    if trailing and by_place and layout.dims[-trailing - 1] is not by_place[-1]:
        return (*axes, *([()] * trailing))
    return (*axes[:-1], *([()] * trailing), *axes[-1:]) if len(axes) > 1 else (*axes, *([()] * trailing))
