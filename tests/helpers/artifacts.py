"""Saved ensembles for tests, ways to damage them, and a process without PyTorch."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TORCH = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torch_bridge"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


SAVED = ROOT / "tests" / "saved"
"""Ensembles that were ported and saved once, for tests without PyTorch; `tests.helpers.ported` has their networks."""

X = np.linspace(-1, 1, 27, dtype=np.float32).reshape(3, 1, 3, 3)
"""A minibatch for `SAVED / "net"`."""


def same_bits(a: Any, b: Any) -> bool:
    """Returns whether two trees of arrays are equal bit for bit, also their random keys."""
    plain = lambda leaf: jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.asarray(plain(one)).tobytes() == np.asarray(plain(other)).tobytes()
        for one, other in pairs
    )


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "manifest.json") -> None:
    """Changes a JSON file of an artifact as an expert would, with hashes and sizes that fit the files.

    The hashes of arrays stay as they are.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    content = manifest if name == "manifest.json" else json.loads((folder / name).read_text())
    change(content)
    if name != "manifest.json":
        (folder / name).write_text(json.dumps(content))
    resign(folder, manifest)


def resign(folder: Path, changed: dict[str, Any] | None = None) -> None:
    """Writes the manifest again, or a changed one, with the sizes and hashes that the files have now."""
    manifest: dict[str, Any] = changed or json.loads((folder / "manifest.json").read_text())
    for file in folder.iterdir():
        if file.name in manifest.get("files", {}) and manifest["files"][file.name]:
            content = file.read_bytes()
            manifest["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.pop("sha256", None)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run_without_torch(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in which importing PyTorch, or a package that needs it, raises."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-c", WITHOUT_TORCH + script, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
