"""Reading of an artifact, whose files are not trusted: all are checked before they are used, and none is run."""

import dataclasses
import hashlib
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from jaxensemble.arrays import ENABLE_X64, is_x64_on, require_x64
from jaxensemble.artifact.contents import Saved
from jaxensemble.artifact.manifest import (
    FILES,
    MANIFEST,
    NETWORK,
    SOURCE,
    WEIGHTS,
    FileRecord,
    LeafRecord,
    Manifest,
    manifest_from_json,
)
from jaxensemble.artifact.weights import (
    MemberHashes,
    as_leaf,
    header_differences,
    list_differences,
    read_header,
    read_leaves,
    read_members,
)
from jaxensemble.devices.placement import SHARED, Placement
from jaxensemble.dtypes import KEYS, NARROW, WIDE, is_key
from jaxensemble.errors import InputError, JaxEnsembleError, NarrowIntegerWarning, describe_error, first_line
from jaxensemble.files.durable import as_path
from jaxensemble.modules.build import skeleton
from jaxensemble.modules.state import KINDS, State, Tree, flatten, unflatten
from jaxensemble.modules.structure import Structure
from jaxensemble.network.json_format import from_json
from jaxensemble.network.network import Network

LIMITS = {MANIFEST: 16 << 20, NETWORK: 16 << 20, SOURCE: 16 << 20}
"""The most bytes that each file except the weights may have. A network of 1,000 layers takes less than a million."""


def verify(path: Path | str) -> Manifest:
    """Reads an artifact from the first to the last byte, and compares all files and arrays with their hashes.

    **Returns:** the manifest of the artifact: `members`, `proof`, `leaves`, `versions` ...

    **Raises:** `InputError` naming every file and array that differs from what was saved, and as `Ensemble.load`.

    >>> verify("no/such/place")
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: `no/such/place` is no artifact: there is no such directory
    """
    artifact = Artifact.open(path)
    artifact.verify()
    return artifact.manifest


