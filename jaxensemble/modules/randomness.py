"""Random keys of the members of a mapped computation.

Flax draws from streams that a module owns (an `nnx.RngStream` in each `nnx.Dropout`): a key, and a count of the draws.
Before a module is called, the keys of its streams are derived here in one of two ways: from one key for the whole
ensemble and the member's number, or, inside [`jaxensemble.vmap`][], from the module's own keys and the position along
the mapped dimension.
"""

import contextlib
import contextvars
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import InvalidRngError

from jaxensemble.errors import InputError, RandomnessError, first_line
from jaxensemble.modules.state import Tree, flatten, unflatten
from jaxensemble.modules.structure import Structure

Randomness = Literal["error", "different", "same"]

# PyTorch's words: aten/src/ATen/functorch, checkRandomness.
RANDOM_IN_ERROR_MODE = (
    "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
    "randomness flags on vmap or perform the randomness operation out of vmap"
)


SPLIT_ADVICE = (
    "If the network's random streams are split (nnx.split_rngs), give `Ensemble` their `rngs`, which cannot be made "
    "from the structure alone, or make the ensemble with Ensemble.from_modules."
)


class Level(NamedTuple):
    """One `vmap` that is being traced. `start` is the position of the first element of the chunk that is run."""

    depth: int
    randomness: Randomness
    start: int

    @property
    def axis_name(self) -> str:
        """A name with all that a traced call depends on: `jax.jit` keeps one trace for each set of axis names."""
        return f"jaxensemble.vmap:{self.depth}:{self.randomness}:{self.start}"


_LEVELS: contextvars.ContextVar[tuple[Level, ...]] = contextvars.ContextVar("jaxensemble_vmap_levels", default=())


@contextlib.contextmanager
def enter_level(randomness: Randomness, start: int) -> Iterator[Level]:
    """Enters one more level of `vmap`, for the duration of its call."""
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


def forbid_draws(structure: Structure, rngs: Tree, refusal: str) -> Tree:
    """Returns the random state of a module that must not draw: drawing raises `RandomnessError`.

    `{stream}` in `refusal` becomes the name of the stream. Modules that have streams but do not draw, such as an
    `nnx.Dropout` in evaluation mode, go on working.
    """

    def refuse(_: int, name: str, key: jax.Array) -> ForbiddenKey:
        stream = name.rpartition(".")[0]
        return ForbiddenKey(key, tag=stream, refusal=refusal.format(stream=stream))

    return _map_keys(structure, rngs, refuse)


