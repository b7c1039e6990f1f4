"""One training step of all members, as one program: a few members at a time if memory or the device requires it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxensemble.devices.placement import SHARED
from jaxensemble.errors import InputError
from jaxensemble.running.compiled import is_within_trace
from jaxensemble.running.compilers import compile_with
from jaxensemble.running.device import default_device
from jaxensemble.running.members import run_in_steps
from jaxensemble.running.offload import check_offload, join_groups, run_groups, take_group, write_groups
from jaxensemble.running.plan import Plan
from jaxensemble.training.data import as_data, put_data
from jaxensemble.training.losses import Loss, check_function
from jaxensemble.training.members import MemberUpdate, TrainingStep
from jaxensemble.training.planning import make_step
from jaxensemble.training.state import TrainState, replace_trained, select_members, trained_parameters


def train_step(
    state: TrainState,
    inputs: Any,
    targets: Any,
    *,
    loss: Loss,
    each: bool = False,
    rows: Any = None,
    plan: Plan | None = None,
) -> tuple[TrainState, jax.Array]:
    """Makes one step of all members: gradients of the loss, the optimizer's update, and the buffers after the call.

    **Arguments:**

    - `inputs`: one array; or the arguments of one call of the ensemble, as a tuple or, by name, as a dict.
    - `targets`: an array or a tree of arrays, whose first axis is the rows.
    - `loss`: a function of one member's outputs and the targets, which returns a number, the mean over the rows. It is
      compiled into the step: pass the same function at every step, not a new lambda.
    - `each`: whether every member has inputs and targets of its own, `[M, N, ...]`.
    - `rows`: indices `[N]` of the rows of `inputs` and `targets` that are this step's minibatch, or `[M, N]`, a
      minibatch for every member. They are taken within the program, so that the data of all steps may stay in place.
    - `plan`: how many members are trained at once, and how many rows; see [`Plan`][jaxensemble.Plan]. Gradients of some
      rows at a time are added up, which only networks that keep rows apart allow. By default, a plan that suits memory
      and the device.

    **Returns:** the next state, and the losses before the step, `[M]`.

    **Raises:** `InputError` for inputs, rows, losses or plans that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from flax import nnx
    >>> from jaxensemble import Ensemble
    >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 1, rngs=nnx.Rngs(seed)) for seed in range(4)])
    >>> state = TrainState.create(ensemble, optax.sgd(0.1), jax.random.key(0))
    >>> x, y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")
    >>> def loss(outputs, targets):
    ...     return jnp.mean((outputs - targets) ** 2)
    >>> for _ in range(20):
    ...     state, losses = train_step(state, x, y, loss=loss)
    >>> losses.shape, bool((losses < 1e-3).all())
    ((4,), True)
    """
    check_state(state)
    check_function(loss, "loss")
    data, rows = as_data(state.ensemble, inputs, targets, rows, each=each)
    data, rows = put_data(state.ensemble, data, rows, each=each)
    after, losses = run_step(state, data, rows, None, step=make_step(state, data, rows, loss, each=each, plan=plan))
    return after.trained_from(state), losses if state.ensemble.placement is None else state.ensemble.placement.cut(
        losses
    )


def check_state(state: Any) -> None:
    """Checks that `state` is a `TrainState`.

    **Raises:** `InputError` if it is not.
    """
    if not isinstance(state, TrainState):
        raise InputError(f"`state` must be a TrainState, which TrainState.create makes; got {type(state).__name__}")


def run_step(
    state: TrainState, data: Any, rows: Any, active: Any, *, step: TrainingStep
) -> tuple[TrainState, jax.Array]:
    """Returns the next state and the losses. `active`: which members are trained, `[M]`; None for all."""
    if step.call.plan.offload:
        return _stream(next_state, state, data, rows, active, step=step, axis=0)
    return compile_step(next_state, step)(state, data, rows, active, step=step)


def compile_step(function: Callable[..., Any], step: TrainingStep) -> Any:
    """Returns `jax.jit` of a function of a step, with the settings of XLA's compiler that its plan names."""
    return compile_with(function, step.call.plan.compiler, step.call.platform, "step")


def next_state(
    state: TrainState, data: Any, rows: Any, active: Any, *, step: TrainingStep
) -> tuple[TrainState, jax.Array]:
    """The function that `run_step` compiles."""
    ensemble = state.ensemble
    before = trained_parameters(ensemble.params, state.frozen), ensemble.buffers, state.opt_state
    own = (data if step.own_data else None, rows if step.own_rows else None)
    common = (None if step.own_data else data, None if step.own_rows else rows)
    stacked = (before, ensemble.params, ensemble.rngs, state.keys, state.rates, own)
    function = functools.partial(_update_members, step=step, optimizer=state.optimizer)
    shared = (ensemble.constants, state.steps)
    if step.call.placement is not None:
        function = _over_devices(function, step, stacked, common, indexed=rows is not None)
    after, losses = function(stacked, shared, common)
    if active is not None:
        after = select_members(active, after, before)
    params, buffers, opt_state = after
    ensemble = dataclasses.replace(ensemble, params=replace_trained(ensemble.params, params), buffers=buffers)
    return dataclasses.replace(state, ensemble=ensemble, opt_state=opt_state, steps=state.steps + 1), losses


