"""Workloads, and the plans that they get from the traced program of one member."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxensemble.arrays import is_x64_on
from jaxensemble.compat import Program, Tracer
from jaxensemble.errors import InputError, describe_error
from jaxensemble.programs.cpu.matmuls import is_long
from jaxensemble.programs.forms import REPLACEMENTS, use_forms
from jaxensemble.programs.rewrite import CONVOLUTION, PRODUCT, equations, largest_step, peak_bytes
from jaxensemble.programs.rows import Axes, MixedRows, row_axes
from jaxensemble.running.compilers import has_compiler
from jaxensemble.running.device import free_memory
from jaxensemble.running.members import EnsembleCall
from jaxensemble.running.plan import Demand, Plan, fit_plan, guess_plan, is_within_memory

SMALL = 1 << 17
"""The most bytes of inputs for which no loop over members or rows is planned, if memory allows."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A call without a plan, and the shapes and dtypes of all its arrays.

    `arrays` are the leaves of `(params, buffers, rngs, constants, key, inputs)`, `tree` is how these nest, and
    `rows_in` the batch axis of each input of one member. On a mesh, arrays are those of all devices, and members, rows,
    programs and plans are those of one.
    """

    call: EnsembleCall
    device: Any
    arrays: tuple[Any, ...]
    tree: Any
    rows_in: Axes
    x64: bool

    @classmethod
    def of(cls, call: EnsembleCall, device: Any, arrays: tuple[Any, ...], rows_in: Axes) -> "Workload":
        """Returns the workload of a call with these arrays."""
        leaves, tree = jax.tree.flatten(arrays)
        return cls(call, device, tuple(map(_shape, leaves)), tree, rows_in, is_x64_on())

    @property
    def members(self) -> int:
        """The number of members."""
        return self.arrays[0].shape[0] // (1 if self.call.placement is None else self.call.placement.shards)

    @property
    def rows(self) -> int | None:
        """The number of rows; None where no input has a batch axis."""
        inputs = self.one_member()[-1]
        sizes = zip(jax.tree.leaves(inputs), self.rows_in, strict=True)
        return next((leaf.shape[axis] for leaf, axis in sizes if axis is not None), None)

    @property
    def input_bytes(self) -> int:
        """The bytes of the inputs of all members, each counted with inputs of its own."""
        leaves = jax.tree.leaves(self.one_member()[-1])
        return self.members * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    @functools.cached_property
    def program(self) -> Program:
        """The traced program of one member."""
        return self.program_of(None)

    def program_of(self, rows: int | None, *, vmapped: bool | None = None) -> Program:
        """The program for another number of rows, or, if `vmapped` is given, with its steps in the forms that run."""
        function: Any = functools.partial(self.call.member, vmapped=vmapped)
        if vmapped is not None:
            function = use_forms(function, self.call.platform, "all members")
        return jax.make_jaxpr(function)(*self._arguments(rows))

    def outputs_of(self, rows: int) -> Any:
        """The shapes and dtypes of one member's outputs for a number of rows."""
        return jax.eval_shape(functools.partial(self.call.member, vmapped=None), *self._arguments(rows))

    def _arguments(self, rows: int | None) -> tuple[Any, ...]:
        *state, inputs = self.one_member()
        leaves, tree = jax.tree.flatten(inputs)
        resized = [_resize(leaf, axis, rows) for leaf, axis in zip(leaves, self.rows_in, strict=True)]
        return (*state, jax.tree.unflatten(tree, resized))

    def rows_out(self, rows: int) -> Axes:
        """The batch axes of the outputs, if `rows` rows at a time give the results of all.

        **Raises:** `MixedRows` otherwise."""
        own = self.program  # raises for inputs that the network cannot take at all
        try:
            other = self.program_of(rows)
        except Exception as error:  # any error of a network for a batch size that it cannot take
            raise MixedRows(f"it cannot be run with {rows} rows: {describe_error(error)}") from error
        axes = row_axes(own, other)
        sizes = [
            (a.aval.shape[axis], b.aval.shape[axis])  # type: ignore[attr-defined]
            for a, b, axis in zip(own.outvars, other.outvars, axes, strict=True)
            if axis is not None
        ]
        if any(pair != (self.rows, rows) for pair in sizes):
            raise MixedRows("an output has another number of rows than the minibatch")
        return axes

    @functools.cached_property
    def demand(self) -> Demand:
        """The demand of the call on its device."""
        program, platform = self.program, self.call.platform
        groups = [
            step.params["feature_group_count"] for step in equations(program) if step.primitive.name == CONVOLUTION
        ]
        long = any(is_long(step) for step in equations(program) if step.primitive.name == PRODUCT)
        # Forms may take more memory than the steps that they replace.
        in_forms = any(r.device == platform for r in REPLACEMENTS) and (bool(groups) or long)
        return Demand(
            platform=platform,
            members=self.members,
            rows=self.rows,
            peak=peak_bytes(self.program_of(None, vmapped=True) if in_forms else program),
            step=largest_step(program),
            convolutions=bool(groups),
            grouped=any(count > 1 for count in groups),
        )

    @property
    def free_memory(self) -> float:
        """The bytes that the device has left for arrays. Without limit for several hosts, which need one plan."""
        placement = self.call.placement
        if placement is not None and not placement.is_local:
            return math.inf
        shared = placement is not None and self.call.platform == "cpu"  # devices of one memory
        return free_memory(self.device) / (placement.mesh.size if placement is not None and shared else 1)

    def with_plan(self, plan: Plan) -> EnsembleCall:
        """The call under a plan.

        **Raises:** `MixedRows` for a plan whose rows cannot run on their own."""
        members = None if plan.members is None or plan.members >= self.members else plan.members
        members = min(plan.members or 1, self.members) if plan.offload else members
        rows = None if plan.rows is None or self.rows is None or plan.rows >= self.rows else plan.rows
        plan = dataclasses.replace(plan, members=members, rows=rows)
        if rows is None:
            return dataclasses.replace(self.call, plan=plan)
        return dataclasses.replace(self.call, plan=plan, rows_in=self.rows_in, rows_out=self.rows_out(rows))

    def one_member(self) -> tuple[Any, ...]:
        params, buffers, rngs, constants, key, inputs = jax.tree.unflatten(self.tree, self.arrays)
        own = (params, buffers, rngs, inputs) if self.call.each else (params, buffers, rngs)
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), own)
        inputs = one[3] if self.call.each else inputs
        if self.call.placement is not None and self.call.placement.over_rows is not None:
            inputs = self._rows_of_one(inputs, self.call.placement.row_shards)
        return (*one[:3], constants, key, inputs)

    def _rows_of_one(self, inputs: Any, shards: int) -> Any:
        leaves, tree = jax.tree.flatten(inputs)
        pairs = zip(leaves, self.rows_in, strict=True)
        parts = [_resize(leaf, axis, None if axis is None else leaf.shape[axis] // shards) for leaf, axis in pairs]
        return jax.tree.unflatten(tree, parts)

    def over_rows(self) -> "Workload":
        """The workload with the batch axes of its inputs and outputs, where rows are over an axis of the mesh.

        **Raises:** `InputError` for a network that may mix rows.
        """
        placement = self.call.placement
        if placement is None or placement.over_rows is None:
            return self
        assert self.rows is not None  # `Placement.put_inputs` has checked them
        try:
            rows_out = self.rows_out(placement.row_shards * self.rows)
        except MixedRows as error:
            raise InputError(
                f"rows are over the mesh axis {placement.over_rows!r}, but the network may mix the rows of a minibatch "
                f"({error}): leave `rows` out of `over`. For example, BatchNorm in training mode mixes rows."
            ) from error
        call = dataclasses.replace(self.call, rows_in=self.rows_in, rows_out=rows_out)
        return dataclasses.replace(self, call=call)


@functools.lru_cache(maxsize=256)
def apply_plan(workload: Workload, plan: Plan) -> EnsembleCall:
    """Returns the call of a workload under a specified plan.

    **Raises:** `InputError` for a plan with fewer rows than there are, if the network mixes rows.
    """
    try:
        return workload.with_plan(plan)
    except MixedRows as error:
        raise InputError(
            f"`plan` has rows={plan.rows}, but the network may mix the rows of a minibatch ({error}): leave `rows` "
            "out. BatchNorm does in training mode; a TrainState with train=False keeps its statistics as they are."
        ) from error


@functools.lru_cache(maxsize=256)  # training makes a new ensemble at every step, of an old workload
def adapt_plan(workload: Workload, plan: Plan | None) -> EnsembleCall:
    """Returns the call of a workload under a plan for other calls, adapted to it; under a guess for None.

    Rows that the network mixes stay together, a call that memory has no room for takes more steps, and settings of a
    compiler that the device lacks do not count.
    """
    free = workload.free_memory
    if plan is not None and plan.compiler is not None and not has_compiler(plan.compiler, workload.call.platform):
        plan = dataclasses.replace(plan, compiler=None)
    if plan is None and workload.input_bytes <= SMALL and is_within_memory(Plan(), workload.demand, free):
        chosen = guess_plan(workload.demand, free)
        return workload.with_plan(chosen if chosen.unroll else Plan(compiler=chosen.compiler))
    for demand in (workload.demand, dataclasses.replace(workload.demand, rows=None)):
        chosen = guess_plan(demand, free) if plan is None else fit_plan(plan, demand, free)
        if demand.rows is None:
            chosen = dataclasses.replace(chosen, rows=None)
        try:
            return workload.with_plan(chosen)
        except MixedRows:
            continue
    raise AssertionError("a plan that leaves rows together fits every call")


def type_of_input(leaf: Any) -> Any:
    """The shape, dtype, weak type and place of an array, or the type of a Python number, which decide the program."""
    if not isinstance(leaf, jax.Array):
        return type(leaf)
    aval: Any = leaf.aval
    place = None if isinstance(leaf, Tracer) else (leaf.sharding, leaf.committed)
    return leaf.shape, leaf.dtype, aval.weak_type, place


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    known = hasattr(leaf, "dtype")  # Python numbers have no dtype
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if known else jax.ShapeDtypeStruct((), jnp.result_type(leaf))


def _resize(leaf: jax.ShapeDtypeStruct, axis: int | None, rows: int | None) -> jax.ShapeDtypeStruct:
    if axis is None or rows is None:
        return leaf
    return jax.ShapeDtypeStruct(tuple(rows if k == axis else n for k, n in enumerate(leaf.shape)), leaf.dtype)
