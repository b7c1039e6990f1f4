"""The devices on which a program runs: one, or all of a mesh, each with its part of the arrays."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import PartitionSpec, SingleDeviceSharding

from jaxensemble.devices.placement import SHARED, Placement
from jaxensemble.programs.weights import Division
from jaxensemble.running.members import EnsembleCall, argument_specs, output_specs


class Places(Protocol):
    """The devices of a program.

    - `parts`: the shapes and dtypes of the arguments of `run_members` on one device.
    """

    parts: tuple[Any, ...]

    def arrays(self, division: Division) -> list[jax.ShapeDtypeStruct]:
        """The shapes, dtypes and shardings of the arrays that the program reads."""
        ...

    def others(self, rngs: Any, key: Any, inputs: Any) -> tuple[Any, ...]:
        """The shapes, dtypes and shardings of the other arguments of a call."""
        ...

    def prepare(self, division: Division) -> Callable[[Sequence[Any]], list[Any]]:
        """A function that makes from weights the arrays that are no weights themselves."""
        ...

    def call(self, division: Division, arrays: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """The outputs of all members, from the arrays of the program."""
        ...


class OneDevice:
    """A device that has everything. With `is_free`, nothing is bound to it."""

    def __init__(self, parts: tuple[Any, ...], device: Any, *, is_free: bool):
        self.parts = parts
        self._here = None if is_free else SingleDeviceSharding(device)

    def arrays(self, division: Division) -> list[jax.ShapeDtypeStruct]:
        return self._put(division.shapes)

    def others(self, rngs: Any, key: Any, inputs: Any) -> tuple[Any, ...]:
        return self._put((rngs, key, inputs))

    def prepare(self, division: Division) -> Callable[[Sequence[Any]], list[Any]]:
        return lambda weights: _made(division, division.prepare(weights))

    def call(self, division: Division, arrays: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        return division.call(arrays, others)

    def _put(self, tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._here), tree)


class MeshDevices:
    """The devices of a mesh: each has its members and rows, and makes its own arrays from the weights of its members.

    These arrays need not begin with members. They lie one after another along their first axis, whatever it is.
    """

    def __init__(self, arguments: tuple[Any, ...], call: EnsembleCall, placement: Placement):
        self._placement, self._outputs = placement, output_specs(call)
        self._arguments, self._specs = arguments, argument_specs(call, arguments)
        self.parts = jax.tree.map(placement.local_shape, arguments, self._specs)

    def arrays(self, division: Division) -> list[jax.ShapeDtypeStruct]:
        weights, found = jax.tree.leaves(self._arguments[:3]), []
        for shape, place, spec in zip(division.shapes, division.kept, self._array_specs(division), strict=True):
            first, *rest = shape.shape or (1,)
            whole = (self._placement.shards * first, *rest) if place is None else weights[place].shape
            found.append(jax.ShapeDtypeStruct(whole, shape.dtype, sharding=self._placement.sharding(spec)))
        return found

    def others(self, rngs: Any, key: Any, inputs: Any) -> tuple[Any, ...]:
        def put(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._placement.sharding(spec))

        one_key = jax.tree.map(lambda _: SHARED, key)
        return jax.tree.map(put, (rngs, key, inputs), (self._specs[3], one_key, self._specs[5]))

    def prepare(self, division: Division) -> Callable[[Sequence[Any]], list[Any]]:
        def part(weights: Sequence[Any]) -> list[Any]:
            return [array if array.shape else array[None] for array in _made(division, division.prepare(weights))]

        return self._placement.map(part, (jax.tree.leaves(self._specs[:3]),), self._placement.stacked)

    def call(self, division: Division, arrays: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        def part(arrays: Sequence[Any], others: Sequence[Any]) -> list[Any]:
            pairs = zip(arrays, division.shapes, strict=True)
            return division.call([array.reshape(shape.shape) for array, shape in pairs], others)

        specs = self._array_specs(division), jax.tree.leaves(self._specs[3:])
        return self._placement.map(part, specs, self._outputs)([*arrays], [*others])

    def _array_specs(self, division: Division) -> list[PartitionSpec]:
        weights = jax.tree.leaves(self._specs[:3])
        return [self._placement.stacked if place is None else weights[place] for place in division.kept]


def places_of(arguments: tuple[Any, ...], call: EnsembleCall, device: Any, *, is_free: bool) -> Places:
    """The devices of a call, for arguments of `run_members` of these shapes and dtypes."""
    if call.placement is None:
        return OneDevice(arguments, device, is_free=is_free)
    return MeshDevices(arguments, call, call.placement)


def _made(division: Division, arrays: Sequence[Any]) -> list[Any]:
    return [array for array, place in zip(arrays, division.kept, strict=True) if place is None]
