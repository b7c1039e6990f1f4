"""State of PyTorch's optimizers, as the state from which a ported ensemble goes on training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError
from jaxensemble.modules.state import flatten, unflatten
from jaxensemble.network.weight_map import Entry, Origin
from jaxensemble.training import TrainState
from torch_bridge.members.same_network import list_members
from torch_bridge.members.stack import check_ensemble, stored_array
from torch_bridge.optimizers.twins import IRRELEVANT, SWEPT, Group, make_twin


def train_state(
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    ensemble: Ensemble,
    key: Any,
    *,
    schedule: optax.Schedule | None = None,
    dropout: Any = None,
    train: bool = True,
) -> TrainState:
    """Returns the state from which a ported ensemble goes on training, as each model would in PyTorch.

    **Arguments:**

    - `models`, `optimizers`: the members, and the optimizer of each, new or after some steps. Optimizers must be alike,
      except for learning rates and weight decays. Parameters that no optimizer has are frozen.
    - `ensemble`: the ported models, with their current parameters.
    - `schedule`: a factor of the current learning rates, by the number of steps from here on. PyTorch's schedules are
      no part of its optimizers.
    - `key`, `dropout`, `train`: as for `TrainState.create`.

    **Raises:** `InputError` for optimizers that differ or do not fit the models, `UnsupportedError` as
    `optimizer` does.

    >>> import torch_bridge
    >>> models = [nn.Linear(3, 2) for _ in range(4)]
    >>> ensemble = torch_bridge.to_ensemble(models, (torch.ones(8, 3),))
    >>> optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    >>> train_state(models, optimizers, ensemble, jax.random.key(0))
    TrainState(4 x Linear, 8 of 8 parameters trained, 0 steps)
    """
    members, origin = list_members(models), check_ensemble(ensemble).origin
    if schedule is not None and (not callable(schedule) or type(schedule).__module__.startswith("torch")):
        raise InputError(
            "`schedule` must be a function of the number of steps, for example optax.exponential_decay(1.0, 100, 0.9); "
            f"got {type(schedule).__name__}"
        )
    if not isinstance(origin, Origin):
        raise InputError("`ensemble` must be one that was ported from PyTorch")
    if not isinstance(optimizers, Sequence) or not all(isinstance(one, torch.optim.Optimizer) for one in optimizers):
        raise InputError(f"`optimizers` must be a sequence of torch.optim's optimizers; got {optimizers!r:.100}")
    if not len(members) == len(optimizers) == len(ensemble):
        raise InputError(
            f"`models`, `optimizers` and `ensemble` must have equal members; got {len(members)}, {len(optimizers)} and "
            f"{len(ensemble)}"
        )
    _check_weights(members, ensemble, origin)
    theirs = [_Member(*pair, origin, k) for k, pair in enumerate(zip(members, optimizers, strict=True))]
    _check_alike(theirs)
    group_of = theirs[0].group_of
    names = list(flatten(ensemble.params))
    frozen = {*names} - group_of.keys()
    part_of = {
        path: _Part(group_of[path], tuple(int(member.states[path].get("step", 0)) for member in theirs))
        for path in names
        if path not in frozen
    }
    parts = sorted({*part_of.values()}) or [_Part(0, (0,) * len(theirs))]
    numbers = [_swept_numbers([member.groups[part.group] for member in theirs]) for part in parts]
    twins = [
        make_twin(optimizers[0], theirs[0].groups[part.group], own) for part, own in zip(parts, numbers, strict=True)
    ]
    twin = twins[0]
    if len(twins) > 1:
        labels = unflatten({path: _part_label(parts.index(part)) for path, part in part_of.items()})
        twin = optax.partition({_part_label(k): twin for k, twin in enumerate(twins)}, labels)
    optimizer = optax.chain(twin, *([] if schedule is None else [optax.scale_by_schedule(schedule)]))
    state = TrainState.create(ensemble, optimizer, key, frozen=frozen, dropout=dropout, train=train)
    carried = _StateCarrier(theirs, parts, numbers, {entry.path: entry for entry in origin.weights.entries})
    of_twin, *others = state.opt_state
    return dataclasses.replace(state, opt_state=(jax.tree_util.tree_map_with_path(carried, of_twin), *others))


def _check_weights(members: Sequence[nn.Module], ensemble: Ensemble, origin: Origin) -> None:
    params = flatten(ensemble.params)
    arrays = {entry.path: np.asarray(params[entry.path]) for entry in origin.weights.entries if entry.path in params}
    wrong = []
    for k, member in enumerate(members):
        named = dict(member.named_parameters(remove_duplicate=False))
        wrong += [
            f"member {k}, {entry.keys[0]}"
            for entry in origin.weights.entries
            if entry.path in arrays and not _has_values(arrays[entry.path][k], entry, named.get(entry.keys[0]))
        ]
    if wrong:
        raise InputError(
            f"`ensemble` does not have the current parameters of the models: {', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''}. Port the models again, in this order."
        )


def _has_values(array: np.ndarray, entry: Entry, tensor: Tensor | None) -> bool:
    return tensor is not None and np.array_equal(array, stored_array(entry, tensor, entry.path), equal_nan=True)


class _Member:
    """Optimizer of one member, with parameters by their paths in the ported network."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, origin: Origin, member: int):
        self.kind, self.defaults = type(optimizer), list(optimizer.defaults)
        self.groups: Sequence[Group] = optimizer.param_groups
        self.group_of: dict[str, int] = {}
        self.states: dict[str, Group] = {}
        names = {id(param): name for name, param in model.named_parameters(remove_duplicate=False)}
        for k, group in enumerate(self.groups):
            strangers = [list(param.shape) for param in group["params"] if id(param) not in names]
            if strangers:
                raise InputError(
                    f"the optimizer of member {member} has parameters that are not the model's, of shapes {strangers}"
                )
            for param in group["params"]:
                if param.requires_grad:
                    path = origin.weights.by_key[names[id(param)]].path
                    self.group_of[path] = k
                    self.states[path] = optimizer.state.get(param, {})


