"""The state of a Flax module as plain nested dicts, and back: all modules are split and merged here.

Keys are strings at all levels (the items of an `nnx.List` are `"0"`, `"1"` ...), leaves are arrays. The class of a
variable decides in which dict it is:

| variable                                            | in          | over the members of an ensemble |
|-----------------------------------------------------|-------------|---------------------------------|
| `nnx.Param`                                         | `params`    | stacked, trained                |
| `nnx.RngState` (keys and counts)                    | `rngs`      | stacked                         |
| [`Constant`][]                                      | `constants` | shared                          |
| any other (`nnx.BatchStat` ...), or an array itself | `buffers`   | stacked                         |
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from flax import nnx

from jaxensemble.errors import InputError, StateError, porting_advice
from jaxensemble.layers.variables import Constant
from jaxensemble.modules.structure import Leaf, Structure

Tree = dict[str, Any]  # nested dicts; the leaves are arrays
Kind = Literal["params", "buffers", "constants", "rngs"]
KINDS: tuple[Kind, ...] = ("params", "buffers", "constants", "rngs")
STACKED: tuple[Kind, ...] = ("params", "buffers", "rngs")  # these have a member axis


class State(NamedTuple):
    """A module that [`split`][] has split: its structure, and its arrays as nested dicts."""

    graphdef: Structure
    params: Tree
    buffers: Tree
    constants: Tree
    rngs: Tree


def kind_of(leaf: Leaf) -> Kind:
    """The name of the dict of a [`State`][] that holds this array: see the table above."""
    if issubclass(leaf.type, nnx.Param):
        return "params"
    if issubclass(leaf.type, nnx.RngState):
        return "rngs"
    return "constants" if issubclass(leaf.type, Constant) else "buffers"


def split(module: nnx.Module) -> State:
    """Splits a module into structure and arrays. `merge(*split(module))` is a copy that shares the module's arrays.

    **Raises:** `InputError` if `module` is no `nnx.Module`, `StateError` for a variable that holds a dict.

    >>> state = split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> list(flatten(state.params)), list(flatten(state.buffers))
    (['bias', 'scale'], ['mean', 'var'])
    """
    if not isinstance(module, nnx.Module):
        got = f"{type(module).__module__}.{type(module).__name__}"
        raise InputError(f"`module` must be a flax.nnx.Module; got {got}{porting_advice(module)}")
    graphdef, variables = nnx.split(module, graph=True)
    structure = Structure.of(graphdef)
    groups: dict[Kind, dict[str, Any]] = {kind: {} for kind in KINDS}
    for leaf, (_, variable) in zip(structure.leaves, nnx.to_flat_state(variables), strict=True):
        value = variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable
        if isinstance(value, dict):
            raise StateError(
                f"`{leaf.name}` holds a dict; a variable must hold an array. Use one variable for each item"
            )
        groups[kind_of(leaf)][leaf.name] = value
    return State(structure, **{kind: unflatten(group) for kind, group in groups.items()})


def merge(
    graphdef: nnx.GraphDef,
    params: Tree,
    buffers: Tree | None = None,
    constants: Tree | None = None,
    rngs: Tree | None = None,
) -> Any:
    """Makes a new module with the given arrays: the inverse of [`split`][].

    **Raises:** `StateError` listing every array that is missing or not needed.

    >>> import jax.numpy as jnp
    >>> linear = merge(*split(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    >>> linear(jnp.ones((1, 2))).shape
    (1, 3)
    """
    structure = Structure.of(graphdef)
    given = check_names(State(structure, params or {}, buffers or {}, constants or {}, rngs or {}))
    return nnx.merge(structure, [given[kind_of(leaf)][leaf.name] for leaf in structure.leaves])


def check_names(state: State) -> dict[Kind, dict[str, Any]]:
    """Checks the names of a state's arrays, and returns the arrays by kind and dotted name.

    **Raises:** `StateError` listing every array that is missing or not needed.
    """
    given: dict[Kind, dict[str, Any]] = {kind: flatten(getattr(state, kind)) for kind in KINDS}
    structure = state.graphdef
    needed: list[tuple[Kind, str]] = [(kind_of(leaf), leaf.name) for leaf in structure.leaves]
    present = {(kind, name) for kind, group in given.items() for name in group}
    if present == set(needed):
        return given
    missing = [f"{kind}: {name}" for kind, name in needed if (kind, name) not in present]
    extra = [f"{kind}: {name}" for kind, name in sorted(present - set(needed))]
    parts = [f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("unexpected", extra)) if names]
    raise StateError(f"the arrays given do not fit {structure.root.type.__name__}: {'; '.join(parts)}")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested dicts to one dict with dotted names, in the same order. Empty dicts are dropped.

    >>> flatten({"conv1": {"bias": 1, "kernel": 2}, "scale": 3})
    {'conv1.bias': 1, 'conv1.kernel': 2, 'scale': 3}
    """
    return dict(_items(tree, ""))


def _items(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Nests a dict with dotted names: the inverse of [`flatten`][].

    **Raises:** `InputError` if one name is the beginning of another (`a` and `a.b`).

    >>> unflatten({"conv1.bias": 1, "conv1.kernel": 2, "scale": 3})
    {'conv1': {'bias': 1, 'kernel': 2}, 'scale': 3}
    """
    tree: Tree = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(
                    f"`{name}` cannot be nested: the beginning of this name is itself the name of an array"
                )
        if last in node:
            raise InputError(f"`{name}` cannot be nested: other names begin with this name")
        node[last] = value
    return tree
