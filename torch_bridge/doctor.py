"""Checks of an installation for porting: installed packages, whether they work, and advice if they do not."""

import functools
import os
from collections.abc import Iterator
from typing import Any

from jaxensemble import doctor
from jaxensemble.doctor import Check, Finding, Package
from jaxensemble.terminal import installed_version

PACKAGES = (Package("torch", "torch", '"jaxensemble[torch]"'),)

EXTRAS = (Package("cloudpickle", "cloudpickle", '"jaxensemble[torch]"', "timing"),)

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


def same_device() -> Iterator[Finding]:
    """Finds out whether both frameworks run on the same device."""
    import torch

    theirs = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    gpu = _gpu()
    ours = gpu.device_kind if gpu else None
    if theirs == ours:
        yield Finding("ok", "same device", f"PyTorch and JAX both run on {theirs or 'the CPU'}")
    else:
        found = f"no: PyTorch runs on {theirs or 'the CPU'}, JAX on {ours or 'the CPU'}"
        yield Finding("warning", "same device", found, _mend(theirs, ours))


def _mend(theirs: str | None, ours: str | None) -> str:
    if theirs and ours:
        return "let both see the same GPU first, by CUDA_VISIBLE_DEVICES"
    if ours:
        return "install PyTorch for CUDA, or compare and time on the CPU: JAX_PLATFORMS=cpu"
    if not any(map(installed_version, PLUGINS)):
        return 'install JAX for CUDA: pip install "jaxensemble[cuda13]"'
    if asked := os.environ.get("JAX_PLATFORMS"):
        return f"JAX_PLATFORMS is {asked}: unset it, or let it be cuda,cpu"
    return "JAX's plugin for CUDA is installed and finds no GPU: see what it says on standard error"


def _gpu() -> Any:
    import jax

    return next((device for device in jax.devices() if device.platform in ("gpu", "cuda")), None)


def tf32() -> Iterator[Finding]:
    """Finds out whether both frameworks round float32 products alike."""
    import torch

    cudnn: Any = torch.backends.cudnn
    ways = {
        "PyTorch's products": _torch_rounds(torch.backends.cuda.matmul),
        "its convolutions": _torch_rounds(cudnn.conv),
        "JAX's": doctor.rounds_to_tf32(),
    }
    said = ", ".join(f"{name} {'yes' if rounds else 'no'}" for name, rounds in ways.items())
    if _gpu() is None or not torch.cuda.is_available():
        yield Finding("ok", "TF32", f"{said}; CPUs have none")
    elif len(set(ways.values())) == 1:
        yield Finding("ok", "TF32", said)
    else:
        yield Finding("warning", "TF32", f"not the same: {said}", ADVICE)


ADVICE = (
    "check compares without; for float32 in your own code, JAX_DEFAULT_MATMUL_PRECISION=highest and "
    "torch.backends.cudnn.allow_tf32 = False"
)


def _torch_rounds(backend: Any) -> bool:
    """Returns whether a backend rounds to TF32, by its own setting or by PyTorch's setting for all backends."""
    import torch

    everywhere: Any = torch.backends
    said = backend.fp32_precision  # `allow_tf32` raises if both kinds of settings were used
    return (everywhere.fp32_precision if said == "none" else said) == "tf32"


def port() -> Iterator[Finding]:
    """Ports three small networks, which must pass the proof."""
    import torch
    from torch import nn

    from torch_bridge.porting.port import to_ensemble

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(3)]
        proof = to_ensemble(models, (torch.linspace(-1, 1, 20).reshape(5, 4),)).proof
    count = len(proof.comparisons) if proof else 0
    yield Finding("ok", "porting", f"3 small networks were ported and agree with PyTorch: {count} comparisons passed")


CHECKS = (
    *doctor.INSTALLED,
    Check("torch", functools.partial(doctor.check_packages, PACKAGES)),
    Check("extras", functools.partial(doctor.check_extras, (*doctor.EXTRAS, *EXTRAS))),
    *doctor.RUNNING,
    Check("same device", same_device, ("devices", "torch")),
    Check("TF32", tf32, ("devices", "torch")),
    Check("porting", port, ("devices", "flax.nnx", "numpy", "optax", "safetensors", "torch")),
)
