"""Plans of training steps: how many members and rows run at once, decided by the gradient of one member."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxensemble.compat import JaxprEqn, Literal, Program
from jaxensemble.errors import InputError
from jaxensemble.modules.state import Tree, flatten, merge, split, unflatten
from jaxensemble.network.inputs import batch_axes
from jaxensemble.programs.forms import use_forms
from jaxensemble.programs.rewrite import peak_bytes
from jaxensemble.running.compiled import is_within_trace
from jaxensemble.running.device import device_of
from jaxensemble.running.members import EnsembleCall
from jaxensemble.running.plan import Demand, Plan, guess_plan, is_within_memory
from jaxensemble.running.workload import SMALL, Workload, apply_plan
from jaxensemble.training.augmentation import Augment, check_draws
from jaxensemble.training.data import check_data
from jaxensemble.training.losses import Loss, check_is_mean, name_of, number_of, warn_of_pairs
from jaxensemble.training.members import TrainingStep
from jaxensemble.training.state import TrainState, replace_trained, trained_parameters


def make_step(
    state: TrainState,
    data: Any,
    rows: Any,
    loss: Loss,
    *,
    each: bool,
    plan: Plan | None,
    augment: Augment | None = None,
) -> TrainingStep:
    """Returns the step for such data, under the given plan or one that fits."""
    step, workload, targets = prepare_step(state, data, rows, loss, each=each, augment=augment)
    leaves, tree = jax.tree.flatten(targets)
    chosen, idle = _choose_plan(workload, loss, tuple(leaves), tree, state.frozen, plan)
    if is_within_trace((state, data, rows)):  # the settings of the program around it count
        chosen = dataclasses.replace(chosen, compiler=None)
    return dataclasses.replace(step, call=dataclasses.replace(step.call, plan=chosen), idle=idle)


def prepare_step(
    state: TrainState, data: Any, rows: Any, loss: Loss, *, each: bool, augment: Augment | None
) -> tuple[TrainingStep, Workload, Any]:
    """Returns a step without a plan, its workload, and one member's targets, as shapes and dtypes."""
    inputs, targets = data
    own_rows = rows is not None and rows.ndim == 2
    device = device_of(state.ensemble.params) if state.ensemble.placement is None else state.ensemble.placement.device
    ported = state.ensemble.network is not None
    own, placement = each or own_rows or augment is not None, state.ensemble.placement
    call = EnsembleCall(state.training, device.platform, each=own, update=True, ported=ported, placement=placement)
    given = batch_axes(state.ensemble.network, inputs, each=each) + (0,) * len(jax.tree.leaves(targets))
    step = TrainingStep(call, loss, given, given, each, own_rows, augment=augment)
    as_given = rows is None and augment is None
    if augment is not None:
        check_draws(lambda: jax.make_jaxpr(lambda *given: step.minibatch(*given))(data, rows, state.keys))
    inputs, targets = data if as_given else jax.eval_shape(step.minibatch, data, rows, state.keys)
    if augment is not None:
        members = len(state.ensemble)
        own_inputs, own_targets = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((members, *leaf.shape[1:]), leaf.dtype), (inputs, targets)
        )
        try:
            check_data(state.ensemble, own_inputs, own_targets, each=True)
        except InputError as error:
            raise InputError(f"the minibatch that `augment` returned does not fit: {error.details}") from error
    axes = batch_axes(state.ensemble.network, inputs, each=own)
    step = dataclasses.replace(step, axes=axes + (0,) * len(jax.tree.leaves(targets)))
    ensemble, key = state.ensemble, jax.ShapeDtypeStruct((), state.keys.dtype)
    buffers = unflatten(flatten(ensemble.buffers) | state.rates)
    arrays = (ensemble.params, buffers, ensemble.rngs, ensemble.constants, key, inputs)
    workload = Workload.of(call, device, arrays, axes)
    shards = 1
    if placement is not None and placement.over_rows is not None:
        if augment is not None:
            raise InputError(
                "`augment` needs all rows of a minibatch, which it may mix: leave `rows` out of `over`, or augment the "
                "data before"
            )
        shards = placement.row_shards
        placement.check_rows({leaf.shape[call.each] for leaf in jax.tree.leaves(targets)})
    targets = jax.tree.map(lambda leaf: _target_shape(leaf.shape[call.each :], leaf.dtype, shards), targets)
    return step, workload, targets


