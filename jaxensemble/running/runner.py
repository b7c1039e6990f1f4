"""The runner of an ensemble: from the arguments of a call to the program that suits them, and its outputs."""

import contextlib
import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxensemble.arrays import are_deleted, as_arrays, is_traced, require_x64
from jaxensemble.devices.placement import SHARED, Placement, wait_on_cpus
from jaxensemble.errors import InputError, ManySizesWarning, StateError
from jaxensemble.modules.randomness import as_key
from jaxensemble.modules.stacking import count_members
from jaxensemble.modules.state import State
from jaxensemble.network.arguments import bind_arguments, restore_outputs
from jaxensemble.network.inputs import batch_axes, check_inputs, check_member_axis
from jaxensemble.network.network import Network
from jaxensemble.programs.rows import Axes
from jaxensemble.running.compiled import (
    MembersProgram,
    are_free,
    compile_call,
    current_settings,
    is_on_mesh,
    is_within_trace,
    why_not_prepared,
)
from jaxensemble.running.compilers import compile_with
from jaxensemble.running.device import default_device, device_of, free_memory
from jaxensemble.running.members import EnsembleCall, compile_members, finish_call, keys_of, run_members
from jaxensemble.running.offload import check_offload, join_groups, run_groups, take_group, write_groups
from jaxensemble.running.padded import RowsMayMix, compiled_rows, count_rows, cut_rows, pad_rows, prove_padding
from jaxensemble.running.plan import Plan
from jaxensemble.running.prepared import Padding, Prepared
from jaxensemble.running.tuning import choose_call, explain_plan, tune_plan
from jaxensemble.running.workload import Workload, type_of_input

Randomness = Literal["different", "same"]
PlanChoice = Plan | Literal["auto"] | None

MANY = 8
"""The number of batch sizes whose programs give a warning."""

_SPARE = 1 / 8
"""The share of free memory that calls may take for weights in the form that their programs read."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of a call of an ensemble, checked as far as that needs no ensemble.

    - `finish`: a hashable function of the outputs as the program returns them, which becomes a part of the program.
    """

    inputs: tuple[Any, ...]
    key: Any
    randomness: Randomness = "different"
    each: bool = False
    update: bool = False
    finish: Callable[[Any], Any] | None = None

    @classmethod
    def of(
        cls, network: Network | None, inputs: tuple[Any, ...], named: dict[str, Any], key: Any, **options: Any
    ) -> "Arguments":
        """Returns the arguments of a call as arrays.

        **Raises:** `InputError` for arguments that are no arrays, or not those of the network.
        """
        arrays = as_arrays(bind_arguments(network, inputs, named), "inputs")
        return cls(arrays, None if key is None else as_key(key), **options)

    def kind(self, plan: PlanChoice) -> Any:
        """The facts that decide the call, beside the ensemble."""
        leaves, tree = jax.tree.flatten((self.key, self.inputs))
        facts = self.each, self.update, self.finish, str(self.randomness)
        return (plan, *facts, current_settings(), tree, *map(type_of_input, leaves))


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """A program, the arrays that it reads, and the weights that these were made from."""

    program: MembersProgram
    arrays: list[jax.Array]
    weights: list[jax.Array]


