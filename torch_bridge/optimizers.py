"""The optax twins of PyTorch's optimizers, which make the same updates, and their state carried over."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, UnsupportedError
from jaxensemble.origin import Entry, Origin
from jaxensemble.state import flatten, unflatten
from jaxensemble.training import TrainState
from jaxensemble.training.state import idle
from torch_bridge.members import as_members
from torch_bridge.stacking import stored_array

Group = Mapping[str, Any]

_IRRELEVANT = {"foreach", "capturable", "differentiable", "fused"}
"""What of a parameter group is about how PyTorch computes. Keys that are no default of an optimizer are schedulers'."""

_SWEPT = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Numbers that may differ by member, and optax's names for them."""


def optimizer(torch_optimizer: torch.optim.Optimizer) -> optax.GradientTransformation:
    """The optax optimizer that makes the same updates as one of PyTorch's: SGD, Adam, AdamW or RMSprop.

    It begins as a new one; [`train_state`][torch_bridge.train_state] carries the state over, too. A schedule is no part
    of PyTorch's optimizer: the learning rate is the one it has now.

    **Raises:** `UnsupportedError` for other optimizers and for options that optax has no twin for, `InputError` for
    several parameter groups, which only `train_state` can tell apart.

    >>> model = nn.Linear(3, 2)
    >>> twin = optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    >>> updates, _ = twin.update({"w": jnp.ones(2)}, twin.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})
    >>> [round(update, 6) for update in updates["w"].tolist()]
    [-0.0101, -0.0101]
    """
    groups = torch_optimizer.param_groups
    if len(groups) != 1:
        raise InputError(f"the optimizer has {len(groups)} parameter groups; use torch_bridge.train_state")
    return _twin(torch_optimizer, groups[0], {})


def train_state(
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    ensemble: Ensemble,
    key: Any,
    *,
    dropout: Any = None,
    train: bool = True,
) -> TrainState:
    """The state from which a ported ensemble trains on, as each of PyTorch's models would with its optimizer.

    **Arguments:**

    - `models`, `optimizers`: the members, and the optimizer of each, fresh or after some steps. They must be alike but
      for learning rates and weight decays. Parameters that no optimizer has are frozen.
    - `ensemble`: what the models were ported to, with the parameters they have now.
    - `key`, `dropout`, `train`: as for `TrainState.create`.

    **Raises:** `InputError` for optimizers that differ or do not fit the models, `UnsupportedError` as `optimizer`.

    >>> import torch_bridge
    >>> models = [nn.Linear(3, 2) for _ in range(4)]
    >>> ensemble = torch_bridge.to_ensemble(models, (torch.ones(8, 3),))
    >>> optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    >>> train_state(models, optimizers, ensemble, jax.random.key(0))
    TrainState(4 x Linear, 8 of 8 parameters trained, 0 steps)
    """
    members, origin = as_members(models), ensemble.origin
    if not isinstance(origin, Origin):
        raise InputError("`ensemble` must be one that was ported from PyTorch")
    if not len(members) == len(optimizers) == len(ensemble):
        raise InputError(
            f"`models`, `optimizers` and `ensemble` must have equal members; got {len(members)}, {len(optimizers)} and "
            f"{len(ensemble)}"
        )
    _check_weights(members, ensemble, origin)
    theirs = [_Member(*pair, origin, k) for k, pair in enumerate(zip(members, optimizers, strict=True))]
    _check_alike(theirs)
    numbers = [_swept([member.groups[k] for member in theirs]) for k in range(len(theirs[0].groups))]
    twins = [_twin(optimizers[0], *pair) for pair in zip(theirs[0].groups, numbers, strict=True)]
    group_of = theirs[0].group_of
    names = list(flatten(ensemble.params))
    frozen = {*names} - group_of.keys() | {*idle(ensemble.network, names)}
    twin = twins[0]
    if len(twins) > 1:
        labels = unflatten({path: _label(group_of[path]) for path in names if path not in frozen})
        twin = optax.partition({_label(k): twin for k, twin in enumerate(twins)}, labels)
    state = TrainState.create(ensemble, twin, key, frozen=frozen, dropout=dropout, train=train)
    carried = _Carried(theirs, numbers, {entry.path: entry for entry in origin.weights.entries})
    opt_state = jax.tree_util.tree_map_with_path(carried, state.opt_state)
    return dataclasses.replace(state, opt_state=opt_state)


