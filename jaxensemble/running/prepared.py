"""Prepared ensembles: a plan, a compiled program, and the weights as this program reads them, as one value."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxensemble.arrays import are_deleted, as_arrays, is_traced
from jaxensemble.devices.placement import SHARED, wait_on_cpus
from jaxensemble.errors import InputError, StateError
from jaxensemble.modules.randomness import as_key
from jaxensemble.network.arguments import bind_arguments, restore_outputs
from jaxensemble.network.inputs import check_member_axis
from jaxensemble.network.network import Network, Ref
from jaxensemble.programs.rows import Axes
from jaxensemble.running.compiled import GIVEN_AWAY, MembersProgram, is_debugging
from jaxensemble.running.device import human_bytes
from jaxensemble.running.explanation import explain_program
from jaxensemble.running.padded import count_rows, cut_rows, pad_rows
from jaxensemble.running.plan import Plan


@dataclasses.dataclass(frozen=True)
class Padding:
    """The batch axes of the inputs and outputs of one member, the axes ahead of the inputs', and the rows compiled."""

    rows_in: Axes
    rows_out: Axes
    ahead: int
    rows: int


class Prepared:
    """An ensemble that is compiled for inputs of certain shapes and dtypes: `Ensemble.prepare` makes it.

    It is called as the ensemble is, with inputs of these shapes and dtypes. Where the program reads weights in another
    form than they are stacked, it holds arrays of its own: see `weight_bytes`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxensemble import Ensemble, Plan
    >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)])
    >>> run = ensemble.prepare(jnp.ones((64, 3)), plan=Plan())
    >>> run
    Prepared(5 members, float32[64,3], Plan(), 120 bytes beside the ensemble)
    >>> run(jnp.ones((64, 3))).shape
    (5, 64, 2)
    """

    def __init__(
        self,
        program: MembersProgram,
        arrays: Sequence[jax.Array],
        rngs: Any,
        network: Network | None,
        given: tuple[Any, tuple[Any, ...]],
        ensemble: Any,
        padding: Padding | None = None,
    ):
        self.program, self.arrays = program, list(arrays)
        self._rngs, self._network, self._ensemble = rngs, network, ensemble
        self._run = program.run if program.call.placement is None else _waiting(program.run)
        key, inputs = given
        self._key = None if key is None else jax.random.key_impl(key)
        self._shapes = jax.tree.map(jax.typeof, inputs)  # whatever 64-bit types are later
        # Nothing is fixed, inputs are filled up by no members, and outputs are as the program returns them.
        self._placement = program.call.placement
        self._is_plain = (
            padding is None
            and (self._placement is None or not program.call.each)
            and (
                network is None
                or (isinstance(network.outputs, Ref) and all(isinstance(tree, Ref) for tree in network.inputs))
            )
        )
        self._padding = padding

    @property
    def ensemble(self) -> Any:
        """The ensemble that was prepared, with the arrays that it had then.

        **Raises:** `StateError` if it gave its arrays away.
        """
        if self._ensemble is None:
            raise StateError(GIVEN_AWAY)
        return self._ensemble

    @property
    def members(self) -> int:
        """The number of members M."""
        return self.program.members

    @property
    def plan(self) -> Plan:
        """The plan of the program."""
        return self.program.call.plan

    @property
    def weight_bytes(self) -> int:
        """The bytes of the arrays that are held beside those of the ensemble."""
        return sum(self.program.sizes)

    def explain(self) -> str:
        """Explains the program: its plan, instructions, work and memory, and its time beside the least possible.

        The program is run for this, with ones for inputs.
        """
        ones = self._put(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), self._shapes))
        key = None if self._key is None else self._put_key(jax.random.key(0, impl=self._key))
        run = lambda: self._run(self.arrays, self._rngs, key, ones)  # noqa: E731
        return explain_program(self.program, run, sum(leaf.nbytes for leaf in jax.tree.leaves(ones)))

    def __call__(self, *inputs: Any, key: Any = None, **named: Any) -> Any:
        """The outputs of all members, as the ensemble returns them.

        **Raises:** `InputError` for inputs of other shapes or dtypes, and for a key that was not there, or was, when
        the program was prepared; `StateError` if arrays that it shares with the ensemble are deleted.
        """
        is_usual = key is None and not named and self._is_plain and not is_debugging()
        if is_usual and all(isinstance(array, jax.Array) for array in inputs):
            try:
                return self._run(self.arrays, self._rngs, None, inputs)
            except (TypeError, ValueError):
                pass  # tracers, or wrong inputs
            except RuntimeError:
                self._check_arrays()
                raise
        return self._call_slowly(inputs, named, key)

    def check_arguments(self, *inputs: Any) -> None:
        """Checks that the program takes inputs, without running it.

        **Raises:** `InputError` for inputs of other shapes or dtypes, and where the program needs a key.
        """
        self._check(self._fill(as_arrays(bind_arguments(self._network, inputs, {}), "inputs")), None)

    def _call_slowly(self, inputs: tuple[Any, ...], named: dict[str, Any], key: Any) -> Any:
        inputs = self._fill(as_arrays(bind_arguments(self._network, inputs, named), "inputs"))
        key = None if key is None else as_key(key)
        padding, rows = self._padding, 0
        if padding is not None:
            rows = count_rows(inputs, padding.rows_in, padding.ahead)
            if rows > padding.rows:
                raise InputError(f"the program was prepared for at most {padding.rows} rows; got {rows}")
            if rows < padding.rows:
                inputs = pad_rows(inputs, padding.rows_in, padding.ahead, padding.rows)
        self._check(inputs, key)
        if is_traced((key, inputs)) or is_debugging():
            returned = self.program.trace(self.arrays, self._weights(), self._rngs, key, inputs)
        else:
            returned = self._run(self.arrays, self._rngs, self._put_key(key), self._put(inputs))
        if padding is not None and rows != padding.rows:
            returned = cut_rows(returned, padding.rows_out, rows)
        return returned if self._network is None else restore_outputs(self._network.outputs, returned)

    def _weights(self) -> Any:
        """The arrays of the ensemble; None if it has given them away."""
        if self._ensemble is None:
            return None
        weights = self._ensemble.params, self._ensemble.buffers, self._ensemble.constants
        return None if are_deleted(jax.tree.leaves(weights)) else weights

    def _check_arrays(self) -> None:
        if are_deleted(self.arrays):
            raise StateError(
                "arrays that this program shares with its ensemble are deleted: another prepare(..., donate=True), or "
                "a function of JAX with donated arguments, took them. Prepare the program again"
            )

    def _check(self, inputs: tuple[Any, ...], key: Any) -> None:
        self._check_arrays()
        wanted, got = self._shapes, jax.tree.map(jax.typeof, inputs)
        if jax.tree.structure(wanted) != jax.tree.structure(got) or not all(
            (a.shape, a.dtype) == (b.shape, b.dtype)
            for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True)
        ):
            raise InputError(
                f"the program was prepared for inputs {_show(wanted)}; got {_show(got)}: it takes no others. Where "
                "the network does, prepare another program, or call the ensemble, which keeps one for each shape"
            )
        if (None if key is None else jax.random.key_impl(key)) != self._key:
            known = "without a key" if self._key is None else f"with a key of {self._key}: pass such a key"
            raise InputError(f"the program was prepared {known}")

    def _fill(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns inputs for every slot of the stack, where each member has its own."""
        if self._placement is None or not self.program.call.each:
            return inputs
        check_member_axis(inputs, self.members)
        return self._placement.fill(inputs)

    def _put(self, inputs: Any) -> Any:
        """Returns inputs in their places on the mesh.

        **Raises:** `InputError` without a mesh, for inputs that were put onto another device than the program's.
        """
        if self._placement is None:
            self._check_device(inputs)
            return inputs
        call = self.program.call
        axes = call.rows_in or (None,) * len(jax.tree.leaves(inputs))
        return self._placement.put_inputs(inputs, axes, each=call.each)

    def _put_key(self, key: Any) -> Any:
        if self._placement is None:
            self._check_device(key)
            return key
        return self._placement.put(key, SHARED)

    def _check_device(self, arrays: Any) -> None:
        given = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array) and leaf.committed]
        here = {self.program.device}
        if not all(isinstance(leaf.sharding, SingleDeviceSharding) and leaf.devices() == here for leaf in given):
            raise InputError(
                f"the program was prepared for arrays on {here}; got {[leaf.sharding for leaf in given]}: "
                "move them by jax.device_put, or call the ensemble"
            )

    def __reduce__(self) -> Any:
        raise StateError(
            "a compiled program can be neither pickled nor copied deeply: pickle or copy its ensemble (run.ensemble), "
            "and prepare that"
        )

    def __repr__(self) -> str:
        held = f", {human_bytes(self.weight_bytes)} beside the ensemble" if self.weight_bytes else ""
        return f"Prepared({self.members} members, {_show(self._shapes)}, {self.plan!r}{held})"


def _show(trees: Any) -> str:
    """Shows inputs, those of a dict with their names. Of many numbers, as in a list, only the first."""
    found = [
        (jax.tree_util.keystr(path[1:]), leaf.str_short()) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    ]
    shown = [f"{name} {shape}".strip() for name, shape in found[:_MOST]]
    return ", ".join([*shown, *(["..."] if len(found) > _MOST else [])]) or "none"


_MOST = 8
"""The most arrays that an error names."""


def _waiting(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: wait_on_cpus(run(*arguments))
