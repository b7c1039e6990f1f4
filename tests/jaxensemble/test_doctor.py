"""The doctor: installations in order, and its reports about broken ones."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxensemble import doctor
from jaxensemble.doctor import CHECKS, Finding, Package
from jaxensemble.ensemble import Ensemble
from jaxensemble.files import caches
from tests.helpers.command_lines import GPU, assert_reported, found, only, python_m, run_doctor

KEYS = {"python", "jax", "flax", "numpy", "torch", "passed", "date"}
SETS = [
    {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "numpy": "2.4.6", "torch": "2.13.0"},
    {"python": "3.12.1", "jax": "0.11.2", "flax": "0.12.12", "numpy": "2.4.6", "torch": None},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXENSEMBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_sound_installation_is_in_order() -> None:
    result = run_doctor("jaxensemble")
    assert result.exit_code == 0, result.output
    assert "3 small networks agree, together and alone" in result.stdout
    assert re.search(r"^problems: 0, warnings: \d+$", result.stdout, re.MULTILINE)
    assert max(len(line) for line in result.stdout.splitlines() if "/" not in line) <= 80


def test_findings_as_json() -> None:
    content = json.loads(run_doctor("jaxensemble", "--json").stdout)
    assert content["works"] is True
    assert {"jax", "devices", "an ensemble"} <= {finding["subject"] for finding in content["findings"]}
    assert all(finding["level"] == "ok" or finding["advice"] for finding in content["findings"])


def test_the_table_of_tested_sets_is_shipped_and_sound() -> None:
    sets = doctor.read_tested_sets()
    assert sets and all(row.keys() == KEYS for row in sets)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and type(row["passed"]) is int for row in sets)


@pytest.mark.parametrize(
    ("name", "version", "level", "text", "advice"),
    [
        ("jax", "0.10.2", "ok", "0.10.2", ""),
        ("jax", "0.11.0", "ok", "0.11.0", ""),
        ("jax", "0.10.1", "problem", "0.10.1 is known not to work", "0.10.2 or later"),
        ("jax", "0.13.0", "warning", "not tried: 0.13.0", "tried: 0.10.2, 0.11.2"),
        ("python", "3.10.2", "problem", "3.10.2 is known not to work", "3.11 or later"),
        ("python", "3.14.0rc1", "warning", "not tried: 3.14.0rc1", "tried: 3.11.7, 3.12.1"),
        ("torch", "2.10.0+cpu", "problem", "2.10.0+cpu is known not to work", "2.11 or later"),
        ("torch", "2.12.0", "warning", "not tried: 2.12.0", "tried: 2.13.0"),
        ("torch", "2.13.1+cu130", "ok", "2.13.1+cu130", ""),
        ("flax", "0.13.0", "warning", "not tried: 0.13.0", "tried: 0.12.8, 0.12.12"),
        ("numpy", "1.0", "ok", "1.0", ""),
    ],
)
def test_versions_are_held_against_those_that_were_tried(
    name: str, version: str, level: str, text: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "read_tested_sets", lambda: SETS)
    monkeypatch.setattr(doctor, "installed_version", lambda _: "0.10.2")
    finding = doctor._compare_version(name, version)
    assert (finding.level, finding.subject, finding.found) == (level, name, text)
    assert advice in finding.advice and bool(finding.advice) == (level != "ok")


@pytest.mark.parametrize(("jax_version", "level"), [("0.10.2", "ok"), ("0.11.0", "problem"), ("0.12.0.1", "problem")])
def test_flax_must_fit_jax(jax_version: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", {"flax": "0.12.9", "jax": jax_version}.get)
    (finding,) = doctor.check_packages([Package("flax", "flax.nnx")])
    assert finding.level == level
    if level == "problem":
        assert finding.found == f"0.12.9 is known not to work with jax {jax_version}"
        assert finding.advice == "install 0.12.10 or later"


def test_a_version_that_was_not_tried_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_tested_sets", lambda: SETS[:1])
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.20.0")
    result = run_doctor("jaxensemble")
    assert result.exit_code == 0 and re.search(r"^warning  python +not tried: 3\.20\.0$", result.stdout, re.MULTILINE)
    assert re.search(r"-> it may work: run the tests.*tried:\s+3\.11\.7$", result.stdout, re.MULTILINE | re.DOTALL)


def test_packages_that_are_missing_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "halfway.py").write_text("raise RuntimeError('jaxlib is too old\\nsecond line')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.0" if name == "halfway" else None)
    packages = [Package("halfway", "halfway"), Package("absent", "no_such_module")]
    broken, absent = doctor.check_packages(packages)
    assert broken.level == absent.level == "problem"
    assert broken.found == "1.0 cannot be imported: RuntimeError: jaxlib is too old"
    assert (absent.found, absent.advice) == ("not installed", "pip install absent")
    (extra,) = doctor.check_extras([Package("absent", "", '"jaxensemble[plots]"', "pictures")])
    assert (extra.level, extra.found) == (
        "ok",
        'not installed; needed for pictures only: pip install "jaxensemble[plots]"',
    )


def test_a_broken_installation_gets_a_report(tmp_path: Path) -> None:
    assert "an ensemble" not in assert_reported("jaxensemble", "jax", tmp_path)
    content = json.loads(python_m("jaxensemble", "doctor", "--json", path=tmp_path).stdout)
    assert content["works"] is False


def test_a_cache_that_cannot_be_written_to(cache: Path) -> None:
    cache.write_text("a file")
    findings = only("caches", CHECKS)
    for subject, otherwise in (("compiled programs", r"keep_compiled\(\) fails"), ("measured plans", "measures again")):
        finding = findings[subject]
        assert finding.level == "warning" and finding.advice == "set JAXENSEMBLE_CACHE to a directory of your own"
        assert re.search(rf"{cache}/\w+ cannot be written to \(Not a directory\): .*{otherwise}", finding.found)
    assert run_doctor("jaxensemble").exit_code == 0
    assert cache.read_text() == "a file"


def test_a_cache_is_looked_at_and_left_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = only("caches", CHECKS)["measured plans"]
    assert (finding.level, finding.found) == ("ok", f"{cache}/plans, made when needed") and not cache.exists()
    (cache / "programs").mkdir(parents=True)
    (cache / "programs").chmod(0o777)
    finding = only("caches", CHECKS)["compiled programs"]
    assert finding.level == "warning" and "can be written to by other users: keep_compiled() fails" in finding.found
    assert finding.advice.endswith(f"or chmod 700 {cache}/programs")
    monkeypatch.delattr(caches.os, "getuid")  # Windows
    assert only("caches", CHECKS)["compiled programs"].level == "ok"


def test_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(caches, "cache_directory", homeless)
    finding = only("caches", CHECKS)["caches"]
    assert (finding.level, finding.found) == ("warning", "RuntimeError: Could not determine home directory.")
    assert finding.advice == "set JAXENSEMBLE_CACHE to a directory of your own"


def test_an_ensemble_that_computes_something_else_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Ensemble.__call__
    monkeypatch.setattr(Ensemble, "__call__", lambda self, x: call(self, x) + 0.01)
    result = run_doctor("jaxensemble")
    assert result.exit_code == 1 and "give other outputs together than alone" in " ".join(result.stdout.split())
    finding = only("an ensemble", CHECKS)["an ensemble"]
    assert finding.level == "problem" and finding.found.endswith("1.0e-02 apart")
    monkeypatch.setattr(Ensemble, "__call__", lambda self, x: call(self, x) * float("nan"))
    assert only("an ensemble", CHECKS)["an ensemble"].level == "problem"


def test_devices_that_are_not_there_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", none)
    finding = only("devices", CHECKS)["devices"]
    assert (finding.level, finding.found) == ("problem", "RuntimeError: Unable to initialize backend 'cuda'")
    assert finding.advice.startswith("unset JAX_PLATFORMS")


OLD = types.SimpleNamespace(platform="gpu", device_kind="Tesla V100", compute_capability="7.0")


def test_what_jax_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [GPU, GPU])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert only("devices", CHECKS)["devices"].found == "2 x gpu, NVIDIA H200 (JAX_PLATFORMS is cuda)"
    with jax.enable_x64(True):
        assert only("64-bit types", CHECKS)["64-bit types"].found == "on"
    assert only("64-bit types", CHECKS)["64-bit types"].found.startswith("off: float64 is refused")


@pytest.mark.parametrize(
    ("device", "precision", "text"),
    [
        (GPU, None, "default: float32 products are rounded to TF32 on NVIDIA H200"),
        (GPU, "high", "high: float32 products are rounded to TF32 on NVIDIA H200"),
        (GPU, "highest", "highest: float32 products stay float32 on NVIDIA H200"),
        (OLD, None, "default: float32 products stay float32 on Tesla V100"),
    ],
)
def test_what_products_are_rounded_to(
    device: Any, precision: str | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with jax.default_matmul_precision(precision):
        assert only("matmul precision", CHECKS)["matmul precision"].found == text


def test_findings_do_not_steer_the_terminal() -> None:
    assert str(Finding("ok", "jax", "1\x1b[2J")) == "ok       jax               1\\x1b[2J"


def test_checks_of_what_cannot_be_imported_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flax.nnx", None)
    findings = found(CHECKS)
    assert findings["flax"].level == "problem" and "an ensemble" not in findings and "devices" in findings


def test_what_needs_devices_is_left_out_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    findings = only("an ensemble", CHECKS)
    assert list(findings) == ["devices"]
    assert findings["devices"].found == "AssertionError: raise AssertionError"