class _DamagedFile(InputError):
    """A file differs from the file that was saved."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A directory whose files are complete and fit together; its arrays are not read yet."""

    folder: Path
    manifest: Manifest
    network: Network

    @classmethod
    def open(cls, path: Path | str) -> "Artifact":
        """Reads all except the arrays: the manifest, the network, the source, and the header of the weights.

        **Raises:** `InputError` with all that is wrong in these files.
        """
        folder = as_path(path, "path")
        try:
            _check_listing(folder)
            manifest = manifest_from_json(_read_limited(folder, MANIFEST))
            _check_sizes(folder, manifest)
            _read_text(folder, SOURCE, manifest.files[SOURCE])  # for people: nothing below looks at it
            network = from_json(_read_text(folder, NETWORK, manifest.files[NETWORK]))
            problems = header_differences(read_header(folder / WEIGHTS), manifest.leaves)
            if problems:
                raise InputError(f"{WEIGHTS} does not hold the arrays that {MANIFEST} lists:{_list_problems(problems)}")
        except JaxEnsembleError as error:
            what = "is damaged" if isinstance(error, _DamagedFile) else "is no artifact"
            raise InputError(f"`{folder}` {what}: {error.details}") from error
        return cls(folder, manifest, network)

    def read(self, placement: Placement | None = None) -> Saved:
        """Reads the arrays, and returns all that was saved.

        With a placement, arrays are on its mesh, filled up with copies, and each process reads its own members alone.

        If the artifact was saved with 64-bit types, and JAX has them off now, the result has no proof and the call
        warns with a `NarrowIntegerWarning`.

        **Raises:** `InputError` naming every array that is damaged or does not fit the network.
        """
        self._require_x64()
        state = self._skeleton()
        arrays = self._read_all() if placement is None else self._read_own(placement)
        trees: dict[str, Tree] = {
            kind: unflatten({name: arrays[name] for name in flatten(getattr(state, kind))}) for kind in KINDS
        }
        said = self.manifest
        proof = None if self._warn_of_narrow_integers() else said.proof
        return Saved(state._replace(**trees), self.network, said.origin, proof, said.lineage, said.sources)

    def _read_all(self) -> dict[str, jax.Array]:
        arrays: dict[str, jax.Array] = {}
        damaged: list[str] = []
        for name, array, digest in read_leaves(self.folder / WEIGHTS, read_header(self.folder / WEIGHTS)):
            record = self.manifest.leaves[name]
            if digest != record.sha256:
                damaged.append(_damage_text(name, record))
            elif not damaged:
                arrays[name] = as_leaf(array, record, f"{WEIGHTS}: {name}")
        if damaged:
            raise InputError(f"`{self.folder}` is damaged:{_list_problems(damaged)}{_AGAIN}")
        return arrays

    def _read_own(self, placement: Placement) -> dict[str, jax.Array]:
        """Reads the members that this process has on its devices, and puts all arrays in their places."""
        manifest, members = self.manifest, placement.own_members
        if manifest.member_hashes is None:
            raise InputError(
                f"`{self.folder}` was saved by an older version, without a hash for each member: load it without a "
                "mesh, and save it again, or put it there by `over`"
            )
        hashes, arrays, damaged = MemberHashes(members), dict[str, jax.Array](), list[str]()
        stacked = {name for name, record in manifest.leaves.items() if record.kind != "constants"}
        stored = read_header(self.folder / WEIGHTS)
        for name, values in read_members(self.folder / WEIGHTS, stored, stacked, members):
            record = manifest.leaves[name]
            if name not in stacked:
                if hashlib.sha256(values.tobytes()).hexdigest() != record.sha256:
                    damaged.append(_damage_text(name, record))
                arrays[name] = placement.put(as_leaf(values, record, f"{WEIGHTS}: {name}"), SHARED)
                continue
            for member, row in zip(members, values, strict=True):
                hashes.add(member, row.tobytes())
            arrays[name] = _place_members(values, record, f"{WEIGHTS}: {name}", placement)
        wrong = [member for member, found in hashes.found().items() if found != manifest.member_hashes[member]]
        damaged += [f"{WEIGHTS}: the bytes of member {member} are not those that were saved" for member in wrong]
        if damaged:
            raise InputError(f"`{self.folder}` is damaged:{_list_problems(damaged)}{_AGAIN}")
        return arrays

    def training_layers(self) -> tuple[str, ...]:
        """The layers in training mode: see `Structure.training_layers`."""
        return Structure.of(self._skeleton().graphdef).training_layers() if self.network.training else ()

    def verify(self) -> None:
        """Checks all files and arrays.

        **Raises:** `InputError` naming every file and array that differs from what was saved, or does not fit the
        network.
        """
        problems = list(self._damage())
        if problems:
            raise InputError(f"`{self.folder}` is damaged:{_list_problems(problems)}{_AGAIN}")
        self._skeleton()

    def _damage(self) -> Iterator[str]:
        stored = read_header(self.folder / WEIGHTS)
        whole = True
        for name, _, digest in read_leaves(self.folder / WEIGHTS, stored):
            record = self.manifest.leaves[name]
            if digest != record.sha256:
                whole = False
                yield _damage_text(name, record)
        for name in (WEIGHTS, NETWORK, SOURCE):
            with (self.folder / name).open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == self.manifest.files[name].sha256
            if not same and (name != WEIGHTS or whole):
                yield f"{name}: its SHA-256 is not that of the file that was saved"

    def _require_x64(self) -> None:
        wide = [name for name, leaf in self.manifest.leaves.items() if leaf.dtype in WIDE - NARROW.keys()]
        if wide:
            require_x64("float64", f"what `{self.folder}` holds of {', '.join(wide)}")

    def _warn_of_narrow_integers(self) -> bool:
        """Returns whether integers may have fewer bits here than when they were compared, and warns if they may."""
        if not self.manifest.x64 or is_x64_on():
            return False
        warnings.warn(
            f"`{self.folder}` was saved with JAX's 64-bit types on, and they are off: integers have 32 bits, and where "
            "they overflow, outputs are others. What was proven does not hold here, so that `proof` is None. To have "
            f"it, {ENABLE_X64}.",
            NarrowIntegerWarning,
            stacklevel=4,  # the caller of `Ensemble.load`
        )
        return True

    def _require_few_layers(self) -> None:
        """Refuses recurrent networks with more layers than listed arrays, before every layer is built for the check."""
        held = Counter(name.rsplit(".", 2)[0] for name in self.manifest.leaves)  # rnn.forward_0.kernel
        problems = [
            f"`num_layers` of {layer.path}: expected at most {held[layer.path]}, the number of its arrays; got {count}"
            for layer in self.network.layers
            if type(count := layer.options.get("num_layers", 0)) is int and count > held[layer.path]
        ]
        if problems:
            raise InputError(
                f"`{self.folder}` is no artifact: network and arrays do not fit:{_list_problems(problems)}"
            )

    def _skeleton(self) -> State:
        """Checks that the listed arrays are those that the network needs, and returns its state with shapes alone."""
        self._require_few_layers()
        try:
            with jax.enable_x64(True):  # for shapes alone: the dtypes come from the file
                state = skeleton(self.network)
        except JaxEnsembleError as error:
            raise InputError(f"`{self.folder}` is no artifact: {NETWORK}: {error.details}") from error
        except Exception as error:  # layers raise errors of any class for their options
            raise InputError(
                f"`{self.folder}` is no artifact: {NETWORK} cannot be built: {describe_error(error)}",
                details=str(error),
            ) from error
        problems = misfits(state, self.manifest.leaves, self.manifest.members)
        if problems:
            raise InputError(
                f"`{self.folder}` is no artifact: network and arrays do not fit:{_list_problems(problems)}"
            )
        return state


