"""Packages, devices and versions of a machine, for tests and benchmarks. `python -m benchmarks.speed.machine [folder]`.

Needs only Python, so that it can say what is missing. A part that fails gives its error instead of a result. The folder
gets `machine-<device>.json` and `target_config-<device>.txtpb`: with this description of a GPU, XLA compiles for it on
machines without one (`jax.experimental.topologies.get_topology_desc`).
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDED = ("jax", "jaxlib", "flax", "jaxtyping", "numpy", "optax", "safetensors", "typer", "rich", "torch")
"""Distributions without which nothing runs."""

OPTIONAL = {
    "pytest": "no tests",
    "pytest-timeout": "no time limit for a test",
    "pytest-xdist": "one process runs all tests",
    "hypothesis": "tests that draw examples are left out",
    "scikit-learn": "tests that compare with it are left out",
    "expecttest": "PyTorch's module database is not tested",
    "cloudpickle": "models reach timing's processes by pickle",
    "matplotlib": "no pictures",
    "torchvision": "only our own networks are timed",
    "jax-cuda13-plugin": "JAX has no CUDA 13",
    "triton": "torch.compile has no kernels for GPUs",
}
"""The meaning of a missing distribution."""

SUMMARY = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def packages() -> dict[str, str]:
    """Returns the version of each distribution, or what its absence means."""
    found = {name: _version(name) or "MISSING: nothing runs" for name in NEEDED}
    return found | {name: _version(name) or f"missing: {meaning}" for name, meaning in OPTIONAL.items()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def host() -> dict[str, Any]:
    """Python and the processor; the variables that frameworks read."""
    kept = ("CUDA_", "JAX_", "XLA_", "TORCH", "NVIDIA_", "OMP_", "PYTHONPATH", "LD_LIBRARY_PATH")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": f"{platform.python_version()} {sys.executable}",
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(kept)},
    }


def nvidia_smi() -> str:
    """Name, driver, memory, clocks and power limit of the GPUs."""
    command = ["nvidia-smi", f"--query-gpu={SUMMARY}", "--format=csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout + done.stderr).strip()


def in_torch() -> dict[str, Any]:
    """Returns the devices and settings that PyTorch sees."""
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["device"] = str(torch.cuda.get_device_properties(0))
        found["capability"] = torch.cuda.get_device_capability()
        found["cudnn"] = torch.backends.cudnn.version()
        found["free, total"] = torch.cuda.mem_get_info()
    return found


def in_jax() -> dict[str, Any]:
    """Returns the devices and settings that JAX sees."""
    import jax

    device = jax.devices()[0]
    return {
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "runtime": device.client.platform_version,
        "memory": device.memory_stats(),
        "product": float(jax.jit(lambda x: x @ x)(jax.numpy.ones((256, 256)))[0, 0]),
    }


def target_config() -> str:
    """The GPU as XLA describes it, in protobuf's text format; where JAX has no such text, all it knows, in bytes."""
    import jax
    from jaxlib import xla_client

    topology = xla_client.get_topology_for_devices(jax.devices())
    text = getattr(topology, "target_config", None) or repr(topology.serialize())
    return text.decode() if isinstance(text, bytes) else text


PARTS: dict[str, Callable[[], Any]] = {
    "packages": packages,
    "host": host,
    "nvidia-smi": nvidia_smi,
    "torch": in_torch,
    "jax": in_jax,
    "target_config": target_config,
}


def main(folder: Path) -> None:
    """Writes after every part, so that results stay if a later part fails."""
    device = "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        try:
            found[name] = part()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:1000]
        print(f"{name}: {json.dumps(found[name], indent=2, default=str)}", flush=True)
        (folder / f"machine-{device}.json").write_text(json.dumps(found, indent=2, default=str) + "\n")
    (folder / f"target_config-{device}.txtpb").write_text(found.pop("target_config"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results"))
