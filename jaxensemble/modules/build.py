"""States of a `Network`: with shapes alone, and filled with arrays."""

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
    """The state of the network's module: shapes and dtypes for arrays, and the first random keys.

    The layers in `network.training` are in training mode, all other layers in evaluation mode.
    """
    module = nnx.eval_shape(lambda: load_class(network)(rngs=_shape_rngs()))
    nnx.Module.eval(module)
    for path, layer in nnx.iter_modules(module):
        if ".".join(str(part) for part in path) in network.training:
            layer.train()
    state = split(module)
    return state._replace(rngs=initial_rngs(state.graphdef))


class _UncountedStream(nnx.RngStream):
    """A stream of one key, which is enough for shapes.

    While only shapes are computed, each count of a key would take Flax longer than the last.
    """

    def __call__(self) -> jax.Array:
        return self.key[...]

    def fork(self, *, split: int | tuple[int, ...] | None = None) -> nnx.RngStream:
        """Returns an ordinary stream, which a layer keeps."""
        key = self()
        return nnx.RngStream(key if split is None else jax.random.split(key, split), tag=self.tag)


def _shape_rngs() -> nnx.Rngs:
    rngs = nnx.Rngs(0)
    rngs.default = _UncountedStream(0, tag="default")  # type: ignore[attr-defined]
    return rngs


def fill_state(state: State, arrays: Mapping[str, Any], members: int | None = None) -> State:
    """Fills the shapes of a state with arrays by dotted name; with `members`, arrays have a leading axis of this size.

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
