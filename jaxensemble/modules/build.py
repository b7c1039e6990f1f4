"""From a `Network` and its arrays to a `flax.nnx` module."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxensemble.errors import StateError
from jaxensemble.modules.classes import load_class
from jaxensemble.modules.randomness import initial_rngs
from jaxensemble.modules.state import State, flatten, split, unflatten
from jaxensemble.network.network import Network


def skeleton(network: Network) -> State:
    """The state of the network's module: shapes and dtypes for arrays, random keys as they begin.

    Layers are in the mode the network says: `training` ones in training mode, all others in evaluation mode.
    """
    module = nnx.eval_shape(lambda: load_class(network)(rngs=_shape_rngs()))
    nnx.Module.eval(module)
    for path, layer in nnx.iter_modules(module):
        if ".".join(str(part) for part in path) in network.training:
            layer.train()
    state = split(module)
    return state._replace(rngs=initial_rngs(state.graphdef))


class _UncountedStream(nnx.RngStream):
    """A stream of one key: enough for shapes.

    Counting the keys while nothing but shapes is computed takes Flax a time that grows with all that came before.
    """

    def __call__(self) -> jax.Array:
        return self.key[...]

    def fork(self, *, split: int | tuple[int, ...] | None = None) -> nnx.RngStream:
        """A stream as any other: layers keep it."""
        key = self()
        return nnx.RngStream(key if split is None else jax.random.split(key, split), tag=self.tag)


def _shape_rngs() -> nnx.Rngs:
    rngs = nnx.Rngs(0)
    rngs.default = _UncountedStream(0, tag="default")  # type: ignore[attr-defined]
    return rngs


def fill_state(state: State, arrays: Mapping[str, Any], members: int | None = None) -> State:
    """The state with arrays, given by dotted name, in place of shapes; with a leading axis of `members`, if given.

    **Raises:** `StateError` listing every array that is missing, not needed or of another shape.
    """
    groups = {kind: flatten(getattr(state, kind)) for kind in ("params", "buffers", "constants")}
    wanted = {
        name: tuple(leaf.shape) if members is None or kind == "constants" else (members, *leaf.shape)
        for kind, group in groups.items()
        for name, leaf in group.items()
    }
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in arrays]
    problems += [f"not needed: {name} {tuple(array.shape)}" for name, array in arrays.items() if name not in wanted]
    problems += [
        f"{name}: expected shape {shape}, got {tuple(arrays[name].shape)}"
        for name, shape in wanted.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if problems:
        raise StateError("arrays and network do not fit together:\n  " + "\n  ".join(problems))
    trees = {kind: unflatten({name: arrays[name] for name in group}) for kind, group in groups.items()}
    return state._replace(**trees)
