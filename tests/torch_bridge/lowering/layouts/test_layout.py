"""Layouts against NumPy: after any reshapes and transposes of a layout, its array is NumPy's."""

import math

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from torch_bridge.lowering.layouts.layout import (
    Group,
    Layout,
    atoms_of,
    divide,
    group_size,
    plain_layout,
    rearrangement_steps,
    refinement,
    replace_atoms,
    reshape_layout,
    tidy_axes,
)

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


def rearranged(array: np.ndarray, axes: tuple[Group, ...], target: tuple[Group, ...]) -> np.ndarray:
    """Computes the builder's calls in NumPy."""
    split, order, merged = rearrangement_steps(axes, target)
    if split is not None:
        array = array.reshape([int(group_size(group)) for group in split])
    if order is not None:
        array = array.transpose(order)
    return array if merged is None else array.reshape([int(group_size(group)) for group in merged])


@st.composite
def factorisations(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """Draws a shape with a number of elements, with sizes of one among them."""
    shape: list[int] = []
    while size > 1:
        factor = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        shape.append(factor)
        size //= factor
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape) or (1,)


@given(st.data())
def test_layouts_follow_numpy_through_reshapes_and_transposes(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    seen = np.arange(math.prod(shape)).reshape(shape)
    stored, layout = seen, plain_layout(shape)
    for _ in range(data.draw(st.integers(1, 5))):
        match data.draw(st.sampled_from(["permute", "reshape", "store tidy", "store plain"])):
            case "permute":
                order = data.draw(st.permutations(range(seen.ndim)))
                seen, layout = seen.transpose(order), Layout(tuple(layout.dims[dim] for dim in order), layout.axes)
            case "reshape":
                target = data.draw(factorisations(seen.size))
                reshaped = reshape_layout(layout, target)
                if reshaped is None:  # cuts across atoms: stored as seen, with no memory of how it came about
                    stored = rearranged(stored, layout.axes, layout.dims).reshape(target)
                    reshaped = plain_layout(target)
                seen, layout = seen.reshape(target), reshaped
            case "store tidy":
                axes = tidy_axes(layout)
                assert len(axes) == len(layout.dims) and set(axes) == set(layout.dims)
                stored, layout = rearranged(stored, layout.axes, axes), Layout(layout.dims, axes)
            case "store plain":
                stored, layout = rearranged(stored, layout.axes, layout.dims), Layout(layout.dims, layout.dims)
    assert layout.shape == seen.shape
    assert layout.stored_shape == stored.shape
    np.testing.assert_array_equal(rearranged(stored, layout.axes, layout.dims), seen)


@given(st.data())
def test_refinement_makes_groups_equal(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 6, 8, 12, 24]))
    first, second = (atoms_of(plain_layout(data.draw(factorisations(size))).dims) for _ in range(2))
    parts = refinement(first, second)
    if parts is None:
        boundaries = [set(np.cumprod([int(atom.size) for atom in group])) for group in (first, second)]
        assert boundaries[0] != boundaries[1]
        return
    (left,), (right,) = replace_atoms([first], parts[0]), replace_atoms([second], parts[1])
    assert left == right
    assert group_size(left) == size


def test_a_flattened_channels_last_map_moves_nothing() -> None:
    n, c, h, w = dims = plain_layout((2, 3, 4, 5)).dims
    channels_last = Layout(dims, (n, h, w, c))
    flat = reshape_layout(channels_last, (2, 60))
    assert flat is not None
    assert flat.axes == (n, h, w, c)
    assert flat.dims == (n, (*c, *h, *w))


def test_a_pure_reshape_is_one_step_and_a_transpose_another() -> None:
    a, b, c = plain_layout((2, 3, 4)).dims
    assert rearrangement_steps((a, b, c), (a, (*b, *c))) == (None, None, (a, (*b, *c)))
    assert rearrangement_steps((a, b, c), (a, c, b)) == (None, (0, 2, 1), None)
    assert rearrangement_steps(((*a, *b), c), (a, c, b)) == ((a, b, c), (0, 2, 1), None)


def test_tidy_keeps_channels_last_for_pooled_maps() -> None:
    n, c = plain_layout((2, 3)).dims
    assert tidy_axes(Layout((n, c, (), ()), (n, c))) == (n, (), (), c)


S = sympy.Symbol("s", positive=True, integer=True)


@pytest.mark.parametrize(
    ("size", "by", "expected"),
    [
        (12, 4, 3),
        (12, 5, None),
        (4 * S, S, 4),
        (S, 4, None),
        (S * 6, 2 * S, 3),
        (S, S, 1),
        (5, S, None),
        (12 * S, 4, 3 * S),
    ],
)
def test_division_is_whole_for_every_batch_size(size: object, by: object, expected: object) -> None:
    assert divide(size, by) == expected  # type: ignore[arg-type]


def test_a_batch_dimension_is_carried_through_a_merge_and_a_split() -> None:
    layout = plain_layout((S, 5, 3))
    merged = reshape_layout(layout, (5 * S, 3))
    assert merged is not None and merged.axes == layout.axes
    split = reshape_layout(merged, (S, 5, 3))
    assert split is not None and split.dims == layout.dims
