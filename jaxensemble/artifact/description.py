"""Descriptions of an artifact, for people and for programs."""

import dataclasses
import math
from typing import Any

from jaxensemble.artifact.loading import Artifact
from jaxensemble.artifact.manifest import Manifest
from jaxensemble.files.schema import to_plain
from jaxensemble.network.inputs import shape_text
from jaxensemble.network.proof import Proof
from jaxensemble.network.sources import describe_sources

_PLAIN = (bool, int, str, type(None))


def describe(artifact: Artifact) -> dict[str, Any]:
    """Describes an artifact, without reading its arrays, as plain data."""
    manifest, network = artifact.manifest, artifact.network
    return {
        "network": network.name,
        "members": manifest.members,
        "parameters_each": _count_parameters(manifest),
        "bytes": sum(record.size for record in manifest.files.values()),
        "inputs": {name: list(shape) for name, shape in network.input_shapes.items()},
        "sizes": {name: dataclasses.asdict(sizes) for name, sizes in network.sizes.items()},
        "fixed": {place: value if isinstance(value, _PLAIN) else repr(value) for place, value in network.fixed.items()},
        "training": list(artifact.training_layers()),
        "verified": manifest.verified,
        "weights_checked": False,
        "proof": describe_proof(manifest),
        "trained_from_verified": manifest.lineage is not None and manifest.lineage.trained,
        "versions": dict(manifest.versions),
        "from_pytorch": manifest.origin.name if manifest.origin else None,
        "sources": to_plain(manifest.sources),
        "arrays": {
            name: {"kind": leaf.kind, "dtype": leaf.dtype, "shape": list(leaf.shape)}
            for name, leaf in manifest.leaves.items()
        },
    }


def describe_in_text(artifact: Artifact) -> str:
    """Describes an artifact, without reading its arrays, as text for people."""
    manifest, network = artifact.manifest, artifact.network
    size = sum(record.size for record in manifest.files.values())
    fixed = ", ".join(f"{place}={value!r}" for place, value in network.fixed.items())
    training = ", ".join(artifact.training_layers())
    mode = f"in training mode: {training}{'; what was verified is evaluation mode' if manifest.verified else ''}"
    wide = max((len(name) for name in manifest.leaves), default=0)
    return "\n".join(
        [
            f"{manifest.members} x {network.name}, {_count_parameters(manifest):,} parameters each, {size:,} bytes",
            f"inputs: {', '.join(f'{name} {shape_text(shape)}' for name, shape in network.input_shapes.items())}",
            *(f"{name}: {sizes}" for name, sizes in network.sizes.items()),
            *([f"fixed: {fixed}"] if fixed else []),
            *([mode] if training else []),
            describe_proof(manifest),
            f"the bytes of the weights were not read here: `jaxensemble verify {artifact.folder}` compares them with "
            "those that were saved",
            f"written by {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
            *(f"weights of {line}" for line in describe_sources(manifest.sources)),
            *(f"  {name:{wide}}  {x.kind:9}  {x.dtype}{list(x.shape)}" for name, x in manifest.leaves.items()),
        ]
    )


def describe_proof(manifest: Manifest) -> str:
    """Says whether and when an artifact was compared with PyTorch, and how it was made from a verified port."""
    proof, lineage = manifest.proof, manifest.lineage
    made = lineage and ("trained" if lineage.trained else "made") + " from a verified port"
    if proof is not None:
        return f"verified {_describe_verification(proof)}{f'; {made} of {lineage.proof.date}' if lineage else ''}"
    if lineage is None:
        return "NOT verified: this ensemble was never compared with PyTorch, or was changed since"
    return f"{made}, NOT verified since: the port was verified {_describe_verification(lineage.proof)}"


def _describe_verification(proof: Proof) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in proof.versions.items())
    return f"against PyTorch on {proof.date}, {len(proof.comparisons)} comparisons passed ({versions})"


def _count_parameters(manifest: Manifest) -> int:
    """The number of parameters of a member."""
    return sum(math.prod(leaf.shape[1:]) for leaf in manifest.leaves.values() if leaf.kind == "params")
