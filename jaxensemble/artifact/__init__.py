"""An ensemble as a directory: `weights.safetensors`, `network.json`, `source.py` and `manifest.json`."""

from jaxensemble.artifact.loading import Artifact, verify
from jaxensemble.artifact.manifest import Manifest

__all__ = ["Artifact", "Manifest", "verify"]