def _place_members(values: np.ndarray, record: LeafRecord, name: str, placement: Placement) -> jax.Array:
    """Returns an array of all members in its place, from the stored values of those of this process."""
    if record.dtype in KEYS:  # integers, until they are on the mesh
        return jax.random.wrap_key_data(placement.assemble(values), impl=KEYS[record.dtype].generator)
    own = dataclasses.replace(record, shape=(len(values), *record.shape[1:]))
    return placement.assemble(np.asarray(as_leaf(values, own, name)))


def misfits(state: State, leaves: Mapping[str, LeafRecord], members: int) -> list[str]:
    """The differences between the listed arrays and those that a network of this many members needs."""
    wanted = {}
    for kind in KINDS:
        axis = () if kind == "constants" else (members,)
        for name, leaf in flatten(getattr(state, kind)).items():
            wanted[name] = kind, is_key(leaf), (*axis, *leaf.shape)
    found = {name: (leaf.kind, leaf.dtype in KEYS, leaf.shape) for name, leaf in leaves.items()}
    return list_differences(wanted, found, lambda x: f"{x[0]}{' of random keys' if x[1] else ''} {list(x[2])}")


def _check_listing(folder: Path) -> None:
    """Checks that a directory holds exactly the files of an artifact, and that each is a regular file."""
    if not folder.is_dir():
        raise InputError("it is no directory" if folder.exists() else "there is no such directory")
    modes = {entry.name: entry.lstat().st_mode for entry in folder.iterdir()}
    problems = [f"{name} is missing" for name in sorted(FILES - modes.keys())]
    problems += [f"{name!r} does not belong there" for name in sorted(modes.keys() - FILES)]
    for name in sorted(FILES & modes.keys()):
        if stat.S_ISLNK(modes[name]):
            problems.append(f"{name} is a symbolic link, which may lead anywhere: copy the files themselves (cp -rL)")
        elif not stat.S_ISREG(modes[name]):
            problems.append(f"{name} is no file")
    if problems:
        unexpected = bool(modes.keys() - FILES)
        raise InputError("; ".join(problems) + (". Remove what does not belong there" if unexpected else ""))


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    problems = [
        f"{name} has {sizes[name]:,} bytes, not {record.size:,}: get it again from where it came from"
        for name, record in manifest.files.items()
        if sizes[name] != record.size
    ]
    if problems:
        raise _DamagedFile("; ".join(problems))


def _read_limited(folder: Path, name: str) -> bytes:
    limit = LIMITS[name]
    with (folder / name).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{name} has more than {limit:,} bytes")
    return content


def _read_text(folder: Path, name: str, record: FileRecord) -> str:
    content = _read_limited(folder, name)
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise _DamagedFile(f"{name}: its SHA-256 is not that of the file that was saved")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no text: {first_line(error)}") from error


def _damage_text(name: str, record: LeafRecord) -> str:
    return f"{WEIGHTS}: {name!r} ({record.dtype}{list(record.shape)}): its bytes are not those that were saved"


_AGAIN = "\nGet it again from where it came from, or save it again."


def _list_problems(problems: list[str]) -> str:
    return "".join(f"\n  {problem}" for problem in problems)