def _update_members(
    stacked: Any, shared: Any, common: Any, *, step: TrainingStep, optimizer: optax.GradientTransformation
) -> tuple[Any, jax.Array]:
    """Updates the members of one device, a few at a time if the plan says so."""
    leaves, plan = jax.tree.leaves(stacked), step.call.plan
    members = leaves[0].shape[0]
    size = min(plan.members or members, members)
    constants, steps = shared
    update = MemberUpdate(step, optimizer, constants, steps, common, size)
    return run_in_steps(update, stacked, (0,) * len(leaves), 0, size, plan.unroll)


def _over_devices(
    function: Callable[..., Any], step: TrainingStep, stacked: Any, common: Any, *, indexed: bool
) -> Callable[..., Any]:
    """Runs `_update_members` on every device of the mesh, with its members and rows.

    Where rows are chosen by indices, a device has all data and the indices of its own rows.
    """
    placement = step.call.placement
    assert placement is not None

    def specs(given: tuple[Any, Any], *, each: bool) -> Any:
        leaves, tree = jax.tree.flatten(given[0])
        axes = step.given if leaves and not indexed else (None,) * len(leaves)
        data = [placement.spec(axis, each=each) for axis in axes]
        return jax.tree.unflatten(tree, data), None if given[1] is None else placement.spec(0, each=each)

    *rest, own = stacked
    in_specs = ((*[placement.stacked] * len(rest), specs(own, each=True)), SHARED, specs(common, each=False))
    return placement.map(function, in_specs, placement.stacked)


def run_steps(
    state: TrainState, data: Any, order: Any, active: Any, *, step: TrainingStep
) -> tuple[TrainState, jax.Array]:
    """Returns the state after a step for each minibatch in `order`, `[S, N]` or `[S, M, N]`; and the losses, `[S, M]`.

    All steps are one program, which keeps the state in place instead of new memory for every step.

    **Raises:** `InputError` for an optimizer whose state changes its shapes or dtypes.
    """
    if step.call.plan.offload:
        return _stream(state_after, state, data, order, active, step=step, axis=1)
    return compile_step(state_after, step)(state, data, order, active, step=step)


def _stream(
    function: Callable[..., Any], state: TrainState, data: Any, rows: Any, active: Any, *, step: TrainingStep, axis: int
) -> tuple[TrainState, jax.Array]:
    """Returns what a function of a step returns, with members on the device in turn.

    `axis` is that of the members in the losses, and in `rows` where members have their own.

    **Raises:** `InputError` within transformations, and for members on a mesh.
    """
    plan, traced = step.call.plan, is_within_trace((state, data, rows))
    check_offload(plan, traced=traced, placement=state.ensemble.placement)
    device, members, size = default_device(), len(state.ensemble), min(plan.members or 1, len(state.ensemble))
    inner = dataclasses.replace(plan, members=None, offload=False)
    step = dataclasses.replace(step, call=dataclasses.replace(step.call, plan=inner, platform=device.platform))
    data, constants, steps = jax.device_put((data, state.ensemble.constants, state.steps), device)
    run = compile_step(function, step)

    def train(start: int) -> Any:
        chosen = slice(start, start + size)
        part = state.map_members(lambda tree: take_group(tree, start, size, device))
        ensemble = dataclasses.replace(part.ensemble, constants=constants)
        part = dataclasses.replace(part, ensemble=ensemble, steps=steps)
        own_data = jax.tree.map(lambda leaf: leaf[chosen], data) if step.own_data else data
        own_rows = rows[(slice(None),) * axis + (chosen,)] if step.own_rows else rows
        own_active = None if active is None else take_group(active, start, size, device)
        after, losses = run(part, own_data, own_rows, own_active, step=step)
        changed = after.ensemble.params, after.ensemble.buffers, after.opt_state
        return changed, jnp.moveaxis(losses, axis, 0), after.steps

    found = [(start, *result) for start, result in map(_to_host, run_groups(train, members, size))]
    like = state.ensemble.params, state.ensemble.buffers, state.opt_state
    params, buffers, opt_state = write_groups(((start, tree) for start, tree, _, _ in found), like)
    ensemble = dataclasses.replace(state.ensemble, params=params, buffers=buffers)
    counted = jax.device_put(found[0][-1], state.steps.sharding)
    after = dataclasses.replace(state, ensemble=ensemble, opt_state=opt_state, steps=counted)
    return after, jnp.moveaxis(join_groups((start, losses) for start, _, losses, _ in found), 0, axis)


def _to_host(part: tuple[int, Any]) -> tuple[int, Any]:
    """Returns the result of `train` with the members' arrays on the host, so that they leave the device at once."""
    start, (changed, losses, steps) = part
    return start, (jax.tree.map(np.asarray, changed), losses, steps)


def state_after(
    state: TrainState, data: Any, order: Any, active: Any, *, step: TrainingStep
) -> tuple[TrainState, jax.Array]:
    """The function that `run_steps` compiles."""

    def one(before: TrainState, rows: Any) -> tuple[TrainState, jax.Array]:
        after, losses = next_state(before, data, rows, active, step=step)
        kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree.opt_state)] for tree in (before, after)]
        if kinds[0] != kinds[1]:
            raise InputError("`fit` needs an optimizer whose state keeps its shapes and dtypes from step to step")
        return after, losses

    return lax.scan(one, state, order)