def _check_weights(members: Sequence[nn.Module], ensemble: Ensemble, origin: Origin) -> None:
    params = flatten(ensemble.params)
    arrays = {entry.path: np.asarray(params[entry.path]) for entry in origin.weights.entries if entry.path in params}
    wrong = []
    for k, member in enumerate(members):
        named = dict(member.named_parameters(remove_duplicate=False))
        wrong += [
            f"member {k}, {entry.keys[0]}"
            for entry in origin.weights.entries
            if entry.path in arrays and not _same(entry, named[entry.keys[0]], arrays[entry.path][k])
        ]
    if wrong:
        raise InputError(
            f"`ensemble` has not the parameters that the models have now: {', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''}. Port the models again, in this order."
        )


def _same(entry: Entry, tensor: Tensor, array: np.ndarray) -> bool:
    theirs = stored_array(entry, tensor, entry.path)
    return theirs.shape == array.shape and bool(((theirs == array) | ((theirs != theirs) & (array != array))).all())


class _Member:
    """One member's optimizer, its parameters by the paths they have in the ported network."""

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
            wrong.append(f"member {k}: other parameters, or others in each group")
        else:
            wrong += [
                f"member {k}, group {at}: {name}={group[name]!r} for {other[name]!r}"
                for at, (group, other) in enumerate(zip(member.groups, first.groups, strict=True))
                for name in member.defaults
                if name not in _IRRELEVANT | _SWEPT.keys() and group[name] != other[name]
            ]
    if wrong:
        raise InputError(
            "the members' optimizers must be alike but for learning rates and weight decays; those of member 0 are "
            "not\n  " + "\n  ".join(wrong)
        )


