"""Programs compiled for a call, with the weights in the form that they read."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxensemble.arrays import is_traced
from jaxensemble.compat import Format, Layout, trace_context, trace_state_clean
from jaxensemble.devices.placement import Placement
from jaxensemble.errors import StateError
from jaxensemble.programs.compiled import count_flops
from jaxensemble.programs.weights import Division
from jaxensemble.running.compilers import compiler_options
from jaxensemble.running.device import default_device
from jaxensemble.running.members import EnsembleCall, call_members, finish_call, keys_of, run_members
from jaxensemble.running.places import places_of
from jaxensemble.running.workload import Workload

GIVEN_AWAY = (
    "the ensemble gave its arrays away, when this program was prepared or later: prepare it without `donate` to "
    "differentiate or check the program"
)


class MembersProgram:
    """The program of a call for given shapes: one part that makes arrays from weights, one that reads them.

    - `run`: the compiled second part, a function of these arrays, `rngs`, `key` and inputs.
    - `flops`: the floating-point operations of its products and convolutions.
    - `names`: a name for each array, the same in all programs that read the same array of the same weights.

    `options` are XLA's, beside those of the plan. The workload's device may be of a topology, which is not there. With
    `is_free`, the program is not bound to the device, and neither are its results.
    """

    def __init__(
        self,
        workload: Workload,
        call: EnsembleCall,
        options: Mapping[str, Any] = MappingProxyType({}),
        *,
        is_free: bool = False,
    ):
        params, buffers, rngs, constants, key, inputs = jax.tree.unflatten(workload.tree, workload.arrays)
        weights, members = (params, buffers, constants), jax.tree.leaves((params, buffers))[0].shape[0]
        keys = jax.eval_shape(functools.partial(keys_of, members=members, call=call), key)
        self._places = places_of((*weights, rngs, keys, inputs), call, workload.device, is_free=is_free)
        function, given = functools.partial(run_members, call=call), self._places.parts
        with jax.disable_jit(False):
            program, shapes = jax.make_jaxpr(function, return_shape=True)(*given)
        self._tree = jax.tree.structure(shapes)
        flags = [k < len(weights) for k, tree in enumerate(given) for _ in jax.tree.leaves(tree)]
        self.division = Division(program, flags)
        self.call, self.device = call, workload.device
        self.members = members if call.placement is None else call.placement.members
        self._slots = members
        self.flops = count_flops(program)
        arrays = self._places.arrays(self.division)
        # The compiler chooses the layouts of weights.
        formats = [Format(Layout.AUTO, array.sharding) for array in arrays]
        function = jax.jit(self._compute, in_shardings=(formats, None, None, None))
        lowered = function.lower(arrays, *self._places.others(rngs, key, inputs))
        self.run = lowered.compile({**compiler_options(call.plan.compiler, call.platform), **options})
        self.formats = jax.tree.leaves(self.run.input_formats[0][0])
        self.names = [f"{name} {form.layout}" for name, form in zip(self.division.names, self.formats, strict=True)]

    def _compute(self, arrays: Sequence[jax.Array], rngs: Any, key: Any, inputs: Any) -> Any:
        others = jax.tree.leaves((rngs, keys_of(key, self._slots, self.call), inputs))
        results = self._places.call(self.division, arrays, others)
        return finish_call(jax.tree.unflatten(self._tree, results), self.call)

    @functools.cached_property
    def trace(self) -> Callable[..., Any]:
        """The same function as `run`, for calls within `jax.jit` and other transformations, which may be derivatives.

        Its second argument is the weights, for derivatives, or None. They are those of the call: programs written out
        have lost theirs. All arrays are arguments, since JAX's caches would keep the ones that a rule refers to.
        """
        compute, call = jax.jit(self._compute), dataclasses.replace(self.call, fold=False)

        @jax.custom_jvp
        def run(arrays: Sequence[jax.Array], weights: Any, rngs: Any, key: Any, inputs: Any) -> Any:
            return compute(arrays, rngs, key, inputs)

        @run.defjvp
        def differentiate(primals: Any, tangents: Any) -> Any:
            _, weights, rngs, key, inputs = primals
            if weights is None:
                raise StateError(GIVEN_AWAY)
            return jax.jvp(functools.partial(call_members, *weights, rngs, call=call), (key, inputs), tangents[3:])

        return run

    @functools.cached_property
    def _lay_out(self) -> Callable[..., Any]:
        return jax.jit(self._places.prepare(self.division))

    def arrays_of(self, weights: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays that the program reads, in the compiler's layouts. Weights that it reads as they are, are kept."""
        made = iter(self._lay_out([*weights]) if None in self.division.kept else ())
        arrays = [next(made) if place is None else weights[place] for place in self.division.kept]
        return [
            array if _is_laid_out(array, form) else jax.device_put(array, form)
            for array, form in zip(arrays, self.formats, strict=True)
        ]

    @property
    def sizes(self) -> list[int]:
        """The bytes that each array takes beside the weights, on one device: none where it is a weight."""
        places = zip(self.division.shapes, self.division.kept, strict=True)
        return [0 if place is not None else shape.size * shape.dtype.itemsize for shape, place in places]