class _KeylessLinen(nnx.bridge.ToNNX):
    """A `flax.linen` module that must not draw. It gets no keys, and raises an error where it needs one.

    An `nnx.bridge.ToNNX` takes a key from each of its streams at every call, even if it draws nothing.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **{"rngs": nnx.Rngs()} | kwargs)
        except InvalidRngError as error:
            said = first_line(error).partition(" (https")[0]
            raise RandomnessError(
                f"{self.to_nnx__refusal} ({said}; a module of flax.linen has no mode to switch)"
            ) from error


def defer_linen_keys(structure: Structure, module: Any) -> Any:
    """Lets the `flax.linen` modules in a module ask for keys only when they draw, as `nnx` modules do."""
    if not any(shown is nnx.bridge.ToNNX for _, shown in structure.entries.values()):
        return module
    for _, layer in nnx.iter_modules(module):
        if type(layer) is nnx.bridge.ToNNX and layer.to_nnx__rngs is not None:
            keys = [stream.key for _, stream in layer.to_nnx__rngs.items()]
            if keys and all(isinstance(key, ForbiddenKey) for key in keys):
                layer.__class__ = _KeylessLinen
                layer.to_nnx__refusal = keys[0].get_metadata("refusal")  # type: ignore[attr-defined]
    return module


def derive_vmap_keys(structure: Structure, rngs: Tree) -> Tree:
    """Derives the random state of a module inside [`jaxensemble.vmap`][]; outside of any `vmap` it is unchanged."""
    levels = _LEVELS.get()
    if any(level.randomness == "error" for level in levels):
        return forbid_draws(structure, rngs, RANDOM_IN_ERROR_MODE)
    for level in levels:
        if level.randomness == "different":
            position = level.start + jax.lax.axis_index(level.axis_name)
            rngs = _map_keys(structure, rngs, lambda _, __, key, at=position: _fold_position(key, at))
    return rngs


def derive_keys(structure: Structure, rngs: Tree, key: jax.Array) -> Tree:
    """Derives the random state of one member for one call: each stream starts again, with a key made from `key`."""

    def derive(number: int, _: str, old: jax.Array) -> jax.Array:
        stream = jax.random.fold_in(key, number)
        return jax.random.split(stream, old.shape) if old.shape else stream

    return _map_keys(structure, jax.tree.map(_restart_count, rngs), derive)


def initial_rngs(structure: Structure) -> Tree:
    """The first random state of a module with this structure: for each stream a key of its own, and no draws yet.

    Each stream gets one key. Several keys of one stream, as `jax.random.split` makes them, are unknown here: a call of
    a module that needs them fails with `SPLIT_ADVICE`.
    """
    key, values = jax.random.key(0), {}
    for number, leaf in enumerate(structure.streams):
        is_key = issubclass(leaf.type, nnx.RngKey)
        values[leaf.name] = jax.random.fold_in(key, number) if is_key else jnp.zeros((), jnp.uint32)
    return unflatten(values)


def has_single_keys(rngs: Tree) -> bool:
    """Returns whether there are random streams, all of one key each, as `initial_rngs` makes them."""
    keys = [leaf for leaf in jax.tree.leaves(rngs) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return bool(keys) and all(key.shape == () for key in keys)


def is_transform_error(error: Exception) -> bool:
    """Returns whether an error comes from Flax's `nnx.vmap` or `nnx.scan` itself, and not from the mapped function."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    own = [name for name in names if name.partition(".")[0] != "jax"]
    return bool(own) and own[-1].startswith("flax.nnx.transforms")


def split_rngs(rngs: Tree, members: int) -> Tree:
    """Makes the random state of several members, which draw different numbers, from the state of one module."""
    return unflatten({name: _split_leaf(leaf, members) for name, leaf in flatten(rngs).items()})


def _split_leaf(leaf: jax.Array, members: int) -> jax.Array:
    """Splits a random key into one for each member, or repeats a counter."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(leaf, members)
    return jnp.broadcast_to(leaf, (members, *leaf.shape))


def member_keys(key: jax.Array, members: int) -> jax.Array:
    """A key for each member, `[M]`; the key of a member does not depend on M."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(members))


def as_key(key: Any) -> jax.Array:
    """Converts a JAX key, typed or of the older `uint32[2]` kind, to a typed key.

    **Raises:** `InputError` for any other object.
    """
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        if key.dtype == jnp.uint32 and key.ndim == 1:
            return jax.random.wrap_key_data(key)
    got = jax.typeof(key) if isinstance(key, jax.Array) else repr(key)
    raise InputError(f"`key` must be one JAX random key, such as jax.random.key(0); got {got}")


def _map_keys(structure: Structure, rngs: Tree, change: Callable[[int, str, Any], Any]) -> Tree:
    flat = flatten(rngs)  # `merge` raises an error for missing keys
    names = [leaf.name for leaf in structure.streams if issubclass(leaf.type, nnx.RngKey)]
    changed = {name: change(number, name, flat[name]) for number, name in enumerate(names) if name in flat}
    return unflatten(flat | changed)


def _restart_count(value: jax.Array) -> jax.Array:
    return value if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else jnp.zeros_like(value)


def _fold_position(key: jax.Array, position: jax.Array) -> jax.Array:
    if key.shape == ():
        return jax.random.fold_in(key, position)
    folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key.reshape(-1), position)
    return folded.reshape(key.shape)