def _swept(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """The numbers that differ by member, by optax's names."""
    numbers = {_SWEPT[name]: np.array([float(group[name]) for group in groups]) for name in _SWEPT}
    return {name: values for name, values in numbers.items() if (values != values[0]).any()}


def _label(group: int) -> str:
    return f"group {group}"


_FIELDS = {
    "mu": ("exp_avg", "grad_avg"),
    "nu": ("exp_avg_sq", "square_avg"),
    "trace": ("momentum_buffer",),
    "count": ("step",),
}
"""What optax's states call what PyTorch's call so."""


class _Carried:
    """Every array of an optax state, as PyTorch's optimizers have it."""

    def __init__(
        self, members: Sequence[_Member], numbers: Sequence[Mapping[str, np.ndarray]], entries: Mapping[str, Entry]
    ):
        self._members, self._numbers, self._entries = members, numbers, entries

    def __call__(self, path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        names = [str(getattr(part, "name", getattr(part, "key", ""))) for part in path]
        group = next((int(name.removeprefix("group ")) for name in names if name.startswith("group ")), 0)
        if "hyperparams" in names:
            return jnp.asarray(self._numbers[group][names[-1]], leaf.dtype)
        at = next(k for k, name in enumerate(names) if name in _FIELDS)
        if names[at] == "count":
            return jnp.asarray([self._steps(member, group) for member in self._members], leaf.dtype)
        return jnp.stack(
            [self._array(k, ".".join(names[at + 1 :]), names[at], leaf) for k in range(len(self._members))]
        )

    def _array(self, member: int, path: str, field: str, leaf: jax.Array) -> jax.Array:
        state = self._members[member].states[path]
        tensor = next((state[name] for name in _FIELDS[field] if isinstance(state.get(name), Tensor)), None)
        if tensor is None:  # before the first step
            return jnp.zeros(leaf.shape[1:], leaf.dtype)
        return jnp.array(stored_array(self._entries[path], tensor, f"member {member}, `{path}`"), leaf.dtype)

    @staticmethod
    def _steps(member: _Member, group: int) -> int:
        states = [member.states[path] for path, k in member.group_of.items() if k == group]
        steps = {int(state["step"]) for state in states if "step" in state} or {0}
        if len(steps) > 1:
            raise InputError(f"parameters of one group have made different numbers of steps: {sorted(steps)}")
        return steps.pop()


def _twin(
    torch_optimizer: torch.optim.Optimizer, group: Group, swept: Mapping[str, np.ndarray]
) -> optax.GradientTransformation:
    """The twin for one group of parameters; `swept` names the numbers that members have of their own."""
    kind = type(torch_optimizer)
    if kind not in _RULES:
        known = ", ".join(known.__name__ for known in _RULES)
        raise UnsupportedError(f"there is no twin for {kind.__name__}, only for {known}: choose an optax optimizer")
    rule, supported = _RULES[kind]
    group = {name: group[name] for name in torch_optimizer.defaults if name in group}  # as they are now
    given = {name: value for name, value in group.items() if name not in _IRRELEVANT | supported}
    wrong = [f"{name}={value!r}" for name, value in given.items() if value]
    if wrong:
        raise UnsupportedError(f"{kind.__name__} with {', '.join(wrong)} has no twin in optax")

    def make(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        ascent = [optax.scale(-1.0)] if group["maximize"] else []
        return optax.chain(*ascent, *rule(group, _decay(weight_decay)), optax.scale_by_learning_rate(learning_rate))

    numbers = {ours: float(group[theirs]) for theirs, ours in _SWEPT.items()}
    if not swept:
        return make(**numbers)
    return optax.inject_hyperparams(make, static_args=[name for name in numbers if name not in swept])(**numbers)


Parts = list[optax.GradientTransformation]


def _decay(weight_decay: Any) -> Parts:
    none = isinstance(weight_decay, float) and weight_decay == 0
    return [] if none else [optax.add_decayed_weights(weight_decay)]


def _sgd(group: Group, decay: Parts) -> Parts:
    momentum = [optax.trace(group["momentum"], group["nesterov"])] if group["momentum"] else []
    return [*decay, *momentum]


def _adam(group: Group, decay: Parts) -> Parts:
    b1, b2 = map(float, group["betas"])
    scale = _scale_by_adam(b1, b2, group["eps"])
    return [scale, *decay] if group["decoupled_weight_decay"] else [*decay, scale]


def _rmsprop(group: Group, decay: Parts) -> Parts:
    scale: Any = optax.scale_by_stddev if group["centered"] else optax.scale_by_rms
    momentum = [optax.trace(group["momentum"])] if group["momentum"] else []
    return [*decay, scale(decay=group["alpha"], eps=group["eps"], eps_in_sqrt=False), *momentum]


_COMMON = {"lr", "weight_decay", "maximize"}
_ADAM = _COMMON | {"betas", "eps", "decoupled_weight_decay"}

_RULES: dict[type[torch.optim.Optimizer], tuple[Callable[[Group, Parts], Parts], set[str]]] = {
    torch.optim.SGD: (_sgd, _COMMON | {"momentum", "nesterov"}),
    torch.optim.Adam: (_adam, _ADAM),
    torch.optim.AdamW: (_adam, _ADAM),
    torch.optim.RMSprop: (_rmsprop, _COMMON | {"alpha", "eps", "momentum", "centered"}),
}
"""By kind: what its updates are made of, and the options that this takes account of. Others must be off."""


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`, which corrects the bias by `1 - b**count` in the parameters' own precision.

    In float32 that loses digits at the first steps, where the power is near 1; PyTorch computes it in float64.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count: Any = optax.safe_increment(state.count)
        grads = jax.tree.map(_wide, updates)
        mu = jax.tree.map(lambda g, m: b1 * _wide(m) + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * _wide(v) + (1 - b2) * g * g, grads, state.nu)

        def scaled(m: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
            first, second = (_bias_correction(b, count.astype(m.dtype)) for b in (b1, b2))
            return (m / first / (jnp.sqrt(v) / jnp.sqrt(second) + eps)).astype(g.dtype)

        kept = [optax.tree.cast_like(now, before) for now, before in ((mu, state.mu), (nu, state.nu))]
        return jax.tree.map(scaled, mu, nu, updates), optax.ScaleByAdamState(count, *kept)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def _wide(x: jax.Array) -> jax.Array:
    """In float32 at least, in which PyTorch's numbers of 16 bits are updated."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _bias_correction(b: float, count: jax.Array) -> jax.Array:
    """`1 - b**count`, in full precision."""
    return -jnp.expm1(count * math.log(b)) if b else jnp.ones_like(count)
