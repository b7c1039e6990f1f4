"""Optax twins of PyTorch's optimizers, which make the same updates."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch

from jaxensemble.errors import InputError, UnsupportedError

Group = Mapping[str, Any]

IRRELEVANT = {"foreach", "capturable", "differentiable", "fused"}
"""Options without effect on PyTorch's updates. Keys of a group that are no default of the optimizer are schedulers'."""

SWEPT = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Numbers that may differ by member, and optax's names for them."""


def optimizer(torch_optimizer: torch.optim.Optimizer) -> optax.GradientTransformation:
    """Returns the optax optimizer that makes the same updates as a PyTorch optimizer: SGD, Adam, AdamW or RMSprop.

    It begins with a new state; [`train_state`][torch_bridge.train_state] also carries the state over. A schedule is no
    part of PyTorch's optimizer: the twin has the current learning rate, and `optax.scale_by_schedule` may follow.
    A complex number counts as two real ones; its gradient is the conjugate of what `jax.grad` gives.

    **Raises:** `UnsupportedError` for other optimizers and for options without a twin in optax, `InputError` for
    several parameter groups, which only `train_state` can distinguish.

    >>> model = torch.nn.Linear(3, 2)
    >>> twin = optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    >>> updates, _ = twin.update({"w": jnp.ones(2)}, twin.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})
    >>> [round(update, 6) for update in updates["w"].tolist()]
    [-0.0101, -0.0101]
    """
    if not isinstance(torch_optimizer, torch.optim.Optimizer):
        raise InputError(f"`torch_optimizer` must be one of torch.optim's; got {type(torch_optimizer).__name__}")
    groups = torch_optimizer.param_groups
    if len(groups) != 1:
        raise InputError(f"the optimizer has {len(groups)} parameter groups; use torch_bridge.train_state")
    return make_twin(torch_optimizer, groups[0])


def make_twin(
    torch_optimizer: torch.optim.Optimizer, group: Group, swept: Collection[str] = ()
) -> optax.GradientTransformation:
    """Returns the twin for one group of parameters. `swept` names the numbers that differ by member."""
    kind = type(torch_optimizer)
    if kind not in _RULES:
        known = ", ".join(known.__name__ for known in _RULES)
        raise UnsupportedError(f"there is no twin for {kind.__name__}, only for {known}: choose an optax optimizer")
    rule, supported = _RULES[kind]
    group = {name: group[name] for name in torch_optimizer.defaults if name in group}  # current values
    if kind is torch.optim.SGD and not group["momentum"]:
        del group["dampening"]  # dampening has no effect without momentum
    given = {name: value for name, value in group.items() if name not in IRRELEVANT | supported}
    wrong = [f"{name}={value!r}" for name, value in given.items() if value]
    if wrong:
        raise UnsupportedError(f"{kind.__name__} with {', '.join(wrong)} has no twin in optax")

    def make(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        ascent = [optax.scale(-1.0)] if group["maximize"] else []
        steps = [*ascent, *rule(group, _decay(weight_decay)), optax.scale_by_learning_rate(learning_rate)]
        return optax.contrib.split_real_and_imaginary(optax.chain(*steps))

    numbers = {ours: float(group[theirs]) for theirs, ours in SWEPT.items()}
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
"""Parts of the updates by kind of optimizer, with the options that they support. All other options must be off."""


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` with a precise correction of the bias.

    Optax computes `1 - b**count` in the parameters' own precision. In float32 that loses digits at the first steps,
    where the power is near 1; PyTorch computes it in float64.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count: Any = optax.safe_increment(state.count)
        grads = jax.tree.map(_widen, updates)
        mu = jax.tree.map(lambda g, m: b1 * _widen(m) + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * _widen(v) + (1 - b2) * g * g, grads, state.nu)

        def scaled(m: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
            first, second = (_bias_correction(b, count.astype(m.dtype)) for b in (b1, b2))
            return (m / first / (jnp.sqrt(v) / jnp.sqrt(second) + eps)).astype(g.dtype)

        kept = [optax.tree.cast_like(now, before) for now, before in ((mu, state.mu), (nu, state.nu))]
        return jax.tree.map(scaled, mu, nu, updates), optax.ScaleByAdamState(count, *kept)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def _widen(x: jax.Array) -> jax.Array:
    """Returns an array in float32 at least, in which PyTorch updates numbers of 16 bits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _bias_correction(b: float, count: jax.Array) -> jax.Array:
    """Returns `1 - b**count`, in full precision."""
    return -jnp.expm1(count * math.log(b)) if b else jnp.ones_like(count)
