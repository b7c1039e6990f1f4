"""Ensembles and members as `pickle` takes them: for other processes (multiprocessing, joblib, Ray), not for files.

The class of a ported network is made from its source, so that no other process could import it. Of an ensemble travels
the network as data, in the mode that the ensemble is in, and the arrays; of a member its structure, in which classes
stand with their source. Functions that JAX has wrapped, as `jax.nn.relu`, travel by name.
"""

import dataclasses
import functools
import pkgutil
import types
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.artifact.dtypes import is_key
from jaxensemble.artifact.saving import network_of
from jaxensemble.errors import NarrowIntegerWarning
from jaxensemble.inputs import ENABLE, require_x64, x64_is_on
from jaxensemble.modules.build import skeleton
from jaxensemble.modules.state import KINDS, merge, split
from jaxensemble.modules.structure import Structure
from jaxensemble.network.json_format import from_json, to_json
from jaxensemble.network.network import Network
from jaxensemble.network.proof import Lineage, Proof
from jaxensemble.network.sources import Source
from jaxensemble.running.plan import Plan
from jaxensemble.source import made_from, source_of

if TYPE_CHECKING:
    from jaxensemble.ensemble import Ensemble


def reduced(ensemble: "Ensemble") -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What `Ensemble.__reduce__` returns.

    **Raises:** `StateError` for an ensemble whose structure is no longer that of its network.
    """
    trees = {kind: jax.tree.map(_packed, getattr(ensemble, kind)) for kind in KINDS}
    x64 = x64_is_on() if ensemble.proof is None else ensemble.proof.x64
    told = (ensemble.proof, ensemble.lineage, ensemble.sources, x64)
    rest = (type(ensemble), trees, ensemble.origin, ensemble.plan, *told)
    if not isinstance(ensemble.network, Network):
        return _restored, (ensemble.graphdef, ensemble.network, *rest)
    return _restored_ported, (to_json(ensemble.network), network_of(ensemble).training, *rest)


def _restored_ported(text: str, training: tuple[str, ...], *rest: Any) -> "Ensemble":
    network = from_json(text)
    with jax.enable_x64(True):  # embeddings know their dtype, which may be float64
        graphdef = Structure.of(skeleton(dataclasses.replace(network, training=training)).graphdef)
    return _restored(graphdef, network, *rest)


def _restored(
    graphdef: Structure,
    network: Any,
    cls: type["Ensemble"],
    trees: Mapping[str, Any],
    origin: Any,
    plan: Plan | None,
    proof: Proof | None,
    lineage: Lineage | None,
    sources: tuple[Source, ...] | None,
    x64: bool,
) -> "Ensemble":
    """The ensemble again; without its proof, and with a warning, if integers have less bits than they had.

    **Raises:** `InputError` for 64-bit arrays where JAX would round them.
    """
    arrays = {kind: jax.tree.map(_unpacked, tree) for kind, tree in trees.items()}
    if x64 and not x64_is_on():
        warnings.warn(
            "this ensemble was pickled with JAX's 64-bit types on, and they are off: integers have 32 bits, and where "
            f"they overflow, outputs are others. `proof` is None. To have it, {ENABLE}.",
            NarrowIntegerWarning,
            stacklevel=2,
        )
        proof = None
    ensemble = cls(graphdef, **arrays, network=network, origin=origin, plan=plan)
    return ensemble.proven(proof, lineage).read_from(sources)


def reduced_module(module: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What `__reduce__` of a module whose class was made from source returns."""
    state = split(module)
    return _restored_module, (state.graphdef, *(jax.tree.map(_packed, getattr(state, kind)) for kind in KINDS))


def _restored_module(graphdef: Structure, *trees: Any) -> Any:
    return merge(graphdef, *(jax.tree.map(_unpacked, tree) for tree in trees))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that has been made where it is unpickled."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def portable(value: Any) -> Any:
    """A part of a structure, with what `pickle` does not find in other processes replaced by what makes it there."""
    if isinstance(value, functools.partial):
        return _Call(_partial, (portable(value.func), portable(value.args), portable(value.keywords)))
    if type(value) in (tuple, list):
        return type(value)(map(portable, value))
    if type(value) is dict:
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, type | types.FunctionType):
        source = source_of(value)
        return value if source is None else _Call(made_from, (*source, value.__qualname__))
    if hasattr(value, "__wrapped__"):
        name = f"{value.__module__}:{value.__qualname__}"
        if _found(name) is value:
            return _Call(pkgutil.resolve_name, (name,))
    return value


def _partial(function: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    return functools.partial(function, *arguments, **named)


def _found(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):  # as of what was made within a function
        return None


def _packed(leaf: Any) -> Any:
    if is_key(leaf):
        return _Keys(str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)))
    return np.asarray(leaf)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Random keys: JAX's name of their generator, and their words."""

    generator: str
    words: np.ndarray


def _unpacked(leaf: Any) -> jax.Array:
    if isinstance(leaf, _Keys):
        return jax.random.wrap_key_data(jnp.asarray(leaf.words), impl=leaf.generator)
    require_x64(leaf.dtype, "an array of the pickled ensemble")
    return jnp.asarray(leaf)
