"""Stacking of the state dicts of M members into the arrays of a hand-written Flax module."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from torch import Tensor

from jaxensemble.arrays import as_array
from jaxensemble.errors import InputError, MemberError, StateError
from jaxensemble.modules.state import Tree, flatten, split, unflatten
from torch_bridge.arrays import cast_exactly, jax_dtype, to_numpy
from torch_bridge.state_dicts.axes import Axis
from torch_bridge.state_dicts.matching import (
    WITHOUT_PLACE,
    ArraySlot,
    Misfit,
    Names,
    Placement,
    array_slots,
    flax_name,
    placement,
)
from torch_bridge.state_dicts.permutations import Unclear
from torch_bridge.state_dicts.tracing import trace_axes

Permutations = Mapping[str, tuple[int, ...] | None]


def stack_state_dicts(
    state_dicts: Sequence[Mapping[str, Any]],
    flax_module: nnx.Module,
    example_input: Any,
    *,
    names: Names = None,
    permutations: Permutations | None = None,
) -> tuple[Tree, Tree]:
    """Returns the stacked parameters and buffers of M PyTorch state dicts, for a Flax module that is their twin.

    Keys are matched with Flax's paths (`conv1.weight` with `conv1.kernel`, `bn.running_mean` with `bn.mean`), layouts
    are converted by type of layer (Linear, LinearGeneral, Conv, ConvTranspose, Embed, PReLU and the normalisations of
    `flax.nnx` and `flax.linen`), and arrays that are bare variables are matched by their own names. The rows of a
    Linear layer after a flatten are put in the order in which the Flax module flattens (`[H, W, C]`, where PyTorch has
    `[C, H, W]`), and so is everything else along such an axis; for this the module's call is traced. Options that are
    no arrays (eps, momentum, strides) are the module's own, and are not checked.

    **Arguments:**

    - `state_dicts`: one for each member; PyTorch tensors or numpy arrays by key.
    - `flax_module`: the twin. Only the names and shapes of its arrays are read. Give a module of `flax.linen` as
      `nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(example_input)`.
    - `example_input`: an input of the Flax module, channels-last for convolutions; a tuple for several inputs. Only its
      shape and dtype are read, so it may be a `jax.ShapeDtypeStruct`.
    - `names`: a dict for layers with different names: PyTorch's paths, or beginnings of them, with Flax's:
      `{"fc.0": "dense1"}`. The longest beginning counts. Or a function from PyTorch's key to the name in Flax.
    - `permutations`: for layers whose inputs are flattened in a way that cannot be traced, the sizes of the flattened
      axes in the Flax module, channels last: `{"fc1": (7, 7, 64)}`; None where the order is PyTorch's. For a
      normalisation, the sizes are of the axis that it scales; for the name of any other array, of its last axis. These
      statements outrank the trace.

    **Returns:** `(params, buffers)`, nested dicts of `[M, ...]` arrays, nested as `jaxensemble.modules.state.split`
    nests those of the module, in the dtypes of the state dicts. `jaxensemble.functional_call` and `Ensemble` take them.

    **Raises:** `MemberError` with every difference between the state dicts; `StateError` with all arrays that stay
    unread or unfilled, have another shape, or have an unknown order; `InputError` for other arguments.
    Only PyTorch's `num_batches_tracked` may stay unread, since Flax's BatchNorm has no place for it.

    >>> import torch
    >>> dicts = [torch.nn.Linear(3, 2).state_dict() for _ in range(5)]
    >>> params, buffers = stack_state_dicts(dicts, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, params), buffers
    ({'bias': (5, 2), 'kernel': (5, 3, 2)}, {})
    """
    members = _check_members(state_dicts)
    _check_statements(permutations, names)
    if isinstance(flax_module, linen.Module):
        raise InputError(
            "`flax_module` must be an nnx.Module; got one of flax.linen: give it as "
            "nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(example_input)"
        )
    state = split(flax_module)  # also refuses anything but a module
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    axes, layers = trace_axes(flax_module, jax.tree_util.tree_map_with_path(_as_shape, inputs))
    slots = array_slots(flax_module, layers)
    _pin_axes(axes, slots, permutations or {})
    placements = _find_placements(members[0], flax_module, slots, axes, names)
    arrays = _stack_arrays(members, placements)
    trees = [flatten(tree) for tree in (state.params, state.buffers)]
    params, buffers = (unflatten({name: jnp.array(arrays.pop(name)) for name in tree}) for tree in trees)
    return params, buffers


def _check_statements(permutations: Any, names: Any) -> None:
    """Checks the types of `permutations` and `names`.

    **Raises:** `InputError` for other types.
    """
    if not isinstance(permutations or {}, Mapping) or not all(
        sizes is None or (isinstance(sizes, Sequence) and all(isinstance(size, int) for size in sizes))
        for sizes in (permutations or {}).values()
    ):
        raise InputError(
            f"`permutations` must be a dict of sizes by layer, such as {{'fc1': (7, 7, 64)}}; got {permutations!r}"
        )
    if names is not None and not callable(names) and not isinstance(names, Mapping):
        raise InputError(f"`names` must be a function, or a dict of names in Flax by names in PyTorch; got {names!r}")


def _as_shape(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    leaf = as_array(leaf, f"example_input{jax.tree_util.keystr(path)}")
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _check_members(state_dicts: Any) -> list[dict[str, Any]]:
    """Checks that the state dicts are alike, and returns copies of the dicts.

    **Raises:** `InputError` for anything but state dicts, `MemberError` with every difference between them.
    """
    if isinstance(state_dicts, Mapping) or not isinstance(state_dicts, Sequence):
        raise InputError(
            f"`state_dicts` must be a sequence of state dicts; got one {type(state_dicts).__name__}. For a single "
            "member, pass [state_dict]."
        )
    if not state_dicts:
        raise InputError("`state_dicts` must hold at least one state dict; got none")
    wrong = [
        f"  state dict {k}, {key!r}: {type(value).__name__}" if isinstance(member, Mapping) else f"  {k}: {value}"
        for k, member in enumerate(state_dicts)
        for key, value in (member.items() if isinstance(member, Mapping) else [(k, type(member).__name__)])
        if not isinstance(key, str) or not isinstance(value, Tensor | np.ndarray)
    ]
    if wrong:
        raise InputError("`state_dicts` must be dicts of tensors or numpy arrays by str; got\n" + "\n".join(wrong))
    members = [dict(member) for member in state_dicts]
    _check_alike(members)
    return members


def _check_alike(members: Sequence[Mapping[str, Any]]) -> None:
    first = {key: _description(value) for key, value in members[0].items()}
    found: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for k, member in enumerate(members[1:], 1):
        for key in dict.fromkeys((*first, *member)):
            theirs = _description(member[key]) if key in member else "nothing"
            if theirs != (ours := first.get(key, "nothing")):
                found[key, theirs, ours].append(k)
    if found:
        rows = [
            f"  `{key}`: {theirs} in member{'s' if len(which) > 1 else ''} {', '.join(map(str, which))}, "
            f"{ours} in member 0"
            for (key, theirs, ours), which in found.items()
        ]
        raise MemberError("the state dicts must have the same keys, shapes and dtypes; got\n" + "\n".join(rows))


def _description(value: Tensor | np.ndarray) -> str:
    shape = "nested" if isinstance(value, Tensor) and value.is_nested else list(value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}{shape}"


def _pin_axes(axes: Mapping[str, Sequence[Axis]], slots: Mapping[str, ArraySlot], permutations: Permutations) -> None:
    """Marks the axes whose order the user states.

    **Raises:** `InputError` listing the statements that do not fit.
    """
    problems = []
    for path, sizes in permutations.items():
        found = [slot for slot in slots.values() if path in (slot.place, slot.name)]
        wanted = {axis.find() for slot in found for axis in _input_axes(slot, axes[slot.name], path == slot.name)}
        stated = tuple(sizes or ())
        total = int(np.prod(stated)) if stated else None
        if not wanted:
            problems.append(f"`{path}` is no layer with inputs or features, by Flax's paths")
        for axis in wanted:
            if total is not None and total != axis.size:
                problems.append(f"`{path}` has {axis.size} inputs; {stated} makes {total}")
            elif axis.pinned is not None and axis.pinned != stated:
                problems.append(f"`{path}`: {stated}, but the same axis is {axis.pinned} elsewhere")
            else:
                axis.pinned = stated
    if problems:
        raise InputError("`permutations` does not fit the Flax module:\n  " + "\n  ".join(problems))


def _input_axes(slot: ArraySlot, axes: Sequence[Axis], named: bool) -> list[Axis]:
    """Returns the inputs of a kernel, the features of a normalisation, or the last axis of an array named itself.

    The name of a layer does not mean its bias, which lies along the outputs of the kernel.
    """
    if slot.leaf == "kernel":
        return [axes[-2]]
    return list(axes[-1:]) if named or slot.leaf in ("scale", "mean", "var") else []


def _find_placements(
    tensors: Mapping[str, Any],
    module: nnx.Module,
    slots: Mapping[str, ArraySlot],
    axes: Mapping[str, list[Axis]],
    names: Names,
) -> dict[str, tuple[str, Placement]]:
    """Returns name and placement by PyTorch key.

    **Raises:** `StateError` with everything that does not fit.
    """
    unread, misfits, unclear = [], [], []
    filled: dict[str, str] = {}
    result: dict[str, tuple[str, Placement]] = {}
    for key, tensor in tensors.items():
        slot = slots.get(flax_name(key, names))
        if slot is None:
            if key.rpartition(".")[2] != WITHOUT_PLACE:
                unread.append(f"`{key}` {_description(tensor)}")
            continue
        filled.setdefault(slot.name, key)
        try:
            result[key] = slot.name, placement(slot, tuple(tensor.shape), axes[slot.name])
        except Misfit as error:
            misfits.append(f"`{key}` for `{slot.name}`: {error}")
        except Unclear as error:
            unclear.append(f"`{key}` for `{slot.name}`: {error}")
    unfilled = [
        f"`{name}` {[axis.size for axis in leaf]}, which no key goes to"
        for name, leaf in axes.items()
        if name not in filled
    ]
    silent = [name for name in names if not _is_beginning(name, tensors)] if isinstance(names, Mapping) else []
    silent = [f"`names` has `{name}`, with which no key begins" for name in silent]
    _raise_unless_empty(
        type(module).__name__,
        [
            ("keys of the state dicts that stay unread", unread, "name the layer: names={'<PyTorch>': '<Flax>'}"),
            ("arrays of the Flax module that stay unfilled", unfilled, ""),
            ("names that are not used", silent, ""),
            ("shapes that do not fit", misfits, ""),
            (
                "axes whose order in PyTorch is not known",
                unclear,
                "state it for the layer that reads them, with sizes as the Flax module has them, channels last: "
                "permutations={'<layer>': (H, W, C)}; or None for the same order as in PyTorch",
            ),
        ],
    )
    return result


def _is_beginning(name: str, keys: Mapping[str, Any]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for key in keys)


def _raise_unless_empty(name: str, groups: Sequence[tuple[str, Sequence[str], str]]) -> None:
    text = []
    for title, rows, advice in groups:
        if rows:
            text.append(f"{title}{f' ({advice})' if advice else ''}:")
            text += [f"  {row}" for row in rows]
    if text:
        raise StateError(f"the state dicts and {name} do not fit together:\n" + "\n".join(text))


def _stack_arrays(
    members: Sequence[Mapping[str, Any]], placements: Mapping[str, tuple[str, Placement]]
) -> dict[str, np.ndarray]:
    """Returns the stacked arrays by name.

    **Raises:** `StateError` where two keys have different values for one array.
    """
    arrays: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    conflicts = []
    for key, (name, place) in placements.items():
        stacked = np.stack(
            [_place_array(member[key], place, f"member {k}, `{key}`") for k, member in enumerate(members)]
        )
        if name not in arrays:
            arrays[name], sources[name] = stacked, key
        elif arrays[name].tobytes() != stacked.tobytes():
            conflicts.append(f"`{sources[name]}` and `{key}` both go to `{name}`, with different values")
    if conflicts:
        raise StateError("the state dicts do not fit the Flax module:\n  " + "\n  ".join(conflicts))
    return arrays


def _place_array(value: Tensor | np.ndarray, place: Placement, what: str) -> np.ndarray:
    array = to_numpy(value, what) if isinstance(value, Tensor) else value
    return place.apply(cast_exactly(array, jax_dtype(array.dtype, what), what))
