"""One training step of all members, as one program: a few members at a time where memory or the device wants it so."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax

from jaxensemble.compat import JaxprEqn, Literal, Program
from jaxensemble.errors import InputError
from jaxensemble.modules.state import Tree, flatten, merge, split, unflatten
from jaxensemble.network.inputs import batch_axes
from jaxensemble.programs.cpu.training import for_training
from jaxensemble.programs.rewrite import peak_bytes
from jaxensemble.running.case import SMALL, Case, planned
from jaxensemble.running.device import device_of, free_memory
from jaxensemble.running.members import Call, in_steps
from jaxensemble.running.plan import Plan, fits, guess
from jaxensemble.training.augmentation import Augment, check_draws
from jaxensemble.training.data import as_data, check_data
from jaxensemble.training.losses import Loss, check_function, check_is_mean, name_of, number_of, warn_of_pairs
from jaxensemble.training.members import Members, Step
from jaxensemble.training.state import TrainState, of_members, trained, with_trained


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
    """One step of all members: gradients of the loss, the optimizer's update, and the buffers that the call left.

    **Arguments:**

    - `inputs`: one array; or the arguments of one call, as the ensemble takes them, as a tuple or, by name, as a dict.
    - `targets`: an array or a tree of arrays, whose first axis is the rows.
    - `loss`: of one member's outputs and the targets, a number: the mean over the rows. It is part of what is compiled:
      pass the same function at every step, not a new lambda.
    - `each`: whether every member has inputs and targets of its own, `[M, N, ...]`.
    - `rows`: indices `[N]` of the rows of `inputs` and `targets` that are this step's minibatch, or `[M, N]`, those of
      every member. They are taken within the program, so that the data of all steps may stay where it is.
    - `plan`: how many members are trained at once, and how many rows (whose gradients are then added up, which only
      networks allow that keep rows apart); see [`Plan`][jaxensemble.Plan]. Without, what memory and the device want.

    **Returns:** the next state, and the losses before the step, `[M]`.

    **Raises:** `InputError` for inputs, rows, losses or plans that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
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
    checked(state)
    check_function(loss, "loss")
    data, rows = as_data(state.ensemble, inputs, targets, rows, each=each)
    after, losses = stepped(state, data, rows, None, step=step_for(state, data, rows, loss, each=each, plan=plan))
    return after.trained_from(state), losses


def checked(state: Any) -> None:
    """Raises `InputError` for anything but a state."""
    if not isinstance(state, TrainState):
        raise InputError(f"`state` must be what TrainState.create makes; got {type(state).__name__}")


def step_for(
    state: TrainState,
    data: Any,
    rows: Any,
    loss: Loss,
    *,
    each: bool,
    plan: Plan | None,
    augment: Augment | None = None,
) -> Step:
    """The step for such data, under the plan that was asked for, or under one that fits."""
    step, case, targets = begun(state, data, rows, loss, each=each, augment=augment)
    leaves, tree = jax.tree.flatten(targets)
    chosen, idle = _chosen(case, loss, tuple(leaves), tree, state.frozen, plan)
    return dataclasses.replace(step, call=dataclasses.replace(step.call, plan=chosen), idle=idle)


def begun(
    state: TrainState, data: Any, rows: Any, loss: Loss, *, each: bool, augment: Augment | None
) -> tuple[Step, Case, Any]:
    """A step without a plan, its case, and one member's targets, as shapes and dtypes."""
    inputs, targets = data
    own_rows = rows is not None and rows.ndim == 2
    device = device_of(state.ensemble.params)
    ported = state.ensemble.network is not None
    own = each or own_rows or augment is not None
    call = Call(state.training, device.platform, each=own, update=True, ported=ported)
    given = batch_axes(state.ensemble.network, inputs, each=each) + (0,) * len(jax.tree.leaves(targets))
    step = Step(call, loss, given, given, each, own_rows, augment=augment)
    as_given = rows is None and augment is None
    if augment is not None:
        check_draws(lambda: jax.make_jaxpr(lambda *given: step.minibatch(*given))(data, rows, state.keys))
    inputs, targets = data if as_given else jax.eval_shape(step.minibatch, data, rows, state.keys)
    if augment is not None:
        try:
            check_data(state.ensemble, inputs, targets, each=True)
        except InputError as error:
            raise InputError(f"what `augment` gives back does not fit: {error.details}") from error
    axes = batch_axes(state.ensemble.network, inputs, each=own)
    step = dataclasses.replace(step, axes=axes + (0,) * len(jax.tree.leaves(targets)))
    ensemble, key = state.ensemble, jax.ShapeDtypeStruct((), state.keys.dtype)
    buffers = unflatten(flatten(ensemble.buffers) | state.rates)
    arrays = (ensemble.params, buffers, ensemble.rngs, ensemble.constants, key, inputs)
    case = Case.of(call, device, arrays, axes)
    targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[call.each :], leaf.dtype), targets)
    return step, case, targets


