"""One XLA program for all members: all at once, or in steps of a few members and rows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxensemble.arrays import ENABLE_X64
from jaxensemble.devices.placement import SHARED, Placement
from jaxensemble.errors import InputError, JaxEnsembleError, StateError, describe_error
from jaxensemble.modules.randomness import (
    SPLIT_ADVICE,
    defer_linen_keys,
    derive_keys,
    forbid_draws,
    has_single_keys,
    is_transform_error,
    member_keys,
)
from jaxensemble.modules.state import Tree, flatten, merge, split
from jaxensemble.modules.structure import Structure
from jaxensemble.network.arguments import keep_arrays
from jaxensemble.programs.folding import fold_scales
from jaxensemble.programs.forms import use_evaluation_form, use_forms
from jaxensemble.programs.rewrite import CONVOLUTION, PRODUCT, rewrite_steps
from jaxensemble.programs.rows import Axes
from jaxensemble.running.compilers import compile_with
from jaxensemble.running.plan import Plan

ALL_AT_ONCE = Plan()

KEPT = "jaxensemble: kept for the gradient"
"""The name of the results of convolutions and products, under a plan with `remat`."""

NEEDS_KEY = (
    "`{stream}` draws random numbers, as dropout in training mode does: pass key=jax.random.key(0) (--seed 0), "
    "another key for each call, or switch training mode off, if it is on, with ensemble.eval()"
)


class CannotCall(InputError):
    """The network itself fails for its inputs."""


@dataclasses.dataclass(frozen=True)
class EnsembleCall:
    """One way of calling an ensemble: all static facts of its program.

    - `each`: whether every member has its own inputs, which then begin with the member axis.
    - `different`: whether members draw different random numbers.
    - `update`: whether buffers are returned with the outputs.
    - `ported`: whether numbers and strings are left out of the outputs: in a ported network they are fixed.
    - `fold`: whether scales and shifts by weights are folded into kernels: see `jaxensemble.programs.folding`. The
      program is in forms for evaluation then, without rules of differentiation.
    - `rows_in`, `rows_out`: the batch axis of every input and output of one member, for plans with `rows` and for rows
      over a mesh.
    - `finish`: a hashable function of the outputs of all members, whose results the program returns instead.
    - `placement`: the place of members and rows on a mesh of devices, each of which follows the plan; None for one
      device.
    """

    graphdef: Structure
    platform: str
    plan: Plan = ALL_AT_ONCE
    each: bool = False
    different: bool = True
    update: bool = False
    ported: bool = False
    fold: bool = False
    rows_in: Axes = ()
    rows_out: Axes = ()
    finish: Callable[[Any], Any] | None = None
    placement: Placement | None = None

    def member(
        self, params: Tree, buffers: Tree, rngs: Tree, constants: Tree, key: Any, inputs: Any, *, vmapped: bool | None
    ) -> Any:
        """The outputs of one member. `vmapped` chooses the forms of convolutions; None leaves Flax's."""
        run = fold_scales(self._member, _WEIGHTS) if self.fold else self._member
        run = rewrite_steps(run, _NAMED) if self.plan.remat else run
        run = use_forms(run, self.platform, "member")
        if vmapped is not None:
            run = use_forms(run, self.platform, "call under vmap" if vmapped else "call")
        return run(params, buffers, rngs, constants, key, inputs)

    def _member(self, params: Tree, buffers: Tree, rngs: Tree, constants: Tree, key: Any, inputs: Any) -> Any:
        drawn = forbid_draws(self.graphdef, rngs, NEEDS_KEY) if key is None else derive_keys(self.graphdef, rngs, key)
        module = defer_linen_keys(self.graphdef, merge(self.graphdef, params, buffers, constants, drawn))
        outputs = _call_module(module, inputs, rngs)
        outputs = keep_arrays(outputs) if self.ported else outputs
        return (outputs, _buffers_after(module, buffers)) if self.update else outputs


_WEIGHTS = (0, 1, 3)
"""The places of params, buffers and constants among the arguments of a member."""


def _call_module(module: nnx.Module, inputs: Any, rngs: Tree) -> Any:
    try:
        return module(*inputs)  # type: ignore[operator]
    except JaxEnsembleError:
        raise
    except Exception as error:  # any error of the network for wrong inputs
        given = ", ".join(str(jax.tree.map(jax.typeof, tree)) for tree in inputs)
        name = type(getattr(module, "to_nnx__module", module)).__name__
        advice = f"\n{SPLIT_ADVICE}" if has_single_keys(rngs) and is_transform_error(error) else ""
        if any(leaf.size == 0 for leaf in jax.tree.leaves(inputs)):  # JAX cannot work out -1 in its shape
            advice = "\nAn input has no elements, on which this network cannot run: give at least one row."
        if isinstance(error, OverflowError):
            advice = f"\nThe network computes with a whole number beyond 32 bits: {ENABLE_X64}."
        raise CannotCall(
            f"{name} cannot be called with ({given}): {describe_error(error)}{advice}",
            details=str(error),
        ) from error