def _is_laid_out(array: Any, form: Format) -> bool:
    """Returns whether an array has the layout of a format, as random keys always have, and on a mesh its place.

    `jax.device_put` would copy it.
    """
    moved = isinstance(form.sharding, NamedSharding) and not array.sharding.is_equivalent_to(form.sharding, array.ndim)
    return not moved and (not hasattr(array, "format") or array.format.layout == form.layout)


@functools.lru_cache(maxsize=64)  # ensembles of equal structure share programs
def compile_call(workload: Workload, call: EnsembleCall, settings: Any, *, is_free: bool = False) -> MembersProgram:
    """Returns the compiled program of a call. `settings` are those of JAX that a program depends on."""
    return MembersProgram(workload, call, is_free=is_free)


def current_settings() -> Any:
    """Returns JAX's settings that a program depends on, beside those of its workload."""
    return trace_context(), is_debugging()


def is_debugging() -> bool:
    """Returns whether JAX checks every step, or runs the steps one by one: compiled programs do neither."""
    config: Any = jax.config
    return config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs


def is_within_trace(arrays: Any) -> bool:
    """Returns whether `jax.jit` or another transformation runs now, whether or not it traces these arrays."""
    return is_traced(arrays) or not trace_state_clean()


def why_not_prepared(weights: Any, others: Any, placement: Placement | None) -> str | None:
    """Returns the reason why no program can be compiled ahead for arrays; None if one can.

    As in `jax.jit`, a program runs where arrays are that were put onto a device, or else on the default device.
    """
    leaves = jax.tree.leaves((weights, others))
    if is_within_trace(leaves):
        return "within jax.jit and other transformations"
    if is_debugging():
        return "while jax_disable_jit, jax_debug_nans or jax_debug_infs is on"
    if not all(isinstance(leaf, jax.Array) and not leaf.aval.weak_type for leaf in leaves):
        return "for Python numbers, which have no dtype of their own, or NumPy arrays as weights"
    if placement is not None:
        return None if is_on_mesh(leaves, placement) else "for arrays that are not on the mesh of the ensemble"
    if not all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in leaves):
        return "for arrays with a sharding over a mesh: put them there by the ensemble's `over`"
    placed = [leaf for leaf in leaves if leaf.committed]
    places = {leaf.sharding for leaf in (*placed, *jax.tree.leaves(weights))}
    if len(places) > 1 or not (placed or leaves[0].sharding.device_set == {default_device()}):
        return "for arrays on several devices, or on another one than jax_default_device"
    return None


def is_on_mesh(arrays: Any, placement: Placement) -> bool:
    """Returns whether arrays are on all devices of a mesh."""
    return all(getattr(leaf.sharding, "mesh", None) == placement.mesh for leaf in jax.tree.leaves(arrays))


def are_free(arrays: Any) -> bool:
    """Returns whether arrays are on the default device, and not bound to it."""
    leaves = jax.tree.leaves(arrays)
    config: Any = jax.config
    at_home = config.jax_default_device is None and leaves[0].devices() == {default_device()}
    return at_home and not any(leaf.committed for leaf in leaves)
