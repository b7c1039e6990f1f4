"""Checks of the inputs of one call, and their batch axes."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.arrays import SCALARS
from jaxensemble.errors import InputError
from jaxensemble.network.network import InputShape, Network, Ref

_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def check_inputs(network: Network, inputs: tuple[Any, ...], *, each: bool) -> None:
    """Checks that every input has the place, the shape and the kind of numbers that the network expects.

    An open size, for example the size of the batch, is one number for all inputs that have this size.

    **Arguments:**

    - `inputs`: the inputs that hold arrays: see [`bind_arguments`][jaxensemble.network.arguments.bind_arguments].
    - `each`: whether the arrays begin with the member axis.

    **Raises:** `InputError` with every input that does not fit.
    """
    problems: list[str] = []
    found = dict(_named_arrays(tuple(network.open_inputs.values()), inputs, "inputs", problems))
    open_sizes: dict[str | None, list[tuple[str, int]]] = {}
    for name, value in found.items():
        if name not in network.input_shapes:
            continue
        shape, expected = np.shape(value)[1:] if each else np.shape(value), network.input_shapes[name]
        if len(shape) != len(expected) or any(
            isinstance(e, int) and e != g for e, g in zip(expected, shape, strict=True)
        ):
            problems.append(f"`{name}`: expected {shape_text(expected)}, got {list(shape)}")
        else:
            for e, g in zip(expected, shape, strict=True):
                if not isinstance(e, int):
                    open_sizes.setdefault(e, []).append((name, g))
        dtype, wanted = jnp.result_type(value), network.input_dtypes.get(name)
        if wanted is not None and _kind(dtype) != _kind(wanted) and not isinstance(value, SCALARS):
            problems.append(f"`{name}`: expected {wanted}, got {dtype}")
    if not problems:
        problems = [line for size, found in open_sizes.items() for line in _size_problems(network, size, found)]
    if problems:
        one = ", one ".join(["batch size N", *network.sizes])
        raise InputError(
            f"inputs must have the places, shapes and kinds of numbers that {network.name} was ported with, and one "
            f"{one}; got {'; '.join(problems)}. Port it again with example inputs of the kind you need."
        )


def _size_problems(network: Network, size: str | None, found: list[tuple[str, int]]) -> Iterator[str]:
    """Problems with an open size, by the inputs that have this size."""
    what = "batch" if size is None else size
    if len({number for _, number in found}) > 1:
        yield from (f"`{name}`: {what} of {number}" for name, number in found)
        return
    names, number = dict.fromkeys(f"`{name}`" for name, _ in found), found[0][1]
    if size is not None and number not in network.sizes[size]:
        yield f"{', '.join(names)}: {size} of {number}, which must be {network.sizes[size]}"


def batch_axes(network: Network | None, inputs: tuple[Any, ...], *, each: bool) -> tuple[int | None, ...]:
    """Returns the batch axis of every array of one member's inputs, in leaf order; None for an array without one.

    A ported network has the axes with which it was ported. Any other network has axis 0 if all inputs have equally
    many rows. For `inputs` and `each` see `check_inputs`.
    """
    leaves = jax.tree.leaves(inputs)
    if network is None:
        shapes = [np.shape(leaf)[1:] if each else np.shape(leaf) for leaf in leaves]
        alike = len({shape[:1] for shape in shapes}) == 1 and bool(shapes[0])
        return (0 if alike else None,) * len(leaves)
    names = jax.tree.leaves(_name_tree(tuple(network.open_inputs.values())))
    shapes = [network.input_shapes.get(name, ()) for name in names]
    return tuple(shape.index(None) if None in shape else None for shape in shapes)


def check_member_axis(inputs: tuple[Any, ...], members: int) -> None:
    """Checks that every input begins with the member axis.

    **Raises:** `InputError` with every input that does not.
    """
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(inputs)}
    wrong = [f"`inputs{place}` {list(shape)}" for place, shape in shapes.items() if shape[:1] != (members,)]
    if wrong:
        raise InputError(
            f"every input of `each` must be [{members}, ...], one part for each member; got {', '.join(wrong)}"
        )


def input_structure(network: Network) -> Any:
    """JAX's tree structure of the arrays of one call's inputs."""
    return jax.tree.structure(tuple(map(_name_tree, network.open_inputs.values())))


def _name_tree(tree: Any) -> Any:
    """Returns a tree with names for references. Tuples become lists: only the order of the names counts."""
    match tree:
        case Ref(name):
            return name
        case dict():
            return {key: _name_tree(value) for key, value in tree.items()}
        case tuple() | list():
            return [_name_tree(value) for value in tree]
    return None


def _named_arrays(tree: Any, value: Any, place: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields the arrays of an input by their names in the network; adds what does not fit to `problems`."""
    match tree:
        case Ref(name):
            if isinstance(value, SCALARS) or hasattr(value, "shape"):
                yield name, value
            else:
                problems.append(f"`{place}`: expected an array, got {type(value).__name__}")
        case dict():
            if not isinstance(value, dict) or value.keys() != tree.keys():
                got = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
                problems.append(f"`{place}`: expected a dict of {sorted(tree)}, got {got}")
                return
            for key in tree:
                yield from _named_arrays(tree[key], value[key], f"{place}[{key!r}]", problems)
        case tuple() | list():
            if not isinstance(value, tuple | list) or len(value) != len(tree):
                got = len(value) if isinstance(value, tuple | list) else type(value).__name__
                problems.append(f"`{place}`: expected {len(tree)}, got {got}")
                return
            for k, (part, item) in enumerate(zip(tree, value, strict=True)):
                yield from _named_arrays(part, item, f"{place}[{k}]", problems)


def _kind(dtype: Any) -> str:
    """Returns the kind of a dtype: floating, integer, boolean or complex. Random keys have their own dtype as kind."""
    return next((kind.__name__ for kind in _KINDS if jnp.issubdtype(dtype, kind)), str(dtype))


def shape_text(shape: InputShape) -> str:
    """Returns the shape of an input as text, with `N` for the size of the batch.

    >>> shape_text((None, 3, "height", "width"))
    '[N, 3, height, width]'
    """
    return f"[{', '.join('N' if size is None else str(size) for size in shape)}]"
