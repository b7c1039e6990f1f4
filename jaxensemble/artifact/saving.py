"""Writing of an artifact, whole or not at all."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from jaxensemble.arrays import is_x64_on
from jaxensemble.artifact.contents import Saved
from jaxensemble.artifact.loading import misfits, verify
from jaxensemble.artifact.manifest import (
    FILES,
    FORMAT,
    MANIFEST,
    NETWORK,
    SOURCE,
    WEIGHTS,
    FileRecord,
    LeafRecord,
    Manifest,
)
from jaxensemble.artifact.weights import MemberHashes, ReadBytes, bytes_of, encode_leaves, file_order, state_leaves
from jaxensemble.compat import broadcast_one_to_all
from jaxensemble.devices.placement import is_in_this_process
from jaxensemble.dtypes import WIDE
from jaxensemble.errors import InputError, StateError
from jaxensemble.files import durable
from jaxensemble.files.durable import as_path
from jaxensemble.modules.build import skeleton
from jaxensemble.modules.state import State
from jaxensemble.modules.structure import Structure
from jaxensemble.network.json_format import from_json, to_json
from jaxensemble.network.network import Network
from jaxensemble.network.weight_map import Origin
from jaxensemble.source import print_source
from jaxensemble.version import VERSION


def write_artifact(saved: Saved, path: Path | str, *, force: bool = False) -> None:
    """Writes an artifact: see [`Ensemble.save`][jaxensemble.Ensemble.save].

    Where members are on several hosts, all have to call this, and the first one writes.

    **Raises:** on the other hosts, an `InputError` if the first one cannot write.
    """
    network, origin = network_in_mode(saved), _check_origin(saved)
    leaves = state_leaves(saved.state)
    write = functools.partial(_write, saved, network, origin, path, leaves, force=force)
    if is_in_this_process(saved.state[1:]):
        write(lambda name: bytes_of(leaves[name][1]))
    else:
        _write_from_hosts(leaves, write)


def _write_from_hosts(leaves: Mapping[str, tuple[str, Any]], write: Callable[[ReadBytes], None]) -> None:
    """Has the first host write, while the others give it their parts, one array after another."""
    left, error = file_order(leaves), None

    def read(name: str) -> memoryview:
        left.remove(name)
        return bytes_of(leaves[name][1])

    if jax.process_index() == 0:
        try:
            write(read)
        except Exception as raised:  # raised below, once no host waits
            error = raised
    while left:
        read(left[0])
    failed = bool(broadcast_one_to_all(np.array(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise InputError("the first host could not write the artifact: its own error says why")


def _write(
    saved: Saved,
    network: Network,
    origin: Origin | None,
    path: Path | str,
    leaves: Mapping[str, tuple[str, Any]],
    read: ReadBytes,
    *,
    force: bool,
) -> None:
    check_artifact_path(path, force=force)
    proof, hashes = saved.proof, MemberHashes(range(saved.members))
    with durable.new_directory(Path(path).resolve(), FILES, replace=force) as folder:
        files = {
            NETWORK: FileRecord(*durable.write_new_file(folder / NETWORK, [to_json(network).encode()])),
            SOURCE: FileRecord(*durable.write_new_file(folder / SOURCE, [print_source(network).encode()])),
        }
        records: dict[str, LeafRecord] = {}
        files[WEIGHTS] = FileRecord(
            *durable.write_new_file(folder / WEIGHTS, encode_leaves(leaves, records, hashes, read))
        )
        manifest = Manifest(
            version=FORMAT,
            versions={"jaxensemble": VERSION, "jax": jax.__version__, "flax": flax.__version__},
            members=saved.members,
            x64=(is_x64_on() if proof is None else proof.x64) or _has_wide_dtypes(leaves.values()),
            verified=proof is not None,
            files=files,
            leaves={name: records[name] for name in leaves},
            proof=proof,
            lineage=saved.lineage,
            origin=origin,
            sources=saved.sources,
            member_hashes=tuple(hashes.found().values()),
        )
        durable.write_new_file(folder / MANIFEST, [manifest.to_json().encode()])
        if verify(folder) != manifest:  # `verify` reads all files, and is as strict as loading
            raise StateError(f"the artifact in `{folder}` differs from what was written: {manifest!r}")


def check_artifact_path(path: Path | str, *, force: bool = False) -> None:
    """Checks that an artifact can be saved at a path.

    **Raises:** `InputError` for a parent directory that does not exist, for a file, for a directory that holds any file
    that is not an artifact's, and, without `force`, for an artifact: nothing except artifacts is ever removed.
    """
    target = as_path(path, "path").resolve()
    if not target.parent.is_dir():
        raise InputError(f"`{path}` cannot be made: there is no directory `{target.parent}`")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"`{path}` exists, and is a file: an artifact is a directory")
    unexpected = durable.unexpected_entries(target, FILES)
    if unexpected:
        raise InputError(f"`{path}` exists, and is not replaced: it is no artifact, but holds {', '.join(unexpected)}")
    if not force and any(target.iterdir()):
        raise InputError(f"`{path}` exists: force=True (--force) replaces it")


def network_in_mode(saved: Saved) -> Network:
    """The network in the mode of the ensemble, as loading reads it.

    **Raises:** `StateError` for an ensemble that was not ported, or was changed since.
    """
    network = saved.network
    if not isinstance(network, Network):
        raise StateError(
            "only a network that was ported can be saved as data: this ensemble was made of Flax modules, and no file "
            'could hold their code. Save its arrays instead, {"params": ensemble.params, "buffers": ensemble.buffers}, '
            "for instance with orbax.checkpoint.StandardCheckpointer, and make the modules with your code."
        )
    for candidate in (network, dataclasses.replace(network, training=_training_layers(network, saved.state.graphdef))):
        again = from_json(to_json(candidate))
        with jax.enable_x64(True):  # as when loading: the dtype of embeddings may be float64
            state = skeleton(again)
        if state.graphdef == saved.state.graphdef:
            _check_fit(state, saved)
            return again
    raise StateError(f"the structure of the ensemble is no longer that of its network, {network.name}: it was changed")


def _check_fit(state: State, saved: Saved) -> None:
    found = {
        name: LeafRecord(kind, str(leaf.dtype), tuple(leaf.shape), "")
        for name, (kind, leaf) in state_leaves(saved.state).items()
    }
    problems = misfits(state, found, saved.members)
    if problems:
        raise StateError("the arrays of the ensemble do not fit its network:\n  " + "\n  ".join(problems))


def _training_layers(network: Network, structure: Structure) -> tuple[str, ...]:
    """The layers in training mode, by the flags of each layer and its sublayers.

    Layers without a flag keep the mode that the network has for them.
    """
    flags: dict[str, bool] = {}
    for path, evaluating in structure.modes.items():
        parts = path[:-1]
        flags |= {".".join(parts[:k]): not evaluating for k in range(1, len(parts) + 1)}
    said = set(network.training)
    return tuple(layer.path for layer in network.layers if flags.get(layer.path, layer.path in said))


def _has_wide_dtypes(leaves: Iterable[tuple[str, Any]]) -> bool:
    return any(str(leaf.dtype) in WIDE for _, leaf in leaves)


def _check_origin(saved: Saved) -> Origin | None:
    origin = saved.origin
    if origin is not None and not isinstance(origin, Origin):
        raise StateError(
            f"`origin` must be a jaxensemble.network.weight_map.Origin to be saved; got {type(origin).__name__}"
        )
    return origin
