"""Training data: inputs and targets as arrays, and the rows of a minibatch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.arrays import as_array, as_arrays, require_x64
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError
from jaxensemble.network.arguments import bind_arguments
from jaxensemble.network.inputs import batch_axes, check_inputs, check_member_axis
from jaxensemble.network.network import Network
from jaxensemble.programs.rows import Axes


def map_along_axes(data: Any, axes: Axes, function: Callable[[jax.Array, int], jax.Array], ahead: int = 0) -> Any:
    """Applies a function to every leaf and its batch axis, which `ahead` other axes precede."""
    leaves, tree = jax.tree.flatten(data)
    pairs = zip(leaves, axes, strict=True)
    return tree.unflatten([leaf if axis is None else function(leaf, axis + ahead) for leaf, axis in pairs])


def count_rows(data: Any, axes: Axes, ahead: int = 0) -> int:
    """Returns the number of rows.

    **Raises:** `InputError` for a network whose inputs have no batch axis.
    """
    pairs = zip(jax.tree.leaves(data), axes, strict=False)  # `axes` may cover the inputs only, which come first
    sizes = [leaf.shape[axis + ahead] for leaf, axis in pairs if axis is not None]
    if not sizes:
        raise InputError("the network's inputs have no batch axis over which a loss could be the mean")
    return sizes[0]


def as_data(
    ensemble: Ensemble, inputs: Any, targets: Any, rows: Any = None, *, each: bool = False, changed: bool = False
) -> tuple[tuple[Any, Any], jax.Array | None]:
    """Returns data and rows as JAX arrays, checked against what the network takes.

    Only the batch axes are checked of data that are `changed` before the network takes them.

    **Raises:** `InputError` for data and rows that do not fit.
    """
    positional, named = ((), inputs) if _is_by_name(ensemble.network, inputs) else (inputs, {})
    positional = positional if isinstance(positional, tuple) else (positional,)
    inputs = as_arrays(bind_arguments(ensemble.network, positional, named), "inputs")
    targets, members = as_arrays(targets, "targets"), len(ensemble)
    for leaf in jax.tree.leaves(ensemble.params):
        require_x64(leaf.dtype, "the ensemble")
    if each:
        check_member_axis(inputs, members)
    if changed:
        _check_axes(ensemble, inputs)
    check_data(ensemble, inputs, targets, each=each, changed=changed)
    return (inputs, targets), None if rows is None else _as_rows(
        rows, members, count_input_rows(ensemble, inputs, each=each)
    )


def put_data(ensemble: Ensemble, data: tuple[Any, Any], rows: Any, *, each: bool) -> tuple[tuple[Any, Any], Any]:
    """Returns data, and indices of rows, in their places on the mesh of the ensemble, if it has one.

    Where rows are chosen by indices, every device gets all data.

    **Raises:** `InputError` for rows that the mesh does not divide.
    """
    placement = ensemble.placement
    if placement is None:
        return data, rows
    axes = (*batch_axes(ensemble.network, data[0], each=each), *[0] * len(jax.tree.leaves(data[1])))
    data = placement.fill(data) if each else data
    if rows is None:
        return placement.put_inputs(data, axes, each=each), None
    own = rows.ndim == 2
    (rows,) = placement.put_inputs((placement.fill(rows) if own else rows,), (0,), each=own)
    return placement.put(data, placement.spec(None, each=each)), rows


def count_input_rows(ensemble: Ensemble, inputs: tuple[Any, ...], *, each: bool = False) -> int:
    """Returns the number of rows of the inputs."""
    return count_rows(inputs, batch_axes(ensemble.network, inputs, each=each), each)


def check_data(ensemble: Ensemble, inputs: Any, targets: Any, *, each: bool, changed: bool = False) -> None:
    """Checks that the network takes these inputs (arrays, or shapes and dtypes), and that targets have as many rows.

    Inputs that are `changed` before the network takes them may have other shapes and dtypes.

    **Raises:** `InputError` for data that do not fit.
    """
    if ensemble.network is not None and not changed:
        check_inputs(ensemble.network, inputs, each=each)
    size = count_input_rows(ensemble, inputs, each=each)
    if size == 0:
        raise InputError("`inputs` have no rows")
    wanted = (len(ensemble), size) if each else (size,)
    leaves = {f"`targets{jax.tree_util.keystr(at)}`": leaf for at, leaf in jax.tree_util.tree_leaves_with_path(targets)}
    wrong = [
        f"{name} {list(jnp.shape(leaf))}" for name, leaf in leaves.items() if jnp.shape(leaf)[: len(wanted)] != wanted
    ]
    if wrong:
        raise InputError(
            f"targets must begin with the {'members and ' if each else ''}rows of the inputs, {list(wanted)}; got "
            f"{', '.join(wrong)}"
        )


def _check_axes(ensemble: Ensemble, inputs: tuple[Any, ...]) -> None:
    """Checks that the inputs have the batch axes of the network's inputs.

    **Raises:** `InputError` if they do not.
    """
    axes, leaves = batch_axes(ensemble.network, inputs, each=False), jax.tree.leaves(inputs)
    pairs = zip(axes, leaves, strict=False)
    if len(axes) != len(leaves) or any(axis is not None and axis >= np.ndim(leaf) for axis, leaf in pairs):
        shapes = ", ".join(str(list(np.shape(leaf))) for leaf in leaves)
        raise InputError(
            f"with `augment`, inputs may have other shapes than the network's, but must be as many, "
            f"{len(axes)}, with the same batch axes; got {shapes}"
        )


def _is_by_name(network: Any, inputs: Any) -> bool:
    """Returns whether inputs are a dict of arguments by name, not one argument that is a dict."""
    names = set(network.arguments) if isinstance(network, Network) else set()
    return isinstance(inputs, dict) and bool(inputs) and inputs.keys() <= names


def _as_rows(rows: Any, members: int, size: int) -> jax.Array:
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if (given.size and not np.issubdtype(given.dtype, np.integer)) or given.ndim not in (1, 2):
        raise InputError(
            f"`rows` must be indices of rows, integers [N] or [{members}, N]; got {given.dtype}{list(given.shape)}"
        )
    rows = as_array(given, "rows") if given.size else jnp.zeros(given.shape, jnp.int32)
    if rows.ndim == 2 and rows.shape[0] != members:
        raise InputError(f"`rows` must be [N] or [{members}, N]; got {list(rows.shape)}")
    if not rows.size:
        raise InputError("`rows` must hold at least one index; got none")
    # The values of JAX arrays are not checked, since that would wait for them.
    if isinstance(given, np.ndarray) and not (given.min() >= 0 and given.max() < size):
        raise InputError(f"`rows` must be between 0 and {size - 1}; got {given.min()} to {given.max()}")
    return rows
