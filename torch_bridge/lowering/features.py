"""Weights that belong to some dimensions of an array, in its atoms, so that the array can stay as it is stored."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch_bridge.lowering.builder import Builder, Wanted
from torch_bridge.lowering.layouts.alignment import refine_layout, renew_atoms
from torch_bridge.lowering.layouts.layout import Group, Layout, refinement
from torch_bridge.lowering.values import Value


class Features(NamedTuple):
    """An array, the axes that hold its features, and the weights of these features with their layouts."""

    x: Value
    axes: tuple[int, ...]
    weights: tuple[Wanted, ...]

    def leaves(self, *names: str) -> dict[str, Wanted]:
        """The first weights under the names that a layer has for them."""
        return dict(zip(names, self.weights, strict=False))


def align_features(b: Builder, x: Value, dims: Sequence[int], *weights: Value | None, merged: bool = False) -> Features:
    """Brings the dimensions `dims` of `x` and the weights of these dimensions into common atoms.

    A weight is stored flat, in the order in which `x` stores its features, so that the activations do not move. After a
    flatten, this order is channels-last.

    **Arguments:** each weight has the dimensions `dims` and no others. With `merged`, the features become one axis.
    """
    x = b.plain(x) if x.open else x
    weights = tuple(None if weight is None else b.value(weight) for weight in weights)
    dims = [dim % x.ndim for dim in dims]
    unified = _unify_atoms(x, dims, weights)
    if unified is None:
        x, weights = b.opaque(x), tuple(None if w is None else b.opaque(w) for w in weights)
        unified = _unify_atoms(x, dims, weights)
        assert unified is not None  # sizes agree, or PyTorch would have refused
    x, held = unified
    x, axes = _feature_axes(b, x, dims)
    if merged and len(axes) > 1:
        others = tuple(axis for k, axis in enumerate(x.layout.axes) if k not in axes)
        x = b.arrange(x, (*others, _atoms(x, axes)))
        axes = (len(others),)
    order = _atoms(x, axes)
    return Features(x, axes, tuple((w, None if w is None else Layout(w.layout.dims, (order,))) for w in held))


def _feature_axes(b: Builder, x: Value, dims: Sequence[int]) -> tuple[Value, tuple[int, ...]]:
    """The axes that hold only the dimensions. `x` is rearranged where there are no such axes."""
    atoms = {atom for dim in dims for atom in x.layout.dims[dim]}
    if not atoms:
        empty = [k for k, axis in enumerate(x.layout.axes) if not axis]
        if len(dims) == 1 and empty:
            return x, (empty[-1],)
    elif not any(atoms & set(axis) and not set(axis) <= atoms for axis in x.layout.axes):
        return x, tuple(k for k, axis in enumerate(x.layout.axes) if set(axis) & atoms)
    return b.plain(x), tuple(dims)


def _atoms(x: Value, axes: Sequence[int]) -> Group:
    return tuple(atom for axis in axes for atom in x.layout.axes[axis])


def _unify_atoms(
    x: Value, dims: Sequence[int], weights: Sequence[Value | None]
) -> tuple[Value, list[Value | None]] | None:
    """`x` and the weights in common atoms, or None where they are cut incompatibly."""
    held: list[Value | None] = []
    for _ in range(2):  # the second round leaves `x` as it is, and splits all weights into its final atoms
        held = []
        for weight in weights:
            unified = (x, None) if weight is None else _unify_pair(x, dims, weight)
            if unified is None:
                return None
            x, weight = unified
            held.append(weight)
    return x, held


def _unify_pair(x: Value, dims: Sequence[int], weight: Value) -> tuple[Value, Value] | None:
    """`x` and one weight in common atoms."""
    # The weight may have been stored in the atoms of this `x`.
    weight = dataclasses.replace(weight, layout=renew_atoms(weight.layout))
    for k, dim in enumerate(dims):
        parts = refinement(x.layout.dims[dim], weight.layout.dims[k])
        if parts is None:
            return None
        x = dataclasses.replace(x, layout=refine_layout(x.layout, parts[0]))
        weight = dataclasses.replace(weight, layout=refine_layout(weight.layout, parts[1]))
    return x, weight