class Runner:
    """Runs the calls of one ensemble, and holds the programs and arrays that they need.

    `calls` are the calls that were chosen so far, by the kind of their arguments.
    """

    def __init__(self, state: State, network: Any, plan: Plan | None, placement: Placement | None = None):
        self._state, self._network, self._plan, self._placement = state, network, plan, placement
        self.calls: dict[Any, EnsembleCall] = {}
        self._held: dict[Any, _Held] = {}
        # Weights, and the arrays made from them, by name. Replaced as one, so that threads see what belongs together.
        self._made: tuple[list[jax.Array], dict[str, jax.Array]] = [], {}
        self._is_donated = False
        self._rows_out: dict[Any, Axes] = {}
        self._sizes: dict[Any, set[int]] = {}
        self._has_warned = False

    def run(self, given: Arguments, plan: PlanChoice) -> Any:
        """Returns the outputs of a call, or what `finish` makes of them; with `update` also the buffers after it."""
        return self._restore(given, self._settle(self._run(self._fill(given), plan)))

    def run_padded(self, given: Arguments, plan: PlanChoice, least: int = 1) -> Any:
        """Returns the outputs of a call, by a program for as many rows or more, and for `least` at least.

        **Raises:** `InputError` for a network that may mix rows.
        """
        given = self._fill(given)
        rows = self._count_rows(given)
        size = max(compiled_rows(rows), least)
        whole, axes_out = self._pad(given, rows, size, plan)
        returned = self._settle(self._run(whole, plan, padded=True))
        if given.finish is not None:
            _require_rows_first(axes_out)
            axes_out = (0,) * len(jax.tree.leaves(returned))
        return self._restore(given, returned if rows == size else cut_rows(returned, axes_out, rows))

    def output_axes(self, given: Arguments) -> Axes:
        """Returns the batch axis of every output of one member.

        **Raises:** `RowsMayMix` for a network that may mix rows.
        """
        given = self._fill(given)
        rows = self._count_rows(given)
        return self._pad(given, rows, rows, None)[1]

    def run_batch(self, given: Arguments, plan: PlanChoice, least: int) -> tuple[Any, int]:
        """Returns what `finish` makes of the outputs, by a program for `least` rows or more, and the number of rows.

        Results for copies of the first row follow where there are fewer. A network that may mix rows runs as it is.

        **Raises:** `InputError` for a network whose outputs do not have rows first.
        """
        given = self._fill(given)
        rows = self._count_rows(given)
        with contextlib.suppress(RowsMayMix):
            given, axes_out = self._pad(given, rows, max(rows, least), plan)
            _require_rows_first(axes_out)
        return self._settle(self._run(given, plan, padded=True)), rows

    def _count_rows(self, given: Arguments) -> int:
        axes = batch_axes(self._network, given.inputs, each=given.each)
        try:
            return count_rows(given.inputs, axes, given.each)
        except InputError:
            self.workload(given)  # raises for inputs that are not those of the network
            raise

    def _pad(self, given: Arguments, rows: int, size: int, plan: PlanChoice) -> tuple[Arguments, Axes]:
        """Returns arguments with more rows, and the batch axes of the outputs of one member.

        **Raises:** `RowsMayMix` for a network that may mix rows.
        """
        if rows != size:
            axes = batch_axes(self._network, given.inputs, each=given.each)
            given = dataclasses.replace(given, inputs=pad_rows(given.inputs, axes, int(given.each), size))
        kind = given.kind(plan)
        if kind not in self._rows_out:
            self._rows_out[kind] = prove_padding(self.workload(given))
        return given, self._rows_out[kind]

    def _run(self, given: Arguments, plan: PlanChoice, *, padded: bool = False) -> Any:
        given = self._put(given)
        if plan == "auto":
            self._require_one_host()
        arrays = self._state[1:], given.key, given.inputs
        kind = given.kind(plan)
        held = None if is_traced(arrays) else self._held.get(kind)
        if held is not None and _are_same(held.weights, self._weights()):
            try:
                return held.program.run(held.arrays, self._state.rngs, given.key, given.inputs)
            except (RuntimeError, ValueError):
                self._check_weights()
                raise
        self._check_weights()
        traced = is_within_trace(arrays)
        call = self.calls.get(kind)
        if call is None:
            workload = self.workload(given)
            call = choose_call(workload, plan, self._plan, None if traced else self._measured(given))
            call = dataclasses.replace(call, finish=given.finish)
            if plan != "auto" or not traced:  # a guess is no measurement
                self.calls[kind] = call
            if not traced and not padded:
                self._warn_of_sizes(given, plan, workload)
        if call.plan.offload:
            return self._stream(call, given, traced=traced)
        return self._ready(call, given, None if traced else kind)()

    def tune(self, given: Arguments) -> Plan:
        """Returns the plan that is fastest for a call: measured, or remembered.

        **Raises:** `InputError` within transformations, where nothing can be measured, and on several hosts, which
        would choose different plans.
        """
        self._require_one_host()
        given = self._put(self._fill(given))
        if is_within_trace((self._state[1:], given.key, given.inputs)):
            raise InputError("nothing can be measured within jax.jit and other transformations: call tune outside")
        try:
            return tune_plan(self.workload(given), self._measured(given)).plan
        finally:
            self._forget_unused()

    def explain(self, given: Arguments) -> str:
        """Explains the plan of a call."""
        return explain_plan(self.workload(self._put(self._fill(given))), self._plan)

    def prepare(self, given: Arguments, plan: PlanChoice, *, fold: bool, ensemble: Any, pad: bool) -> Prepared:
        """Returns the program of a call, with weights of its own. Without `ensemble`, weights are given away.

        **Raises:** `InputError` where no program can be compiled ahead.
        """
        self._check_weights()
        given = self._put(self._fill(given))
        reason = self._why_not_prepared(given)
        if reason is not None:
            raise InputError(f"no program can be prepared {reason}: call the ensemble itself")
        workload = self.workload(given)
        call = choose_call(workload, plan, self._plan, self._measured(given))
        if call.plan.offload:
            raise InputError(f"`plan` is {call.plan}, but a prepared program holds the weights of all members")
        program = self._compile(dataclasses.replace(call, fold=fold), given)
        padding = self._padding(workload) if pad else None
        weights = self._weights()
        arrays = program.arrays_of(weights)
        if ensemble is None:
            jax.block_until_ready(arrays)
            kept = {id(array) for array in arrays}
            for weight in weights:
                if id(weight) not in kept:
                    weight.delete()
            self._held, self._made, self._is_donated = {}, ([], {}), True
        return Prepared(program, arrays, self._state.rngs, self._network, (given.key, given.inputs), ensemble, padding)

    def _padding(self, workload: Workload) -> Padding:
        rows_out = prove_padding(workload)
        assert workload.rows is not None
        rows = workload.rows * (1 if self._placement is None else self._placement.row_shards)
        return Padding(workload.rows_in, rows_out, int(workload.call.each), rows)

    def workload(self, given: Arguments) -> Workload:
        """Checks the arguments of a call, and returns its workload.

        **Raises:** `InputError` for arguments that do not fit the network or the ensemble, `StateError` for an
        ensemble without its arrays.
        """
        self._check_weights()
        state, each = self._state, given.each
        if given.randomness not in ("different", "same"):
            raise InputError(f"`randomness` must be 'different' or 'same'; got {given.randomness!r}")
        for dtype in self._dtypes:
            require_x64(dtype, "the ensemble")
        self._check_inputs(given)
        call = EnsembleCall(
            state.graphdef,
            self._device.platform,
            each=each,
            different=given.randomness == "different",
            update=given.update,
            ported=self._network is not None,
            placement=self._placement,
        )
        arrays = (state.params, state.buffers, state.rngs, state.constants, given.key, given.inputs)
        return Workload.of(call, self._device, arrays, batch_axes(self._network, given.inputs, each=each)).over_rows()

    def _settle(self, returned: Any) -> Any:
        """Returns what a program gives; on a mesh of CPU devices, once it is there. Other calls take no time for it."""
        return returned if self._placement is None else wait_on_cpus(returned)

    def _fill(self, given: Arguments) -> Arguments:
        """Returns arguments with inputs for every slot of the stack, where each member has its own.

        **Raises:** `InputError` for inputs that do not fit.
        """
        if self._placement is None or not given.each:
            return given
        check_member_axis(given.inputs, self._placement.members)
        return dataclasses.replace(given, inputs=self._placement.fill(given.inputs))

    def _put(self, given: Arguments) -> Arguments:
        """Returns arguments with their arrays on the mesh of the ensemble, if it has one.

        **Raises:** `InputError` for inputs that do not fit, or whose rows do not divide.
        """
        placement = self._placement
        if placement is None:
            return given
        self._check_inputs(given)
        axes = batch_axes(self._network, given.inputs, each=given.each)
        inputs = placement.put_inputs(given.inputs, axes, each=given.each)
        return dataclasses.replace(given, inputs=inputs, key=placement.put(given.key, SHARED))

    def _check_inputs(self, given: Arguments) -> None:
        # Raises for a network without parameters and buffers.
        members = count_members({"params": self._state.params, "buffers": self._state.buffers})
        if given.each:
            check_member_axis(given.inputs, members)
        if self._network is not None:
            check_inputs(self._network, given.inputs, each=given.each)

    def _warn_of_sizes(self, given: Arguments, plan: PlanChoice, workload: Workload) -> None:
        """Warns, once, when calls that are equal in all else have compiled for `MANY` numbers of rows."""
        if workload.rows is None or self._has_warned:
            return
        others = [
            (*(size for k, size in enumerate(jnp.shape(leaf)) if axis is None or k != axis + given.each), str(axis))
            for leaf, axis in zip(jax.tree.leaves(given.inputs), workload.rows_in, strict=True)
        ]
        name = (plan, given.each, given.update, given.finish, given.key is None, *others)
        sizes = self._sizes.setdefault(name, set())
        sizes.add(workload.rows)
        if len(sizes) < MANY:
            return
        self._has_warned = True
        with contextlib.suppress(InputError):  # no advice for a network that mixes rows
            prove_padding(workload)
            warnings.warn(
                f"calls have compiled programs for {MANY} batch sizes, the last one {workload.rows}: "
                "run = ensemble.padded() runs any batch size by a few programs, and "
                "run = ensemble.prepare(x, pad=True) any up to that of x by one",
                ManySizesWarning,
                stacklevel=6,
            )

    @functools.cached_property
    def _dtypes(self) -> set[Any]:
        return {array.dtype for array in self._weights() if jnp.issubdtype(array.dtype, jnp.inexact)}

    def _weights(self) -> list[Any]:
        return jax.tree.leaves((self._state.params, self._state.buffers, self._state.constants))

    def _measured(self, given: Arguments) -> Callable[[EnsembleCall], Any]:
        """Returns a function that runs a call under any plan, and prepares each plan once."""
        ready = functools.cache(lambda call: self._ready(call, given))
        return lambda call: ready(call)()

    def _ready(self, call: EnsembleCall, given: Arguments, kind: Any = None) -> Callable[[], Any]:
        """Returns the program of a call with its arguments. With `kind`, it is held for the next such call."""
        state = self._state
        if self._why_not_prepared(given) is None:
            program = self._compile(dataclasses.replace(call, fold=not call.update), given)
            arrays = self._hold(program)
            if arrays is not None:
                if kind is not None:
                    self._held[kind] = _Held(program, arrays, self._weights())
                return functools.partial(program.run, arrays, state.rngs, given.key, given.inputs)
        arrays = state.params, state.buffers, state.constants, state.rngs, given.key, given.inputs
        return functools.partial(compile_members(call, traced=is_within_trace(arrays)), *arrays)

    def _why_not_prepared(self, given: Arguments) -> str | None:
        others = self._state.rngs, given.key, given.inputs
        return why_not_prepared(self._weights(), others, self._placement)

    def _require_one_host(self) -> None:
        """Checks that one process has all devices: several would choose different plans, and wait for each other.

        **Raises:** `InputError` otherwise.
        """
        if self._has_hosts:
            raise InputError(
                "plans are not measured on several hosts: tune the ensemble on one of them, and pass that plan to all"
            )

    @property
    def _has_hosts(self) -> bool:
        return self._placement is not None and not self._placement.is_local

    @property
    def _device(self) -> Any:
        return (
            device_of((self._state.params, self._state.buffers)) if self._placement is None else self._placement.device
        )

    def _stream(self, call: EnsembleCall, given: Arguments, *, traced: bool) -> Any:
        """Returns the outputs of a call whose members are on the device in turn.

        **Raises:** `InputError` within transformations, and for an ensemble on a mesh.
        """
        check_offload(call.plan, traced=traced, placement=self._placement)
        state, device, size = self._state, default_device(), call.plan.members or 1
        plan = dataclasses.replace(call.plan, members=None, offload=False)
        one = dataclasses.replace(call, plan=plan, platform=device.platform, finish=None)
        function = compile_with(run_members, plan.compiler, device.platform, "call")
        constants, inputs = jax.device_put((state.constants, given.inputs), device)
        stacked, members = (state.params, state.buffers, state.rngs), self._weights()[0].shape[0]
        size, keys = min(size, members), keys_of(given.key, members, call)

        def run(start: int) -> Any:
            part = lambda tree: jax.tree.map(lambda leaf: leaf[start : start + size], tree)  # noqa: E731
            params, buffers, rngs = take_group(stacked, start, size, device)
            own_keys, own = part(keys) if call.different else keys, part(inputs) if call.each else inputs
            return function(params, buffers, constants, rngs, own_keys, own, call=one)

        parts = list(run_groups(run, members, size))
        if not call.update:
            return _finish(join_groups(parts), call=call)
        outputs = join_groups((start, tree) for start, (tree, _) in parts)
        return outputs, write_groups(((start, tree) for start, (_, tree) in parts), state.buffers)

    def _compile(self, call: EnsembleCall, given: Arguments) -> MembersProgram:
        is_free = self._placement is None and are_free((self._state[1:], given.key, given.inputs))
        return compile_call(self.workload(given), call, current_settings(), is_free=is_free)

    def _check_weights(self) -> None:
        """Checks that the arrays of the ensemble are still there.

        **Raises:** `StateError` if they were given away, or moved from the mesh of the ensemble.
        """
        if self._is_donated or are_deleted(self._weights()):
            raise StateError(
                "the arrays of this ensemble are deleted: prepare(..., donate=True), or a function of JAX with donated "
                "arguments, took them. Call what `prepare` returned, or make the ensemble again"
            )
        weights = self._weights()
        if self._placement is not None and not is_traced(weights) and not is_on_mesh(weights, self._placement):
            raise StateError(
                f"this ensemble is {self._placement}, but not all of its arrays are there: move an ensemble by "
                "`over(mesh)` or `over(None)`, not by jax.device_put"
            )

    def _hold(self, program: MembersProgram) -> list[jax.Array] | None:
        """Returns the arrays that a program reads; None if they take too much memory beside the weights."""
        weights = self._weights()
        made_from, known = self._made
        if not _are_same(made_from, weights):
            known = {}
            self._held, self._made = {}, (weights, known)
        names = zip(program.names, program.sizes, strict=True)
        missing = {name: size for name, size in names if name not in known}
        if not self._has_hosts and sum(missing.values()) > _SPARE * free_memory(self._device):
            return None
        if missing:
            for name, array in zip(program.names, program.arrays_of(weights), strict=True):
                known.setdefault(name, array)  # other programs read the arrays that are known
        return [known[name] for name in program.names]

    def _forget_unused(self) -> None:
        """Forgets the arrays that no held program reads: those of plans that were measured."""
        weights, known = self._made
        used = {id(array) for held in self._held.values() for array in held.arrays}
        self._made = weights, {name: array for name, array in known.items() if id(array) in used}

    def _restore(self, given: Arguments, returned: Any) -> Any:
        if self._network is None or given.finish is not None:
            return returned
        if not given.update:
            return restore_outputs(self._network.outputs, returned)
        outputs, buffers = returned
        return restore_outputs(self._network.outputs, outputs), buffers


_finish = jax.jit(finish_call, static_argnames=("call",))


def _require_rows_first(axes: Axes) -> None:
    if any(axis != 0 for axis in axes):
        raise InputError("a prediction needs outputs with rows first: call the padded ensemble, and read them")


def _are_same(one: list[Any], other: list[Any]) -> bool:
    """Returns whether two lists hold the same objects. Arrays of JAX never change their values."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