def _check_alike(members: Sequence[_Member]) -> None:
    first = members[0]
    wrong = []
    for k, member in enumerate(members[1:], 1):
        if member.kind is not first.kind:
            wrong.append(f"member {k}: {member.kind.__name__} for {first.kind.__name__}")
        elif member.group_of != first.group_of or len(member.groups) != len(first.groups):
            wrong.append(f"member {k}: other parameters, or other groups of them")
        else:
            wrong += [
                f"member {k}, group {at}: {name}={group[name]!r} for {other[name]!r}"
                for at, (group, other) in enumerate(zip(member.groups, first.groups, strict=True))
                for name in member.defaults
                if name not in IRRELEVANT | SWEPT.keys() and group[name] != other[name]
            ]
    if wrong:
        raise InputError(
            "the members' optimizers must be alike, except for learning rates and weight decays; these differ from "
            "member 0\n  " + "\n  ".join(wrong)
        )


def _swept_numbers(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Returns the numbers that differ by member, by optax's names."""
    numbers = {
        SWEPT[name]: np.array([float(group[name]) for group in groups])
        for name in SWEPT
        if all(name in group for group in groups)
    }
    return {name: values for name, values in numbers.items() if (values != values[0]).any()}


class _Part(NamedTuple):
    """Parameters of one group with equal numbers of steps: parameters that were unfrozen later have made fewer."""

    group: int
    steps: tuple[int, ...]


def _part_label(part: int) -> str:
    return f"part {part}"


_FIELDS = {
    "mu": ("exp_avg", "grad_avg"),
    "nu": ("exp_avg_sq", "square_avg"),
    "trace": ("momentum_buffer",),
    "count": ("step",),
}
"""Names of PyTorch's states, by optax's names."""


class _StateCarrier:
    """Function that gives every array of an optax state from the states of PyTorch's optimizers."""

    def __init__(
        self,
        members: Sequence[_Member],
        parts: Sequence[_Part],
        numbers: Sequence[Mapping[str, np.ndarray]],
        entries: Mapping[str, Entry],
    ):
        self._members, self._parts, self._numbers, self._entries = members, parts, numbers, entries

    def __call__(self, path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        names = [str(getattr(part, "name", getattr(part, "key", ""))) for part in path]
        part = next((k for k in range(len(self._parts)) if _part_label(k) in names), 0)
        if "hyperparams" in names:
            return jnp.asarray(self._numbers[part][names[-1]], leaf.dtype)
        at = next(k for k, name in enumerate(names) if name in _FIELDS)
        if names[at] == "count":
            return jnp.asarray(self._parts[part].steps, leaf.dtype)
        place = ".".join(str(key.key) for key in path[at + 1 :] if isinstance(key, jax.tree_util.DictKey))
        arrays = [self._array(k, place, names[at], leaf) for k in range(len(self._members))]
        part = np.imag if path[-1] == jax.tree_util.GetAttrKey("imaginary") else np.real  # of complex numbers
        return jnp.array(part(np.stack(arrays)), leaf.dtype)

    def _array(self, member: int, path: str, field: str, leaf: jax.Array) -> np.ndarray:
        state = self._members[member].states[path]
        tensor = next((state[name] for name in _FIELDS[field] if isinstance(state.get(name), Tensor)), None)
        if tensor is None:  # before the first step
            return np.zeros(leaf.shape[1:], leaf.dtype)
        return stored_array(self._entries[path], tensor, f"member {member}, `{path}`")