def _target_shape(shape: tuple[int, ...], dtype: Any, shards: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((shape[0] // shards, *shape[1:]), dtype)


@functools.lru_cache(maxsize=256)
def _choose_plan(
    workload: Workload, loss: Loss, targets: Any, tree: Any, frozen: frozenset[str], plan: Plan | None
) -> tuple[Plan, frozenset[str]]:
    """Returns the plan, and the parameters that the loss does not reach."""
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"`plan` must be a jaxensemble.Plan or None; got {plan!r}")
    program, idle = gradient_program(workload, loss, tree.unflatten(targets), frozen)
    if idle >= flatten(trained_parameters(workload.one_member()[0], frozen)).keys():
        raise InputError(
            f"{name_of(loss)} has no gradient with respect to any parameter: a loss must be made "
            "of differentiable operations, unlike an accuracy"
        )
    if workload.call.placement is not None and workload.call.placement.over_rows is not None:
        still = _without_dropout(workload).over_rows()  # raises if rows are mixed
        axes, name = still.call.rows_out, workload.call.placement.over_rows
        rows, why = workload.rows or 1, f"rows are over the mesh axis {name!r}"
        outputs, given = still.outputs_of(rows), tree.unflatten(targets)
        check_is_mean(loss, outputs, given, (*axes, *[0] * len(targets)), rows, why)
    if plan is None:
        free = workload.free_memory
        demand = dataclasses.replace(workload.demand, rows=None, peak=peak_bytes(program))
        small = workload.input_bytes <= SMALL and is_within_memory(Plan(), demand, free)
        return Plan() if small else _guess_plan(demand, free), idle
    if plan.rows is None or workload.rows is None or plan.rows >= workload.rows:
        return dataclasses.replace(plan, rows=None), idle
    still = _without_dropout(workload)
    axes = apply_plan(still, dataclasses.replace(plan, members=None)).rows_out  # raises if rows are mixed
    outputs, why = still.outputs_of(plan.rows), f"`plan` has rows={plan.rows}"
    check_is_mean(loss, outputs, tree.unflatten(targets), (*axes, *[0] * len(targets)), plan.rows, why)
    return plan, idle


def _guess_plan(demand: Demand, free: float) -> Plan:
    """The plan of a call, changed for gradients.

    Settings of the compiler serve only where members' convolutions are apart. A loop over members then takes less time
    than steps that are written out, whose results have to be joined, except where elementwise steps weigh most: a loop
    runs these on one core.
    """
    plan = guess_plan(demand, free)
    if not demand.convolutions or plan.members != 1:
        return dataclasses.replace(plan, compiler=None)
    return plan if demand.grouped else dataclasses.replace(plan, unroll=False)


def gradient_program(
    workload: Workload, loss: Loss, targets: Any, frozen: frozenset[str]
) -> tuple[Program, frozenset[str]]:
    """Returns the program of one member's gradient, and the parameters whose gradient JAX knows to be zero."""
    params, buffers, rngs, constants, key, inputs = workload.one_member()

    def member(params: Tree, buffers: Tree, rngs: Tree, key: Any, data: Any) -> Any:
        outputs, after = workload.call.member(params, buffers, rngs, constants, key, data[0], vmapped=None)
        number = number_of(loss, outputs, data[1])
        warn_of_pairs(loss, outputs, data[1])
        return number, after

    one = use_forms(member, workload.call.platform, "loss")

    def objective(params: Tree, everything: Tree, *others: Any) -> Any:
        return one(replace_trained(everything, params), *others)

    arguments = (trained_parameters(params, frozen), params, buffers, rngs, key, (inputs, targets))
    program = jax.make_jaxpr(jax.grad(objective, has_aux=True))(*arguments)
    zeros = {step.outvars[0] for step in program.eqns if step.primitive.name == "broadcast_in_dim" and _is_zero(step)}
    names = jax.tree.leaves(unflatten({name: name for name in flatten(arguments[0])}))
    gradients = zip(names, program.outvars[: len(names)], strict=True)
    return program, frozenset(name for name, var in gradients if isinstance(var, Literal) or var in zeros)


def _is_zero(step: JaxprEqn) -> bool:
    return isinstance(step.invars[0], Literal) and not np.any(step.invars[0].val)


def _without_dropout(workload: Workload) -> Workload:
    """Returns the workload without dropout: its random numbers look like mixed rows, but rows are independent."""
    params, buffers, rngs, constants, _, _ = workload.one_member()
    module = merge(workload.call.graphdef, params, buffers, constants, rngs)
    for _, layer in nnx.iter_modules(module):
        if "rngs" in vars(layer) and hasattr(layer, "deterministic"):
            layer.deterministic = True  # type: ignore[attr-defined]
    call = dataclasses.replace(workload.call, graphdef=split(module).graphdef, update=False)
    return dataclasses.replace(workload, call=call)
