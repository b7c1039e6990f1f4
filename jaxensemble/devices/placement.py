"""The place of an ensemble on a mesh of devices: its members over one axis, rows of a minibatch over another."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxensemble.arrays import is_traced
from jaxensemble.dtypes import is_key
from jaxensemble.errors import InputError

SHARED = PartitionSpec()
"""The specification of arrays of which every device has a copy."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The members of an ensemble over an axis of a mesh.

    - `mesh`: the devices. Its axes are of the type `Auto`: shapes of arrays do not tell where they are.
    - `over_members`, `over_rows`: the axes for members, and for rows of a minibatch; None for rows that stay together.
    - `members`: their number M. Where it does not divide, copies of the last member fill the stack.
    """

    mesh: Mesh
    over_members: str
    over_rows: str | None
    members: int

    @classmethod
    def of(cls, mesh: Any, over_members: Any, over_rows: Any, members: int) -> "Placement":
        """Checks a mesh and its axes.

        **Raises:** `InputError` for anything but a `jax.sharding.Mesh`, and for names that are not two of its axes.
        """
        if not isinstance(mesh, Mesh):
            raise InputError(
                f"`mesh` must be a jax.sharding.Mesh, for example jax.make_mesh((4,), ('members',)); got "
                f"{type(mesh).__name__}"
            )
        names = [over_members] if over_rows is None else [over_members, over_rows]
        lost = [name for name in names if name not in mesh.axis_names]
        if lost or len(set(names)) < len(names):
            raise InputError(
                f"members and rows must be over different axes of the mesh, which are {', '.join(mesh.axis_names)}; "
                f"got members={over_members!r}, rows={over_rows!r}"
            )
        automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        over_rows = None if over_rows is None or mesh.shape[over_rows] == 1 else over_rows
        return cls(automatic, over_members, over_rows, members)

    def __str__(self) -> str:
        """`over 4 devices, 3 members on each`."""
        held = "1 member" if self.slots == self.shards else f"{self.slots // self.shards} members"
        return f"over {self.mesh.size} device{'s' if self.mesh.size > 1 else ''}, {held} on each"

    @property
    def axes(self) -> tuple[Mesh, str, str | None]:
        """The mesh and its axes, whatever the number of members."""
        return self.mesh, self.over_members, self.over_rows

    @property
    def shards(self) -> int:
        """The number of parts of the stack."""
        return self.mesh.shape[self.over_members]

    @property
    def row_shards(self) -> int:
        """The number of parts of a minibatch."""
        return 1 if self.over_rows is None else self.mesh.shape[self.over_rows]

    @property
    def slots(self) -> int:
        """The members of the stack, with the copies that fill it."""
        return -(-self.members // self.shards) * self.shards

    @property
    def stacked(self) -> PartitionSpec:
        """The specification of arrays `[slots, ...]`."""
        return PartitionSpec(self.over_members)

    @functools.cached_property
    def device(self) -> Any:
        """A device of the mesh that belongs to this process; any one if none does."""
        own = (device for device in self.mesh.devices.flat if device.process_index == jax.process_index())
        return next(own, self.mesh.devices.flat[0])

    @property
    def is_local(self) -> bool:
        """True if all devices belong to this process."""
        return not self.mesh.is_multi_process

    def spec(self, rows: int | None, *, each: bool) -> PartitionSpec:
        """The specification of an array with its rows along an axis of one member; with `each`, it has members first.

        >>> placement = Placement.of(jax.make_mesh((1,), ("members",)), "members", None, 3)
        >>> placement.spec(0, each=True) == PartitionSpec("members"), placement.spec(0, each=False) == PartitionSpec()
        (True, True)
        """
        first = [self.over_members] if each else []
        if rows is None or self.over_rows is None:
            return PartitionSpec(*first)
        return PartitionSpec(*first, *[None] * rows, self.over_rows)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """The sharding of JAX for a specification."""
        return NamedSharding(self.mesh, spec)

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Returns `jax.shard_map` of a function over the mesh.

        **Raises:** `InputError` within a block of `jax.set_mesh`, whose mesh steps of a program may not leave.
        """
        found = jax.sharding.get_abstract_mesh()
        if not found.empty:
            raise InputError(
                f"jax.set_mesh has set a mesh with the axes {', '.join(found.axis_names)}, and the members are over a "
                "mesh of their own: call the ensemble outside that block"
            )
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def local_shape(self, leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the part of an array that one device has."""
        return jax.ShapeDtypeStruct(self.sharding(spec).shard_shape(leaf.shape), leaf.dtype)

    def put(self, tree: Any, spec: PartitionSpec) -> Any:
        """Returns arrays in their places. Values must be the same in all processes; tracers stay as they are."""
        return jax.tree.map(lambda leaf: _put(leaf, self.sharding(spec)), tree)

    def put_inputs(self, inputs: Any, axes: Sequence[int | None], *, each: bool) -> Any:
        """Returns the inputs of a call in their places; `axes` are the batch axes of one member's.

        **Raises:** `InputError` for rows that do not divide.
        """
        leaves, tree = jax.tree.flatten(inputs)
        self.check_rows({x.shape[axis + each] for x, axis in zip(leaves, axes, strict=True) if axis is not None})
        specs = [self.spec(axis, each=each) for axis in axes]
        placed = [
            self.put(leaf, spec) if isinstance(leaf, jax.Array) else leaf
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(tree, placed)

    def check_rows(self, rows: Collection[int]) -> None:
        """Checks that the axis for rows divides the numbers of rows of inputs, which must be one.

        **Raises:** `InputError` if it does not.
        """
        if self.over_rows is not None and (len(rows) != 1 or any(count % self.row_shards for count in rows)):
            found = ", ".join(map(str, sorted(rows))) or "no input with a batch axis"
            raise InputError(
                f"rows are over the mesh axis {self.over_rows!r}, and must divide into {self.row_shards} equal parts; "
                f"got {found}"
            )

    def fill(self, tree: Any) -> Any:
        """Returns arrays `[M, ...]` as `[slots, ...]`, by copies of the last member."""
        missing = self.slots - self.members
        return jax.tree.map(lambda leaf: _repeat_last(leaf, missing), tree) if missing else tree

    def place(self, tree: Any) -> Any:
        """Returns arrays `[M, ...]` as `[slots, ...]`, in their places."""
        return self.put(self.fill(tree), self.stacked)

    @functools.cached_property
    def own_members(self) -> list[int]:
        """The members that this process has on its devices, ascending."""
        slots = self.sharding(self.stacked).addressable_devices_indices_map((self.slots,))
        parts = [index[0] for index in slots.values() if index is not None]
        found = {slot for part in parts for slot in range(*part.indices(self.slots))}
        return sorted({min(slot, self.members - 1) for slot in found})

    def assemble(self, values: np.ndarray) -> jax.Array:
        """Returns an array `[slots, ...]` in its place, from the values of `own_members`."""
        places = {member: k for k, member in enumerate(self.own_members)}

        def part(index: Any) -> np.ndarray:
            slots = range(*index[0].indices(self.slots))
            return values[[places[min(slot, self.members - 1)] for slot in slots]]

        return jax.make_array_from_callback((self.slots, *values.shape[1:]), self.sharding(self.stacked), part)

    def cut(self, tree: Any) -> Any:
        """Returns arrays `[slots, ...]` as `[M, ...]`. Where M does not divide, every device gets all of them."""
        if self.slots == self.members:
            return tree
        if is_traced(tree):
            return jax.tree.map(lambda leaf: leaf[: self.members], tree)
        return wait_on_cpus(_cut(tree, members=self.members))


def is_everywhere(tree: Any) -> bool:
    """Returns whether this process has all parts of the arrays of a tree, or a copy of them."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    return all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves)


def is_in_this_process(tree: Any) -> bool:
    """Returns whether all devices with parts or copies of the arrays of a tree belong to this process."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return all(leaf.is_fully_addressable for leaf in leaves)


def gather(tree: Any) -> Any:
    """Returns arrays that NumPy can read: those with parts in other processes as copies, one in every process.

    All processes have to call it.
    """
    return jax.tree.map(lambda leaf: leaf if is_everywhere(leaf) else _replicate(leaf), tree)


def wait_on_cpus(tree: Any) -> Any:
    """Returns a tree once its arrays are there, if they are over several CPU devices; else at once.

    Programs that send something hold a thread until all devices have sent their parts. A process has few threads, so
    that many such programs at a time would wait for each other without end.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    if leaves and len(devices := leaves[0].devices()) > 1 and next(iter(devices)).platform == "cpu":
        jax.block_until_ready(leaves)
    return tree


def _replicate(leaf: jax.Array) -> jax.Array:
    sharding: Any = leaf.sharding
    return wait_on_cpus(jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, SHARED))(leaf))


@functools.partial(jax.jit, static_argnames=("members",))
def _cut(tree: Any, *, members: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:members], tree)


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if is_traced(leaf):
        return leaf
    if isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if not sharding.mesh.is_multi_process:
        return jax.device_put(leaf, sharding)
    if not is_everywhere(leaf):
        return wait_on_cpus(jax.jit(lambda x: x, out_shardings=sharding)(leaf))
    if is_key(leaf):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _repeat_last(leaf: jax.Array, count: int) -> jax.Array:
    last = jnp.broadcast_to(leaf[-1:], (count, *leaf.shape[1:]))
    return jnp.concatenate([leaf, last])