def _name_result(step: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *operands, **params: checkpoint_name(step(*operands, **params), KEPT)


_NAMED = {CONVOLUTION: _name_result(lax.conv_general_dilated), PRODUCT: _name_result(lax.dot_general)}


def call_members(
    params: Tree, buffers: Tree, constants: Tree, rngs: Tree, key: Any, inputs: tuple[Any, ...], *, call: EnsembleCall
) -> Any:
    """The outputs of all members, `[M, ...]`; every array of `params`, `buffers` and `rngs` is `[M, ...]`.

    As in PyTorch, buffers and constants have no gradient.
    """
    buffers, constants = lax.stop_gradient((buffers, constants))
    members = jax.tree.leaves((params, buffers))[0].shape[0]
    given = (params, buffers, constants, rngs, keys_of(key, members, call), inputs)
    function = functools.partial(run_members, call=call)
    if call.placement is not None:
        function = _over_devices(function, call, argument_specs(call, given))
    return finish_call(function(*given), call)


def keys_of(key: Any, members: int, call: EnsembleCall) -> Any:
    """Returns a key for each member, `[M]`, where members draw different numbers; else the key as it is."""
    return member_keys(key, members) if key is not None and call.different else key


def run_members(
    params: Tree, buffers: Tree, constants: Tree, rngs: Tree, keys: Any, inputs: tuple[Any, ...], *, call: EnsembleCall
) -> Any:
    """The outputs of the members of one device, as the network returns them; `keys` are those of `keys_of`."""
    members = jax.tree.leaves((params, buffers))[0].shape[0]
    stacked = (params, buffers, rngs, keys if call.different else None, inputs if call.each else ())
    shared = (constants, None if call.different else keys, () if call.each else inputs)
    size = min(call.plan.members or members, members)
    run = functools.partial(_run_step, call=call, shared=shared, size=size)
    return run_in_steps(run, stacked, (0,) * len(jax.tree.leaves(stacked)), 0, size, call.plan.unroll)


def finish_call(returned: Any, call: EnsembleCall) -> Any:
    """The result of a call, from what its members returned."""
    if call.placement is not None:
        cut = call.placement.cut
        returned = (cut(returned[0]), returned[1]) if call.update else cut(returned)
    if call.finish is None:
        return returned
    # The outputs are those of a call: without barriers, the compiler may leave out their rounding.
    return call.finish(jax.tree.map(lax.optimization_barrier, returned))


def argument_specs(call: EnsembleCall, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place on the mesh of every array of the arguments of `run_members`."""
    placement = call.placement
    assert placement is not None
    axes = call.rows_in or (None,) * len(jax.tree.leaves(arguments[-1]))
    keys = placement.stacked if call.different else SHARED
    kinds = (placement.stacked, placement.stacked, SHARED, placement.stacked, keys)
    specs = [jax.tree.map(lambda _, spec=spec: spec, tree) for tree, spec in zip(arguments, kinds, strict=False)]
    inputs = [placement.spec(axis, each=call.each) for axis in axes]
    return (*specs, jax.tree.unflatten(jax.tree.structure(arguments[-1]), inputs))


def output_specs(call: EnsembleCall) -> PartitionSpec | list[PartitionSpec]:
    """The place on the mesh of every array that `run_members` returns, in the order of leaves; or one for all."""
    placement = call.placement
    assert placement is not None
    if placement.over_rows is None:
        return placement.stacked
    return [placement.spec(axis, each=True) for axis in call.rows_out]


def _over_devices(function: Callable[..., Any], call: EnsembleCall, specs: tuple[Any, ...]) -> Callable[..., Any]:
    """Runs a function of the arguments of `run_members` on every device of the mesh, with its part of the arrays."""
    trees: list[Any] = []

    def part(*arguments: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(function(*arguments))
        trees.append(tree)
        return leaves

    def whole(*arguments: Any) -> Any:
        leaves = run(*arguments)  # which notes the tree
        return jax.tree.unflatten(trees[-1], leaves)

    assert call.placement is not None
    run = call.placement.map(part, specs, output_specs(call))
    return whole


def compile_members(call: EnsembleCall, *, traced: bool) -> Callable[..., Any]:
    """Returns `jax.jit` of `call_members`, one for all ensembles of equal structure.

    Within a trace, the settings of the program around it count instead of those of the plan.
    """
    compiler = None if traced else call.plan.compiler
    return functools.partial(compile_with(call_members, compiler, call.platform, "call"), call=call)


def _run_step(part: tuple[Any, ...], *, call: EnsembleCall, shared: tuple[Any, ...], size: int) -> Any:
    """The outputs of the `size` members of one step."""
    params, buffers, rngs, key, own = part
    constants, common_key, common = shared
    inputs, ahead = (own, 1) if call.each else (common, 0)

    def all_of_them(params: Tree, buffers: Tree, rngs: Tree, key: Any, inputs: Any) -> Any:
        def member(params: Tree, buffers: Tree, rngs: Tree, key: Any, inputs: Any) -> Any:
            key = key if call.different else common_key
            return call.member(params, buffers, rngs, constants, key, inputs, vmapped=size > 1)

        axes = (0, 0, 0, 0 if call.different else None, 0 if call.each else None)
        return map_members(member, axes, size)(params, buffers, rngs, key, inputs)

    def run(inputs: Any) -> Any:
        function = use_forms(all_of_them, call.platform, "all members")
        function = use_evaluation_form(function, call.platform) if call.fold else function
        return function(params, buffers, rngs, key, inputs)

    if call.plan.rows is None or not call.rows_in:
        return run(inputs)
    rows_in = [None if axis is None else axis + ahead for axis in call.rows_in]
    rows_out = [None if axis is None else axis + 1 for axis in call.rows_out]
    return run_in_steps(run, inputs, rows_in, rows_out, call.plan.rows, call.plan.unroll)


def map_members(function: Callable[..., Any], axes: Sequence[int | None], size: int) -> Callable[..., Any]:
    """Maps a function over `size` members; one member without `jax.vmap`, which slows convolutions on some devices."""
    if size > 1:
        return jax.vmap(function, tuple(axes))

    def one(*arguments: Any) -> Any:
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
        own = [tree if axis is None else first(tree) for tree, axis in zip(arguments, axes, strict=True)]
        return jax.tree.map(lambda leaf: leaf[None], function(*own))

    return one


def run_in_steps(
    function: Callable[[Any], Any],
    inputs: Any,
    axes_in: Sequence[int | None],
    axes_out: Sequence[int | None] | int,
    size: int,
    unroll: bool,
) -> Any:
    """Calls a function with `size` positions at a time along an axis of every leaf; None for leaves given whole.

    Where `size` does not divide, the last step repeats some positions: all steps have one size.
    """
    leaves, treedef = jax.tree.flatten(inputs)
    total = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes_in, strict=True) if axis is not None)
    if size >= total:
        return function(inputs)

    def step(start: Any) -> Any:
        parts = [
            leaf if axis is None else lax.dynamic_slice_in_dim(leaf, start, size, axis)
            for leaf, axis in zip(leaves, axes_in, strict=True)
        ]
        return function(jax.tree.unflatten(treedef, parts))

    shapes, out_tree = jax.tree.flatten(jax.eval_shape(step, 0))
    axes = (axes_out,) * len(shapes) if isinstance(axes_out, int) else axes_out
    count = -(-total // size)
    starts = [min(k * size, total - size) for k in range(count)]
    if unroll:
        parts = [jax.tree.leaves(step(start)) for start in starts]
        new = [k * size - start for k, start in enumerate(starts)]  # the rows before are repeated ones
        found = [
            part[0] if axis is None else _join(part, new, axis)
            for part, axis in zip(zip(*parts, strict=True), axes, strict=True)
        ]
        return jax.tree.unflatten(out_tree, found)

    def body(k: Any, found: list[jax.Array]) -> list[jax.Array]:
        start = jnp.minimum(k * size, total - size)
        return [
            part if axis is None else lax.dynamic_update_slice_in_dim(whole, part, start, axis)
            for whole, part, axis in zip(found, jax.tree.leaves(step(start)), axes, strict=True)
        ]

    found = [_empty(shape, axis, total) for shape, axis in zip(shapes, axes, strict=True)]
    return jax.tree.unflatten(out_tree, lax.fori_loop(0, count, body, found))


def _join(parts: Sequence[jax.Array], begin: Sequence[int], axis: int) -> jax.Array:
    """The parts along an axis, each from its own beginning on."""
    return jnp.concatenate(
        [lax.slice_in_dim(part, at, part.shape[axis], axis=axis) for part, at in zip(parts, begin, strict=True)], axis
    )


def _empty(part: jax.ShapeDtypeStruct, axis: int | None, total: int) -> jax.Array:
    return jnp.zeros([total if k == axis else size for k, size in enumerate(part.shape)], part.dtype)


def _buffers_after(module: Any, before: Tree) -> Tree:
    after = split(module).buffers
    made = sorted(flatten(after).keys() ^ flatten(before).keys())
    if made:
        raise StateError(f"a call must not make or remove variables; this network's does: {', '.join(made)}")
    return after
