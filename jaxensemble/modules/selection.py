"""Members chosen by index."""

import operator
from typing import Any

import jax
import numpy as np

from jaxensemble.errors import InputError, MemberError, MemberIndexError
from jaxensemble.modules.state import Tree


def member_positions(index: Any, members: int) -> int | np.ndarray:
    """The position of one member, for an integer; an array of positions, for a slice or a 1-D index.

    **Raises:** `MemberIndexError` for members that do not exist, `InputError` for anything that is no index, and
    `MemberError` if no member is selected.

    >>> member_positions(-1, 3), member_positions(slice(2), 3).tolist()
    (2, [0, 1])
    """
    try:
        if isinstance(index, slice) or np.ndim(index) == 1:
            return _several_positions(index, members)
        position = operator.index(index)
    except TypeError as error:
        raise InputError(f"members are selected by integers, booleans or a slice; got {index!r}") from error
    if not -members <= position < members:
        raise MemberIndexError(f"there is no member {position}: the ensemble has {members}")
    return position % members


def _several_positions(index: Any, members: int) -> np.ndarray:
    positions = np.arange(members)[index] if isinstance(index, slice) else np.asarray(index)
    if positions.dtype == bool:
        if len(positions) != members:
            raise MemberIndexError(f"one boolean for each of {members} members is needed; got {len(positions)}")
        positions = np.flatnonzero(positions)
    if positions.size == 0:
        raise MemberError(f"an ensemble needs at least one member; {index!r} selects none of {members}")
    if not np.issubdtype(positions.dtype, np.integer):
        raise InputError(f"members are selected by integers, booleans or a slice; got {index!r}")
    outside = positions[(positions < -members) | (positions >= members)]
    if outside.size:
        raise MemberIndexError(f"there are no members {outside.tolist()}: the ensemble has {members}")
    return positions % members


@jax.jit
def take_members(trees: dict[str, Tree], positions: Any) -> dict[str, Tree]:
    """The arrays of one member, for an integer, or of several members, for an array of integers."""
    return jax.tree.map(lambda leaf: leaf.at[positions].get(mode="promise_in_bounds"), trees)