@functools.lru_cache(maxsize=256)
def _chosen(
    case: Case, loss: Loss, targets: Any, tree: Any, frozen: frozenset[str], plan: Plan | None
) -> tuple[Plan, frozenset[str]]:
    """The plan, and the parameters that the loss does not reach."""
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"`plan` must be a jaxensemble.Plan or None; got {plan!r}")
    program, idle = gradient_program(case, loss, tree.unflatten(targets), frozen)
    if idle >= flatten(trained(case.one_member()[0], frozen)).keys():
        raise InputError(
            f"{name_of(loss)} has no gradient with respect to any parameter: a loss must be made "
            "of differentiable steps, unlike an accuracy"
        )
    if plan is None:
        free = free_memory(case.device)
        load = dataclasses.replace(case.load, rows=None, peak=peak_bytes(program))
        small = case.input_bytes <= SMALL and fits(Plan(), load, free)
        return Plan() if small else guess(load, free), idle
    if plan.rows is None or case.rows is None or plan.rows >= case.rows:
        return dataclasses.replace(plan, rows=None), idle
    still = _without_dropout(case)
    axes = planned(still, dataclasses.replace(plan, members=None)).rows_out  # raises if rows are mixed
    check_is_mean(loss, still.outputs_of(plan.rows), tree.unflatten(targets), (*axes, *[0] * len(targets)), plan.rows)
    return plan, idle


def gradient_program(case: Case, loss: Loss, targets: Any, frozen: frozenset[str]) -> tuple[Program, frozenset[str]]:
    """What one member's gradient computes, and the parameters whose gradient JAX knows to be zero."""
    params, buffers, rngs, constants, key, inputs = case.one_member()

    def member(params: Tree, buffers: Tree, rngs: Tree, key: Any, data: Any) -> Any:
        outputs, after = case.call.member(params, buffers, rngs, constants, key, data[0], vmapped=None)
        number = number_of(loss, outputs, data[1])
        warn_of_pairs(loss, outputs, data[1])
        return number, after

    one = for_training(member) if case.call.platform == "cpu" else member

    def objective(params: Tree, everything: Tree, *others: Any) -> Any:
        return one(with_trained(everything, params), *others)

    arguments = (trained(params, frozen), params, buffers, rngs, key, (inputs, targets))
    program = jax.make_jaxpr(jax.grad(objective, has_aux=True))(*arguments)
    zeros = {step.outvars[0] for step in program.eqns if step.primitive.name == "broadcast_in_dim" and _zero(step)}
    names = jax.tree.leaves(unflatten({name: name for name in flatten(arguments[0])}))
    gradients = zip(names, program.outvars[: len(names)], strict=True)
    return program, frozenset(name for name, var in gradients if isinstance(var, Literal) or var in zeros)


def _zero(step: JaxprEqn) -> bool:
    return isinstance(step.invars[0], Literal) and not np.any(step.invars[0].val)


def _without_dropout(case: Case) -> Case:
    """The same without random numbers, which keep no rows apart: what they are for a row is not told by the others."""
    params, buffers, rngs, constants, _, _ = case.one_member()
    module = merge(case.call.graphdef, params, buffers, constants, rngs)
    for _, layer in nnx.iter_modules(module):
        if "rngs" in vars(layer) and hasattr(layer, "deterministic"):
            layer.deterministic = True  # type: ignore[attr-defined]
    call = dataclasses.replace(case.call, graphdef=split(module).graphdef, update=False)
    return dataclasses.replace(case, call=call)


@functools.partial(jax.jit, static_argnames=("step",))
def stepped(state: TrainState, data: Any, rows: Any, active: Any, *, step: Step) -> tuple[TrainState, jax.Array]:
    """The next state and the losses. `active` tells which members are trained, `[M]`; all of them for None."""
    ensemble, plan = state.ensemble, step.call.plan
    before = trained(ensemble.params, state.frozen), ensemble.buffers, state.opt_state
    own = (data if step.own_data else None, rows if step.own_rows else None)
    common = (None if step.own_data else data, None if step.own_rows else rows)
    stacked = (before, ensemble.params, ensemble.rngs, state.keys, state.rates, own)
    size = min(plan.members or len(ensemble), len(ensemble))
    members = Members(step, state.optimizer, ensemble.constants, state.steps, common, size)
    after, losses = in_steps(members, stacked, (0,) * len(jax.tree.leaves(stacked)), 0, size, plan.unroll)
    if active is not None:
        after = of_members(active, after, before)
    params, buffers, opt_state = after
    ensemble = dataclasses.replace(ensemble, params=with_trained(ensemble.params, params), buffers=buffers)
    return dataclasses.replace(state, ensemble=ensemble, opt_state=opt_state, steps=state.steps + 1), losses


@functools.partial(jax.jit, static_argnames=("step",))
def stepped_through(
    state: TrainState, data: Any, order: Any, active: Any, *, step: Step
) -> tuple[TrainState, jax.Array]:
    """The state after a step for each of the minibatches in `order`, `[S, N]` or `[S, M, N]`; the losses, `[S, M]`.

    One program for all of them: the state stays where it is, in place of a new one in new memory for every step.
    """

    def one(before: TrainState, rows: Any) -> tuple[TrainState, jax.Array]:
        after, losses = stepped(before, data, rows, active, step=step)
        kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree.opt_state)] for tree in (before, after)]
        if kinds[0] != kinds[1]:
            raise InputError("`fit` needs an optimizer whose state keeps its shapes and dtypes from step to step")
        return after, losses

    return lax.scan(one, state, order)
