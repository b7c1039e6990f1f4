"""Which random key each member of a mapped computation draws from.

Flax draws from streams that a module owns (an `nnx.RngStream` in each `nnx.Dropout`): a key, and a count of the draws
made. Here the keys of those streams are derived in one of two ways before a module is called: from one key for the
whole ensemble and the member's number, or, inside [`jaxensemble.vmap`][], from the module's own keys and the position
along the mapped dimension.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxensemble.errors import InputError, RandomnessError
from jaxensemble.state import Tree, flatten, kind_of, unflatten
from jaxensemble.structure import Structure

Randomness = Literal["error", "different", "same"]

# PyTorch's words: aten/src/ATen/functorch, checkRandomness.
RANDOM_IN_ERROR_MODE = (
    "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
    "randomness flags on vmap or perform the randomness operation out of vmap"
)


class Level(NamedTuple):
    """One `vmap` that is being traced. `start` is the position of its first element, where it runs chunk by chunk."""

    depth: int
    randomness: Randomness
    start: int

    @property
    def axis_name(self) -> str:
        """Spells out all that a traced call depends on: `jax.jit` tells traces apart by the axis names around them."""
        return f"jaxensemble.vmap:{self.depth}:{self.randomness}:{self.start}"


_LEVELS: contextvars.ContextVar[tuple[Level, ...]] = contextvars.ContextVar("jaxensemble_vmap_levels", default=())


@contextlib.contextmanager
def entered(randomness: Randomness, start: int) -> Iterator[Level]:
    """One more level of `vmap`, for the duration of its call."""
    outer = _LEVELS.get()
    level = Level(len(outer), randomness, start)
    token = _LEVELS.set((*outer, level))
    try:
        yield level
    finally:
        _LEVELS.reset(token)


class ForbiddenKey(nnx.RngKey):
    """A random stream's key that must not be drawn from; reading it raises `RandomnessError` with its `refusal`."""

    def get_value(self, **_: Any) -> Any:
        raise RandomnessError(self.get_metadata("refusal"))


def forbid(structure: Structure, rngs: Tree, refusal: str) -> Tree:
    """The random state of a module that must not draw: drawing raises `RandomnessError`.

    `{stream}` within `refusal` becomes the name of the stream. Modules that hold streams but do not draw, such as an
    `nnx.Dropout` in evaluation mode, go on working.
    """

    def refuse(_: int, name: str, key: jax.Array) -> ForbiddenKey:
        stream = name.rpartition(".")[0]
        return ForbiddenKey(key, tag=stream, refusal=refusal.format(stream=stream))

    return _map_keys(structure, rngs, refuse)


def inside_vmap(structure: Structure, rngs: Tree) -> Tree:
    """The random state of a module as the enclosing [`jaxensemble.vmap`][]s want it; unchanged outside of any."""
    levels = _LEVELS.get()
    if any(level.randomness == "error" for level in levels):
        return forbid(structure, rngs, RANDOM_IN_ERROR_MODE)
    for level in levels:
        if level.randomness == "different":
            position = level.start + jax.lax.axis_index(level.axis_name)
            rngs = _map_keys(structure, rngs, lambda _, __, key, at=position: _fold(key, at))
    return rngs


def from_key(structure: Structure, rngs: Tree, key: jax.Array) -> Tree:
    """The random state of one member for one call: each stream starts anew, with a key of its own made from `key`."""

    def derive(number: int, _: str, old: jax.Array) -> jax.Array:
        stream = jax.random.fold_in(key, number)
        return jax.random.split(stream, old.shape) if old.shape else stream

    return _map_keys(structure, jax.tree.map(_restarted, rngs), derive)


def member_keys(key: jax.Array, members: int) -> jax.Array:
    """A key for each member, `[M]`; the first ones stay the same whatever M is."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(members))


def as_key(key: Any) -> jax.Array:
    """`key` as a typed key. Raises `InputError` unless it is one JAX key, typed or of the older `uint32[2]` kind."""
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        if key.dtype == jnp.uint32 and key.ndim == 1:
            return jax.random.wrap_key_data(key)
    got = jax.typeof(key) if isinstance(key, jax.Array) else repr(key)
    raise InputError(f"`key` must be one JAX random key, such as jax.random.key(0); got {got}")


def _map_keys(structure: Structure, rngs: Tree, change: Callable[[int, str, Any], Any]) -> Tree:
    flat = flatten(rngs)
    names = [leaf.name for leaf in structure.leaves if kind_of(leaf) == "rngs" and issubclass(leaf.type, nnx.RngKey)]
    return unflatten(flat | {name: change(number, name, flat[name]) for number, name in enumerate(names)})


def _restarted(value: jax.Array) -> jax.Array:
    return value if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else jnp.zeros_like(value)


def _fold(key: jax.Array, position: jax.Array) -> jax.Array:
    if key.shape == ():
        return jax.random.fold_in(key, position)
    folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key.reshape(-1), position)
    return folded.reshape(key.shape)
