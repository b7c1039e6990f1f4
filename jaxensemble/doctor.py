"""Checks of an installation: what is installed, whether it works, and what to do if it does not work.

A check is a function that yields findings; `CHECKS` lists the checks in the order of the report. A package is imported
by the check that needs it, and not before. An error in a check becomes a finding too: the report is for broken
installations.
"""

import dataclasses
import functools
import importlib
import importlib.resources
import json
import os
import platform
import re
import sys
import tempfile
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from jaxensemble.terminal import escape_controls, installed_version, show_result

Level = Literal["ok", "warning", "problem"]

WIDTH = 80
_INDENT = 27  # a level and a subject come before the text of a finding


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check: a problem will not work, a warning may surprise; both come with advice."""

    level: Level
    subject: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        wrap = functools.partial(
            textwrap.fill, width=WIDTH, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False
        )
        lines = [wrap(escape_controls(self.found), initial_indent=f"{self.level:8} {self.subject:17} ")]
        if self.advice:
            lines.append(wrap(escape_controls(f"-> {self.advice}"), initial_indent=" " * _INDENT))
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Check:
    """A function that yields findings, with its requirements, and the level and advice of an error in it.

    `needs` names modules, and the subjects of earlier checks that must have found no problem.
    """

    subject: str
    look: Callable[[], Iterable[Finding]]
    needs: tuple[str, ...] = ()
    advice: str = "fix the cause that the error names; if it is not in your system, please report the error"
    level: Level = "problem"


@dataclasses.dataclass(frozen=True)
class Package:
    """A distribution, the module whose import shows that it works, its name for pip, and its purpose.

    A package without a `purpose` is always required.
    """

    name: str
    module: str
    requirement: str = ""
    purpose: str = ""

    @property
    def install(self) -> str:
        """The command that installs the package."""
        return f"pip install {self.requirement or self.name}"


def diagnose(checks: Sequence[Check], as_json: bool) -> None:
    """Prints the findings of all checks, and ends the process with 1 if one is a problem."""
    findings = []
    for finding in run_checks(checks):
        findings.append(finding)
        if not as_json:
            typer.echo(str(finding))
    works = all(finding.level != "problem" for finding in findings)
    show_result(
        {"works": works, "findings": list(map(dataclasses.asdict, findings))} if as_json else _summary(findings),
        as_json,
    )
    if not works:
        raise typer.Exit(1)


def run_checks(checks: Iterable[Check]) -> Iterator[Finding]:
    """Yields the findings of all checks, except checks that need a broken part: this part has its own finding."""
    working = set()
    for check in checks:
        if not all(name in working or sys.modules.get(name) for name in check.needs):
            continue
        try:
            findings = list(check.look())
        except Exception as error:
            findings = [Finding(check.level, check.subject, _first_line(error), check.advice)]
        yield from findings
        if all(finding.level != "problem" for finding in findings):
            working.add(check.subject)


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.level for finding in findings)
    return f"\nproblems: {counts['problem']}, warnings: {counts['warning']}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line or ""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


# Versions


@functools.cache
def read_tested_sets() -> list[dict[str, Any]]:
    """Reads the sets of versions that all tests were run with."""
    return json.loads(importlib.resources.files("jaxensemble").joinpath("tested_with.json").read_text("utf-8"))


COMPARED = ("python", "jax", "flax", "torch")
"""The packages whose minor version is compared with the tested versions."""

LEAST = {"python": "3.11", "jax": "0.10.2", "torch": "2.11"}
"""The lowest version that works."""

FLAX_FOR_JAX = ("0.11", "0.12.10")
"""A version of JAX, and the lowest version of Flax that can be imported with it or a later JAX."""

PACKAGES = (
    Package("numpy", "numpy"),
    Package("jaxlib", "jaxlib"),
    Package("jax", "jax"),
    Package("flax", "flax.nnx"),
    Package("jaxtyping", "jaxtyping"),
    Package("optax", "optax"),
    Package("safetensors", "safetensors"),
)

EXTRAS = (
    Package("orbax-checkpoint", "orbax.checkpoint", '"jaxensemble[train]"', "checkpoints of fit"),
    Package("matplotlib", "matplotlib", '"jaxensemble[plots]"', "pictures"),
)


def check_python() -> Iterator[Finding]:
    """Checks the versions of this program and of Python."""
    yield Finding(
        "ok", "jaxensemble", f"{installed_version('jaxensemble') or 'not installed'}, {Path(__file__).parent}"
    )
    yield _compare_version("python", platform.python_version())


def check_packages(packages: Iterable[Package]) -> Iterator[Finding]:
    """Checks that every package can be imported, and compares its version with the tested versions."""
    for package in packages:
        found = installed_version(package.name)
        try:
            importlib.import_module(package.module)
        except Exception as error:
            missing = found is None and isinstance(error, ModuleNotFoundError)
            why = f"cannot be imported: {_first_line(error)}"
            yield Finding(
                "problem",
                package.name,
                "not installed" if missing else f"{found or 'unknown version'} {why}",
                package.install if missing else f"install it again: pip install --force-reinstall {package.name}",
            )
        else:
            yield _compare_version(package.name, found or "unknown")


def check_extras(packages: Iterable[Package]) -> Iterator[Finding]:
    """Lists the versions of packages that are needed for one purpose only."""
    for package in packages:
        found = installed_version(package.name)
        missing = f"not installed; needed for {package.purpose} only: {package.install}"
        yield Finding("ok", package.name, found or missing)


def _compare_version(name: str, found: str) -> Finding:
    least = _least_version(name)
    if least and _version_numbers(found) < _version_numbers(least):
        reason = f" with jax {installed_version('jax')}" if name == "flax" else ""
        return Finding("problem", name, f"{found} is known not to work{reason}", f"install {least} or later")
    tried = (
        sorted({row[name] for row in read_tested_sets() if row[name]}, key=_version_numbers)
        if name in COMPARED
        else [found]
    )
    if _version_numbers(found)[:2] in {_version_numbers(other)[:2] for other in tried}:
        return Finding("ok", name, found)
    advice = f"it may work: run the tests to see, or take one that was tried: {', '.join(tried)}"
    return Finding("warning", name, f"not tried: {found}", advice)


def _least_version(name: str) -> str | None:
    jax, flax = FLAX_FOR_JAX
    if name == "flax" and _version_numbers(installed_version("jax") or "") >= _version_numbers(jax):
        return flax
    return LEAST.get(name)


def _version_numbers(text: str) -> tuple[int, ...]:
    """The first three numbers of a version: no others are compared.

    >>> _version_numbers("2.13.0+cpu"), _version_numbers("0.12.0.1")
    ((2, 13, 0), (0, 12, 0))
    """
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


# Devices and settings of JAX


def check_devices() -> Iterator[Finding]:
    """Lists the devices that JAX uses by default."""
    import jax

    counts = Counter(
        f"{d.platform}, {d.device_kind}" if d.device_kind != d.platform else d.platform for d in jax.devices()
    )
    asked = os.environ.get("JAX_PLATFORMS")
    names = "; ".join(f"{count} x {name}" for name, count in counts.items())
    yield Finding("ok", "devices", names + (f" (JAX_PLATFORMS is {asked})" if asked else ""))


def check_x64() -> Iterator[Finding]:
    """Reports whether JAX has 64-bit types on."""
    from jaxensemble.arrays import is_x64_on

    off = "off: float64 is refused, and integers have 32 bits (jax_enable_x64, --x64)"
    yield Finding("ok", "64-bit types", "on" if is_x64_on() else off)


def check_precision() -> Iterator[Finding]:
    """Reports the precision of float32 products."""
    import jax

    said = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    effect = "float32 products are rounded to TF32" if rounds_to_tf32() else "float32 products stay float32"
    yield Finding("ok", "matmul precision", f"{said or 'default'}: {effect} on {jax.devices()[0].device_kind}")


_FULL = ("highest", "float32", "F32_F32_F32")


def rounds_to_tf32() -> bool:
    """Returns whether JAX rounds float32 products to TF32, which is its default on GPUs with TF32."""
    import jax

    capability = getattr(jax.devices()[0], "compute_capability", "0")  # of NVIDIA GPUs; TF32 needs 8.0
    said = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return _version_numbers(str(capability)) >= (8,) and said not in _FULL


# Caches


def check_caches() -> Iterator[Finding]:
    """Checks that the directories of compiled programs and of measured plans can be written to."""
    from jaxensemble.files.caches import cache_directory, open_places

    directory = cache_directory().absolute()
    advice = "set JAXENSEMBLE_CACHE to a directory of your own"
    for subject, folder, otherwise in (
        ("compiled programs", directory / "programs", "keep_compiled() fails"),
        ("measured plans", directory / "plans", "every process measures again"),
    ):
        if obstacle := _obstacle(folder):
            yield Finding("warning", subject, f"{folder} cannot be written to ({obstacle}): {otherwise}", advice)
        elif subject == "compiled programs" and folder.is_dir() and (places := list(open_places(folder))):
            others = f"{', '.join(map(str, places))} can be written to by other users: {otherwise}"
            yield Finding("warning", subject, others, f"{advice}, or chmod 700 {folder}")
        else:
            yield Finding("ok", subject, f"{folder}{'' if folder.is_dir() else ', made when needed'}")


def _obstacle(folder: Path) -> str:
    """The error of writing a file to a directory, or to the parent it would be made in; empty if writing works."""
    try:
        place = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return error.strerror or str(error)


# A small ensemble


def check_ensemble() -> Iterator[Finding]:
    """Checks that an ensemble of three small Flax modules gives the outputs of each module alone."""
    import jax
    import numpy as np
    from flax import nnx

    from jaxensemble.ensemble import Ensemble

    modules = [
        nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
        for rngs in map(nnx.Rngs, range(3))
    ]
    x = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)
    with jax.default_matmul_precision("highest"):
        together = np.asarray(Ensemble.from_modules(modules)(x))
        alone = np.stack([np.asarray(module(x)) for module in modules])
    apart = float(np.abs(together - alone).max())
    if apart <= CLOSE:
        yield Finding(
            "ok",
            "an ensemble",
            f"3 small networks agree, together and alone; largest difference {apart:.1g}",
        )
    else:
        found = f"3 small networks give other outputs together than alone: {apart:.1e} apart"
        yield Finding("problem", "an ensemble", found, "do not use this installation, and please report it")


CLOSE = 1e-5
"""The largest allowed difference of float32 outputs of about 1."""

INSTALLED = (
    Check("python", check_python),
    Check("packages", functools.partial(check_packages, PACKAGES)),
)

RUNNING = (
    Check("devices", check_devices, ("jax",), "unset JAX_PLATFORMS, or let it name what is there: cpu, or cuda,cpu"),
    Check("64-bit types", check_x64, ("jax", "flax.nnx")),
    Check("matmul precision", check_precision, ("jax", "devices")),
    Check("caches", check_caches, ("jax", "flax.nnx"), "set JAXENSEMBLE_CACHE to a directory of your own", "warning"),
    Check("an ensemble", check_ensemble, ("devices", "flax.nnx", "numpy", "optax", "safetensors")),
)

CHECKS = (*INSTALLED, Check("extras", functools.partial(check_extras, EXTRAS)), *RUNNING)
