"""Helpers of the tests of both command lines and of their doctors."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import typer
from typer.testing import CliRunner, Result

from jaxensemble.doctor import Check, Finding, run_checks
from tests.helpers.artifacts import ROOT

PROGRAMS = {"jaxensemble": "jaxensemble", "torch-bridge": "torch_bridge"}
GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")


def app(program: str) -> typer.Typer:
    return importlib.import_module(f"{PROGRAMS[program]}.cli").app


def run_doctor(program: str, *options: str) -> Result:
    return CliRunner().invoke(app(program), ["doctor", *options])


def found(checks: tuple[Check, ...]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in run_checks(checks)}


def only(subject: str, checks: tuple[Check, ...]) -> dict[str, Finding]:
    needs = {name for check in checks if check.subject == subject for name in check.needs}
    return found(tuple(check for check in checks if check.subject in {subject, *needs}))


def python_m(package: str, *arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu", "COLUMNS": "80"}
    command = [sys.executable, "-m", package, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def assert_reported(package: str, broken: str, folder: Path) -> str:
    """Returns the report's text about an installation in which one module cannot be imported."""
    (folder / f"{broken}.py").write_text("raise RuntimeError('built for another machine')")
    done = python_m(package, "doctor", path=folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    words = " ".join(done.stdout.split())
    assert "cannot be imported: RuntimeError: built for another machine" in words
    assert f"-> install it again: pip install --force-reinstall {broken}" in words
    assert f"problem {broken} " in words
    return words
