"""States of M modules, stacked along a leading member axis and unstacked, with checks that modules are alike."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxensemble.arrays import require_x64
from jaxensemble.compat import Tracer
from jaxensemble.errors import InputError, MemberError
from jaxensemble.modules.state import KINDS, STACKED, State, Tree, flatten, split
from jaxensemble.modules.structure import structure_differences


def stack_states(modules: Sequence[nnx.Module], caller: str) -> State:
    """Stacks the states of modules: `params`, `buffers` and `rngs` become `[M, ...]`, `constants` are shared.

    **Raises:** `MemberError`, whose text begins with `caller`, for no modules, for modules of different modes or
    classes (in this order, and in PyTorch's words), and else with every difference except different values;
    `InputError` for 64-bit arrays while JAX has 64-bit types switched off.
    """
    if not isinstance(modules, Sequence):
        raise InputError(f"{caller}: Expected a sequence of modules, got {type(modules).__name__}.")
    if len(modules) == 0:
        raise MemberError(f"{caller}: Expected at least one model, got 0.")
    states = [split(module) for module in modules]
    first = states[0]
    _check_modes(states, caller)
    _check_classes(modules, caller)
    _check_members([_differences(first, state) for state in states], caller)
    trees = {kind: stack([getattr(state, kind) for state in states]) for kind in STACKED}
    return State(first.graphdef, constants=first.constants, **trees)


def stack(trees: Sequence[Tree]) -> Tree:
    """Stacks M trees of arrays with equal shapes to one tree of `[M, ...]` arrays."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Tree, members: int) -> list[Tree]:
    """Splits a tree of `[M, ...]` arrays into M trees: the inverse of [`stack`][]."""
    return [jax.tree.map(lambda leaf, member=member: leaf[member], tree) for member in range(members)]


def count_members(trees: dict[str, Tree]) -> int:
    """The size M of the leading axis of every array in several trees, which are given by name.

    **Raises:** `InputError` if there is no array, if the arrays have different sizes, or if M is 0.
    """
    shapes = {
        f"{kind}: {name}": jnp.shape(leaf) for kind, tree in trees.items() for name, leaf in flatten(tree).items()
    }
    if not shapes:
        raise InputError("there are no parameters and no buffers, so that the number of members is unknown")
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) > 1 or sizes & {(), (0,)}:
        lines = "".join(f"\n  {name} {list(shape)}" for name, shape in shapes.items())
        raise InputError(f"every array must be [M, ...], with one M of at least 1; got{lines}")
    return sizes.pop()[0]


def check_same_architecture(states: Sequence[State], caller: str) -> None:
    """Checks that states differ in values alone. Their numbers of members may differ.

    **Raises:** `MemberError` with every place where states differ.
    """
    strip = [state._replace(**{kind: _abstract_members(getattr(state, kind)) for kind in STACKED}) for state in states]
    _check_members([_differences(strip[0], state) for state in strip], caller, "ensemble")


def _abstract_members(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def _check_modes(states: Sequence[State], caller: str) -> None:
    first, *others = [state.graphdef.modes for state in states]
    places = [
        f"\n  member {member}, `{'.'.join(path)}`: expected {first[path]}, got {mode[path]}"
        for member, mode in enumerate(others, start=1)
        for path in sorted(mode.keys() & first.keys())  # `_differences` lists paths that only one of them has
        if mode[path] != first[path]
    ]
    if places:
        raise MemberError(f"{caller}: Expected all models to have the same training/eval mode.{''.join(places)}")


def _check_classes(modules: Sequence[nnx.Module], caller: str) -> None:
    places = [
        f"\n  member {member}: expected {_class_name(modules[0])}, got {_class_name(module)}"
        for member, module in enumerate(modules)
        if type(module) is not type(modules[0])
    ]
    if places:
        raise MemberError(f"{caller}: Expected all models to be of the same class.{''.join(places)}")


def _class_name(module: nnx.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_members(differences: Sequence[list[str]], caller: str, noun: str = "member") -> None:
    lines = [f"\n  {noun} {member}, {line}" for member, found in enumerate(differences) for line in found]
    if lines:
        raise MemberError(
            f"{caller}: Expected all models to be the same except for the values of their arrays; "
            f"differences from {noun} 0:{''.join(lines)}"
        )


def _differences(expected: State, state: State) -> list[str]:
    lines = [
        f"{f'`{path}`' if path else 'the module'}: expected {_describe_value(a)}, got {_describe_value(b, a)}"
        for path, a, b in structure_differences(expected.graphdef, state.graphdef)
    ]
    for kind in KINDS:
        leaves, others = flatten(getattr(expected, kind)), flatten(getattr(state, kind))
        for name in leaves.keys() & others.keys():
            a, b = _signature(leaves[name], name), _signature(others[name], name)
            if a != b:
                lines.append(f"`{name}`: expected {a}, got {b}")
            elif kind == "constants" and not _same_values(leaves[name], others[name]):
                lines.append(f"`{name}`: a Constant has one value for all members, and this value differs")
    return sorted(lines)


def _describe_value(value: Any, other: Any = None) -> str:
    if not isinstance(value, type):
        return repr(value)
    alike = isinstance(other, type) and other.__qualname__ == value.__qualname__
    return f"another class {value.__qualname__}" if alike else value.__qualname__


def _signature(leaf: Any, name: str) -> str:
    """Dtype and shape as text: `float32[3, 4]`; for a variable with several arrays, the text of each array."""
    arrays = [part if hasattr(part, "dtype") else jnp.asarray(part) for part in jax.tree.leaves(leaf)]
    for array in arrays:
        require_x64(array.dtype, f"`{name}`")
    return ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays)


def _same_values(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False  # not known while tracing
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
