"""`torch.func` for Flax modules: stacking the states of modules, and calling a module with a given state.

Mirrors PyTorch 2.13 (torch/_functorch/functional_call.py, torch/nn/utils/stateless.py): the same names and arguments,
and the same types of error with the same words where possible. The differences are:

- Names are Flax's (`conv1.kernel`), in nested dicts; one dict with dotted names is taken wherever a nested one is.
- JAX has no `requires_grad`, so there is no check of it.
- A member with an extra or missing key, another shape or dtype, or another static attribute (eps, stride, a flag of a
  submodule) is refused; PyTorch stacks some of these members and runs the first member's settings.
- A name that a module does not have is an error even if `strict=False`. PyTorch sets it as an attribute, which here,
  where `kernel` is easily called `weight`, would run the module's own weights without a word.
- On CPUs convolutions of an `nnx.Conv` run one after the other where `vmap` maps their kernels, which is faster.
- Nothing passed in is ever changed: changed buffers are returned if `mutable=True`, else dropped.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax

from jaxensemble.arrays import as_array
from jaxensemble.errors import InputError, StateError, UnsupportedError
from jaxensemble.modules.randomness import defer_linen_keys, derive_vmap_keys
from jaxensemble.modules.stacking import count_members, stack_states, unstack
from jaxensemble.modules.state import KINDS, State, Tree, flatten, kind_of, merge, split, unflatten
from jaxensemble.modules.structure import Fixed, Leaf, Node, Path, Structure
from jaxensemble.programs.cpu.mapped_convolutions import mapped_convolution
from jaxensemble.running.device import device_of


def stack_module_state(modules: Sequence[nnx.Module]) -> tuple[Tree, Tree]:
    """The parameters and the buffers of M modules, stacked: nested dicts of `[M, ...]` arrays.

    Constants and random state are left out; the module passed to [`functional_call`][] supplies them.

    **Raises:** `MemberError` (a `RuntimeError`, as in PyTorch) for no modules, modules of different modes or classes,
    and all other differences except in values, which it lists with member and name.

    >>> import jax.numpy as jnp
    >>> params, buffers = stack_module_state([nnx.Linear(3, 3, rngs=nnx.Rngs(seed)) for seed in range(5)])
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (5, 3), 'kernel': (5, 3, 3)}
    """
    state = stack_states(modules, "stack_module_state")
    return state.params, state.buffers


def unstack_module_state(params: Tree, buffers: Tree) -> list[tuple[Tree, Tree]]:
    """The parameters and the buffers of each member: the inverse of [`stack_module_state`][].

    **Raises:** `InputError` unless every array is `[M, ...]` with one M.

    >>> import jax.numpy as jnp
    >>> members = unstack_module_state({"scale": jnp.ones((5, 3))}, {})
    >>> len(members), members[0][0]["scale"].shape
    (5, (3,))
    """
    members = count_members({"params": params, "buffers": buffers})
    return list(zip(unstack(params, members), unstack(buffers, members), strict=True))


def combine_state_for_ensemble(modules: Sequence[nnx.Module]) -> tuple[Callable[..., Any], Tree, Tree]:
    """`func, params, buffers`: the stacked state of M modules, and a function that runs one member on its part of it.

    `func(params, buffers, *args, **kwargs)` is to be mapped, not called on the stacked state. The older form of
    [`stack_module_state`][], with the same errors.

    >>> import jax.numpy as jnp
    >>> func, params, buffers = combine_state_for_ensemble([nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(5)])
    >>> jax.vmap(func, (0, 0, None))(params, buffers, jnp.ones((64, 3))).shape
    (5, 64, 3)
    """
    state = stack_states(modules, "combine_state_for_ensemble")
    base = split(modules[0])

    def func(params: Tree, buffers: Tree, *args: Any, **kwargs: Any) -> Any:
        return _call(base, _names((params, buffers)), args, kwargs, tie_weights=True, strict=True)[0]

    return func, state.params, state.buffers


def functional_call(
    module: nnx.Module,
    parameter_and_buffer_dicts: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
    mutable: bool = False,
) -> Any:
    """Calls `module` with some or all of its arrays replaced by the given ones; `module` and dicts stay as they are.

    - `parameter_and_buffer_dicts`: one dict or several, nested or with dotted names, of arrays; other variables keep
      the module's value. Any variable may be named: constants and random keys, too. `None` takes the place of an
      optional array, such as a bias.
    - `args`: the positional arguments, if a tuple; else the only one.
    - `tie_weights`: a variable that a module holds under several names is replaced under all of them by giving one;
      if `False`, only under the names given.
    - `strict`: every parameter and buffer must be given, and nothing else.
    - `mutable`: return `(output, buffers)`, with all buffers after the call.

    Call it within `jax.jit`, with a `vmap` around it: without, every operation is a program of its own, and the module
    is split and merged again for every call.

    Random streams draw from the module's own keys, which do not advance: two calls draw the same, unless keys are given
    (`{"dropout.rngs.key": key}`) or a [`vmap`][jaxensemble.vmap] around the call says so.

    **Raises:** as PyTorch does, `InputError` (a `ValueError`) for a name given twice or for different values of tied
    names, `StateError` (a `RuntimeError`) for what `strict` finds, `AttributeError` for a name that the module does not
    have, `TypeError` for a name or a value that is not an array.

    >>> import jax.numpy as jnp
    >>> linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    >>> functional_call(linear, {"kernel": jnp.eye(3)}, jnp.arange(3.0))
    Array([0., 1., 2.], dtype=float32)
    """
    names = _names(parameter_and_buffer_dicts)
    args = () if args is None else args if isinstance(args, tuple) else (args,)
    output, after = _call(split(module), names, args, kwargs or {}, tie_weights, strict)
    return (output, split(after).buffers) if mutable else output


def _names(dicts: Any) -> dict[str, Any]:
    """All the values given, by dotted name."""
    if isinstance(dicts, Mapping):
        dicts = (dicts,)
    elif not isinstance(dicts, Sequence) or isinstance(dicts, str):
        raise InputError(
            f"Expected parameter_and_buffer_dicts to be a dict, or a list/tuple of dicts, but got {type(dicts)}"
        )
    if not all(isinstance(part, Mapping) for part in dicts):
        raise InputError("Expected all elements of parameter_and_buffer_dicts to be dictionaries")
    pairs = [pair for part in dicts for pair in _pairs(part)]
    names = [name for name, _ in pairs]
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{repeated} appeared in multiple dictionaries; behavior of functional call is ambiguous")
    return dict(pairs)


def _pairs(tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Like `flatten`, but keeps a name that is given nested and dotted at once; takes an `nnx.State` as well."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            pairs += _pairs(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value.get_value() if isinstance(value, nnx.Variable) else value))
    return pairs


def _call(
    state: State,
    names: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tie_weights: bool,
    strict: bool,
) -> tuple[Any, nnx.Module]:
    """The output of a call, and the module that was called, a new one."""
    structure = state.graphdef
    places = {name: _locate(structure.root, name) for name in names}
    _check_ties(structure, names, places, tie_weights)
    if strict:
        _check_strict(structure, places, tie_weights)
    given = {_check_value(place, names[name]): names[name] for name, place in places.items()}
    module = _reparametrize(state, given, tie_weights)
    return module(*args, **kwargs), module


def _check_value(place: Path | Exception, value: Any) -> Path:
    if isinstance(place, Exception):
        raise place
    if value is not None and not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{value} is not an instance of jax.Array")
    return place


def _locate(root: Node, name: str) -> Path | Exception:
    """The first path of the attribute that a name leads to, or the error of the name."""
    node = root
    *parts, attribute = name.split(".")
    for number, part in enumerate(parts):
        child = node.children.get(part)
        if child is None:
            return AttributeError(f"{node.type.__name__} has no attribute `{part}`")
        if not isinstance(child, Node):
            prefix = ".".join(parts[: number + 1])
            return TypeError(f"submodule `{prefix}`: {_describe(child)} is not an instance of flax.nnx.Module")
        node = child
    child = node.children.get(attribute)
    if child is None:
        return AttributeError(f"{node.type.__name__} has no attribute `{attribute}`")
    if not isinstance(child, Leaf):
        return TypeError(f"attribute `{attribute}`: {_describe(child)} is not an instance of jax.Array")
    return (*node.path, attribute)


def _describe(child: Node | Leaf | Fixed) -> Any:
    return child.value if isinstance(child, Fixed) else child.type.__name__


def _holders(structure: Structure) -> dict[Path, Leaf]:
    """Every attribute that holds an array. Tied attributes lead to one leaf."""
    return {leaf.path: leaf for leaf in structure.leaves} | structure.ties


def _check_ties(structure: Structure, names: dict[str, Any], places: dict[str, Any], tie_weights: bool) -> None:
    holders = _holders(structure)
    together: dict[Any, list[str]] = {}
    for name, place in places.items():
        if isinstance(place, tuple):
            together.setdefault(holders[place] if tie_weights else place, []).append(name)
    for tied in together.values():
        if len({id(names[name]) for name in tied}) > 1:
            raise InputError(
                f"functional_call got multiple values for keys {sorted(tied)}, "
                f"which are tied. Consider using tie_weights=False"
            )


def _check_strict(structure: Structure, places: dict[str, Any], tie_weights: bool) -> None:
    holders = _holders(structure)
    given = {place for place in places.values() if isinstance(place, tuple)}
    leaves = {holders[place] for place in given}
    unexpected = sorted(name for name, place in places.items() if not isinstance(place, tuple))
    missing = sorted(
        ".".join(place)
        for place, leaf in holders.items()
        if kind_of(leaf) in ("params", "buffers") and not (leaf in leaves if tie_weights else place in given)
    )
    found = (("Unexpected", unexpected), ("Missing", missing))
    lines = [f"\n\t{what} key(s): {', '.join(map(repr, keys))}." for what, keys in found if keys]
    if lines:
        raise StateError(f"Error(s) in reparametrizing for {structure.root.type.__name__}:{''.join(lines)}")


def _reparametrize(state: State, given: dict[Path, Any], tie_weights: bool) -> nnx.Module:
    """A new module with the arrays of `state`, except the given ones."""
    structure, holders = state.graphdef, _holders(state.graphdef)
    arrays = {place: value if value is None else as_array(value, ".".join(place)) for place, value in given.items()}
    replaced = {holders[at]: value for at, value in arrays.items() if tie_weights or at not in structure.ties}
    trees: dict[str, dict[str, Any]] = {kind: flatten(getattr(state, kind)) for kind in KINDS}
    originals = {leaf: trees[kind_of(leaf)][leaf.name] for leaf in structure.leaves}
    for leaf, value in replaced.items():
        trees[kind_of(leaf)][leaf.name] = originals[leaf] if value is None else value
    nested = {kind: unflatten(tree) for kind, tree in trees.items()}
    rngs = derive_vmap_keys(structure, nested["rngs"])
    module = defer_linen_keys(structure, merge(structure, **nested | {"rngs": rngs}))
    # Merging cannot leave an attribute empty, nor give tied ones different values.
    emptied = {leaf for leaf, value in replaced.items() if value is None}
    apart = {at: None for at, leaf in holders.items() if leaf in emptied and (tie_weights or at == leaf.path)}
    if not tie_weights:
        touched = {holders[at] for at in arrays}
        apart |= {at: arrays.get(at, originals[leaf]) for at, leaf in structure.ties.items() if leaf in touched}
    for at, value in apart.items():
        _set(module, at, value)
    if device_of(given).platform == "cpu":
        _map_one_by_one(structure, module)
    return module


def _map_one_by_one(structure: Structure, module: nnx.Module) -> None:
    """Lets convolutions run one after the other where their kernels are mapped, which is faster on CPUs."""
    types = (shown for _, shown in structure.entries.values() if isinstance(shown, type))
    if any(issubclass(type_, nnx.Conv) for type_ in types):
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.Conv) and layer.conv_general_dilated is lax.conv_general_dilated:
                layer.conv_general_dilated = mapped_convolution


def _set(module: nnx.Module, place: Path, value: Any) -> None:
    """Gives one attribute a new variable, or None. Flax would write into the old variable."""
    owner: Any = module
    for part in place[:-1]:
        owner = _attributes(owner, place)[part]
    attributes = _attributes(owner, place)
    old = attributes[place[-1]]
    attributes[place[-1]] = old.replace(value) if value is not None and isinstance(old, nnx.Variable) else value


def _attributes(owner: Any, place: Path) -> dict[str, Any]:
    if not isinstance(owner, nnx.Pytree):
        name = ".".join(place)
        raise UnsupportedError(
            f"`{name}` is within a {type(owner).__name__}: only nnx.List and nnx.Dict can lose an item"
        )
    return vars(owner)
