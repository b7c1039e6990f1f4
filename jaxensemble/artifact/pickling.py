"""Pickles of ensembles, for other processes (multiprocessing, joblib, Ray) and not for files.

The class of a ported network is made from its source, so that no other process could import it. The pickle of an
ensemble therefore holds the network as data, in the mode of the ensemble, and the arrays.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxensemble.arrays import ENABLE_X64, is_x64_on
from jaxensemble.artifact.contents import Saved
from jaxensemble.artifact.saving import network_in_mode
from jaxensemble.errors import NarrowIntegerWarning
from jaxensemble.modules.build import skeleton
from jaxensemble.modules.pickling import pack_leaf, unpack_leaf
from jaxensemble.modules.state import KINDS, State, Tree
from jaxensemble.modules.structure import Structure
from jaxensemble.network.json_format import from_json, to_json
from jaxensemble.network.network import Network
from jaxensemble.network.proof import Lineage, Proof
from jaxensemble.network.sources import Source


def reduce_ensemble(saved: Saved, make: Callable[..., Any], *others: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The result of an ensemble's `__reduce__`. `make` takes what was saved and the `others`, and returns the ensemble.

    **Raises:** `StateError` for an ensemble whose structure is no longer that of its network.
    """
    trees = {kind: jax.tree.map(pack_leaf, getattr(saved.state, kind)) for kind in KINDS}
    x64 = is_x64_on() if saved.proof is None else saved.proof.x64
    rest = (make, others, trees, saved.origin, saved.proof, saved.lineage, saved.sources, x64)
    if not isinstance(saved.network, Network):
        return _restore_ensemble, (saved.state.graphdef, saved.network, *rest)
    return _restore_ported, (to_json(saved.network), network_in_mode(saved).training, *rest)


def _restore_ported(text: str, training: tuple[str, ...], *rest: Any) -> Any:
    network = from_json(text)
    with jax.enable_x64(True):  # the dtype of embeddings may be float64
        graphdef = Structure.of(skeleton(dataclasses.replace(network, training=training)).graphdef)
    return _restore_ensemble(graphdef, network, *rest)


def _restore_ensemble(
    graphdef: Structure,
    network: Any,
    make: Callable[..., Any],
    others: tuple[Any, ...],
    trees: Mapping[str, Tree],
    origin: Any,
    proof: Proof | None,
    lineage: Lineage | None,
    sources: tuple[Source, ...] | None,
    x64: bool,
) -> Any:
    """Restores an ensemble; without its proof, and with a warning, if integers have fewer bits than before.

    **Raises:** `InputError` for 64-bit arrays that JAX would round.
    """
    state = State(graphdef, **{kind: jax.tree.map(unpack_leaf, tree) for kind, tree in trees.items()})
    if x64 and not is_x64_on():
        warnings.warn(
            "this ensemble was pickled with JAX's 64-bit types on, and they are off: integers have 32 bits, and where "
            f"they overflow, outputs are others. `proof` is None. To have it, {ENABLE_X64}.",
            NarrowIntegerWarning,
            stacklevel=2,
        )
        proof = None
    return make(Saved(state, network, origin, proof, lineage, sources), *others)
