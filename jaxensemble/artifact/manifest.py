"""`Manifest`: the description that an artifact holds of itself, in `manifest.json`."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxensemble.dtypes import CODES, KEYS, PAIRS
from jaxensemble.errors import InputError
from jaxensemble.files.schema import from_plain, parse_json, to_plain
from jaxensemble.modules.state import KINDS
from jaxensemble.network.proof import Lineage, Proof, check_proof
from jaxensemble.network.sources import Source
from jaxensemble.network.weight_map import Origin, check_origin

FORMAT = 1
"""The version of the format. Other versions are refused."""

MANIFEST, WEIGHTS, NETWORK, SOURCE = "manifest.json", "weights.safetensors", "network.json", "source.py"
FILES = frozenset({MANIFEST, WEIGHTS, NETWORK, SOURCE})
"""All files of an artifact."""

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the hash of a file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One array: its kind (`params`, `buffers`, `constants`, `rngs`), dtype and shape, and the hash of its bytes.

    `shape` begins with the members, except for a constant. Random keys have a dtype of their own, such as `key<fry>`;
    their words are along a further axis of the stored array, and so are the two parts of complex128.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the array in `weights.safetensors`."""
        if self.dtype in KEYS:
            return "uint32", (*self.shape, KEYS[self.dtype].words)
        if self.dtype in PAIRS:
            return PAIRS[self.dtype], (*self.shape, 2)
        return self.dtype, self.shape


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    - `version`: the version of the format. `versions`: the versions of the libraries that wrote the artifact.
    - `members`: M. `leaves`: every array, by its path in the network. `files`: all files except the manifest.
    - `x64`: whether an array has a 64-bit type, or JAX had 64-bit types on when the ensemble was compared with PyTorch
      (or saved, if it was never compared).
    - `proof`: the comparison with PyTorch that the ensemble passed, or None. `verified`: whether there is a proof.
    - `lineage`: the proof of the ensemble that this one was made from, for example by training, or None.
    - `origin`: the map of PyTorch's keys, or None for a network that did not come from PyTorch.
    - `sources`: the checkpoint file of each member, with its hash and the part that was read; None where the weights
      did not come from files, or were changed since.
    - `member_hashes`: for each member the hash of its bytes in all arrays, in the order of the file. A host that reads
      its own members compares these. None in artifacts of older versions.
    """

    version: int
    versions: Mapping[str, str]
    members: int
    x64: bool
    verified: bool
    files: Mapping[str, FileRecord]
    leaves: Mapping[str, LeafRecord]
    proof: Proof | None
    lineage: Lineage | None
    origin: Origin | None
    sources: tuple[Source, ...] | None
    member_hashes: tuple[str, ...] | None

    def to_json(self) -> str:
        """The text of `manifest.json`. Its last entry is the hash of all other entries, sorted and without spaces."""
        content = to_plain(self)
        return json.dumps(content | {"sha256": _digest(content)}, indent=1, allow_nan=False)


def manifest_from_json(text: bytes) -> Manifest:
    """Reads the manifest that `to_json` wrote, and checks all of it.

    **Raises:** `InputError` listing all that is wrong.
    """
    content = parse_json(text, MANIFEST)
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT:
        raise InputError(
            f"{MANIFEST}: expected format version {FORMAT}, got {version!r}: this is no artifact, or another version "
            "of jaxensemble wrote it"
        )
    digest = content.pop("sha256", None)
    older = {"lineage": None, "sources": None, "member_hashes": None}  # older artifacts lack these entries
    manifest = from_plain(Manifest, older | content, MANIFEST)
    if digest != _digest(content):
        raise InputError(f"{MANIFEST} is damaged: its entries are not those that were written")
    if manifest.proof is not None:
        check_proof(manifest.proof, f"{MANIFEST}: proof")
    if manifest.lineage is not None:
        check_proof(manifest.lineage.proof, f"{MANIFEST}: lineage")
    if manifest.origin is not None:
        check_origin(manifest.origin, f"{MANIFEST}: origin")
    problems = list(_problems(manifest))
    if problems:
        raise InputError(f"{MANIFEST} does not hold together:\n  " + "\n  ".join(problems))
    return manifest


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _problems(manifest: Manifest) -> Iterator[str]:
    named = FILES - {MANIFEST}
    yield from (f"{name!r} is no file of an artifact" for name in sorted(manifest.files.keys() - named))
    yield from (f"{name} is not listed" for name in sorted(named - manifest.files.keys()))
    sources = [(source.file, source) for source in manifest.sources or ()]
    for name, record in (*manifest.files.items(), *manifest.leaves.items(), *sources):
        if not _SHA256.fullmatch(record.sha256):
            yield f"{name!r}: {record.sha256[:80]!r} is no hash"
    if manifest.verified != (manifest.proof is not None):
        yield f"`verified` is {manifest.verified}, with {'a' if manifest.proof else 'no'} proof"
    if manifest.proof is not None and manifest.proof.x64 and not manifest.x64:
        yield "`x64` is False, with a proof that was made with 64-bit types"
    if manifest.sources is not None and len(manifest.sources) != manifest.members:
        yield f"expected one of `sources` for each of {manifest.members} members, got {len(manifest.sources)}"
    hashes = manifest.member_hashes
    if hashes is not None and (len(hashes) != manifest.members or not all(map(_SHA256.fullmatch, hashes))):
        yield f"`member_hashes` must be a hash for each of {manifest.members} members"
    if manifest.members < 1:
        yield f"an ensemble has at least one member; got {manifest.members}"
    for name, leaf in manifest.leaves.items():
        yield from (f"{name!r}: {problem}" for problem in _leaf_problems(leaf, manifest.members))
    yield from _origin_problems(manifest)


def _leaf_problems(leaf: LeafRecord, members: int) -> Iterator[str]:
    if leaf.kind not in KINDS:
        yield f"expected one of {', '.join(KINDS)}, got {leaf.kind!r}"
    if leaf.dtype not in KEYS | CODES | PAIRS:
        yield f"{leaf.dtype!r} is no dtype of an artifact"
    if (leaf.dtype in KEYS) > (leaf.kind == "rngs"):
        yield f"{leaf.kind} cannot be random keys"
    if min(leaf.shape, default=0) < 0 or math.prod(leaf.shape) >= 2**60:
        yield f"{list(leaf.shape)} is no shape"
    if leaf.kind != "constants" and leaf.shape[:1] != (members,):
        yield f"shape {list(leaf.shape)} does not begin with the {members} members"


def _origin_problems(manifest: Manifest) -> Iterator[str]:
    for entry in manifest.origin.weights.entries if manifest.origin else ():
        leaf = manifest.leaves.get(entry.path)
        if leaf is None or leaf.kind not in ("params", "buffers"):
            yield f"PyTorch's {entry.keys[0]!r} is said to be at {entry.path!r}, where there is no parameter or buffer"
        elif leaf.shape[1:] != entry.rearrangement.shape:
            yield (
                f"{entry.path!r} has members of shape {list(leaf.shape[1:])}, PyTorch's {entry.keys[0]!r} is stored "
                f"as {list(entry.rearrangement.shape)}"
            )
