"""The doctor of `torch-bridge`: both frameworks on one device, rounding alike, and a network that is ported."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import pytest
import torch

from jaxensemble.network.weight_map import Rearrangement
from tests.helpers.command_lines import GPU, assert_reported, only, run_doctor
from torch_bridge import doctor
from torch_bridge.doctor import CHECKS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXENSEMBLE_CACHE", str(tmp_path / "cache"))


def test_a_sound_installation_is_in_order() -> None:
    result = run_doctor("torch-bridge")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert re.search(r"3 small networks were ported and agree with PyTorch: \d comparisons passed", words)
    assert max(len(line) for line in result.stdout.splitlines() if "/" not in line) <= 80


@pytest.mark.parametrize("broken", ["jax", "torch"])
def test_a_broken_installation_gets_a_report(broken: str, tmp_path: Path) -> None:
    words = assert_reported("torch_bridge", broken, tmp_path)
    assert "porting" not in words and ("an ensemble" in words) == (broken == "torch")


@pytest.mark.parametrize(
    ("theirs", "ours", "plugin", "platforms", "level", "text", "advice"),
    [
        (None, None, False, None, "ok", "PyTorch and JAX both run on the CPU", ""),
        ("NVIDIA H200", GPU, True, None, "ok", "PyTorch and JAX both run on NVIDIA H200", ""),
        ("NVIDIA H200", None, False, "cpu", "warning", "no: PyTorch runs on NVIDIA H200, JAX on the CPU", "[cuda13]"),
        ("NVIDIA H200", None, True, "cpu", "warning", "JAX on the CPU", "JAX_PLATFORMS is cpu: unset it"),
        ("NVIDIA H200", None, True, None, "warning", "JAX on the CPU", "finds no GPU"),
        (None, GPU, True, None, "warning", "no: PyTorch runs on the CPU, JAX on NVIDIA H200", "PyTorch for CUDA"),
        ("Tesla T4", GPU, True, None, "warning", "runs on Tesla T4, JAX on NVIDIA H200", "CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_both_frameworks_must_see_the_same_gpu(
    theirs: str | None, ours: Any, plugin: bool, platforms: str | None, level: str, text: str,
    advice: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: theirs is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: theirs)
    monkeypatch.setattr(doctor, "_gpu", lambda: ours)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.10.2" if plugin else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    finding = only("same device", CHECKS)["same device"]
    assert finding.level == level and text in finding.found
    assert advice in finding.advice and bool(finding.advice) == bool(advice)


def test_both_frameworks_should_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    look = functools.partial(only, "TF32", CHECKS)
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_gpu", lambda: None)
        assert look()["TF32"].level == "ok" and look()["TF32"].found.endswith("CPUs have none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(jax, "devices", lambda: [GPU])
    with jax.default_matmul_precision(None):
        finding = look()["TF32"]
        assert finding.level == "warning" and "JAX_DEFAULT_MATMUL_PRECISION=highest" in finding.advice
        assert finding.found == "not the same: PyTorch's products no, its convolutions yes, JAX's yes"
    with jax.default_matmul_precision("highest"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert look()["TF32"].level == "ok"


def test_a_port_that_does_not_agree_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Rearrangement.apply
    monkeypatch.setattr(Rearrangement, "apply", lambda self, array: apply(self, array) + 1)
    finding = only("porting", CHECKS)["porting"]
    assert finding.level == "problem" and finding.found.startswith("ParityError: ") and finding.advice
