"""What the tests of saved ensembles share: networks to save, ways to damage them, and a process without PyTorch."""

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
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_TORCH = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torch_bridge"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


class Net(nn.Module):
    """Something of everything: running statistics, dropout, tied weights, buffers saved and not, a folded constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.fc, self.tied = nn.Linear(12, 4, bias=False), nn.Linear(12, 4)
        self.tied.weight = self.fc.weight
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]))
        self.register_buffer("shift", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.bn(self.conv(x)).relu().flatten(1))
        return (self.fc(x) + self.tied(x) * torch.linspace(0, 1, 4) + self.shift + self.mask).softmax(-1)


X = torch.linspace(-1, 1, 27).reshape(3, 1, 3, 3)


def ported(members: int = 3, **options: Any) -> Ensemble:
    models = [Net().eval() for _ in range(members)]
    for model in models[1:]:  # what is not saved has to be alike
        model.get_buffer("shift").copy_(models[0].get_buffer("shift"))
    return torch_bridge.to_ensemble(models, (X,), **options)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are alike down to the bits, random keys included."""
    plain = lambda leaf: jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.asarray(plain(one)).tobytes() == np.asarray(plain(other)).tobytes()
        for one, other in pairs
    )


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "manifest.json") -> None:
    """Changes a JSON file of an artifact as someone would who knows the format: hashes and sizes are those they find.

    The hashes of arrays stay as they are.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    content = manifest if name == "manifest.json" else json.loads((folder / name).read_text())
    change(content)
    if name != "manifest.json":
        (folder / name).write_text(json.dumps(content))
    resign(folder, manifest)


def resign(folder: Path, changed: dict[str, Any] | None = None) -> None:
    """Writes the manifest anew, or a changed one, with the sizes and hashes that the files have now."""
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
    """A fresh interpreter in which importing PyTorch, or what needs it, raises."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-c", WITHOUT_TORCH + script, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
