"""Documents: Python blocks run as pasted, commands exit with 0, and named files, targets and figures exist."""

import doctest
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxensemble.cli
import torch_bridge.cli
from benchmarks.speed import figures, scale
from benchmarks.trust import page as trust
from benchmarks.zoo import coverage
from tests.helpers import tested

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(language: str) -> list[tuple[str, str]]:
    """Returns every fenced block of a language, with a name for its test."""
    found = []
    for document in DOCUMENTS:
        for k, code in enumerate(re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)):
            found.append((f"{document.name}-{k}", code))
    return found


PYTHON = blocks("python")
APPS = {"torch-bridge": torch_bridge.cli.app, "jaxensemble": jaxensemble.cli.app}
COMMANDS = [(name, line) for name, code in blocks("sh") for line in code.splitlines() if line.partition(" ")[0] in APPS]


@pytest.mark.parametrize("document", list(dict.fromkeys(name.rpartition("-")[0] for name, _ in PYTHON)))
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the blocks in order, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__document__"}
    for name, code in PYTHON:
        if name.rpartition("-")[0] == document:
            exec(compile(code, f"<{name}>", "exec"), namespace)


@pytest.mark.parametrize(("name", "code"), PYTHON + COMMANDS)
def test_what_is_pasted_twice_replaces_what_the_first_time_left(name: str, code: str) -> None:
    assert not re.search(r"""\.mkdir\(\)|\bsave\(["'][^"'.]*["']\)|--out \w+$""", code), "exist_ok, force=True, --force"


@pytest.mark.parametrize("document", list(dict.fromkeys(name.rpartition("-")[0] for name, _ in COMMANDS)))
def test_commands_succeed(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the commands in order: later ones read what earlier ones saved."""
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.zeros((2, 1, 28, 28), np.float32))
    for name, line in COMMANDS:
        if name.rpartition("-")[0] == document:
            program, *arguments = shlex.split(line, comments=True)
            result = CliRunner().invoke(APPS[program], arguments)
            assert result.exit_code == 0, (line, result.output)


def test_the_readme_has_blocks_to_run() -> None:
    assert any(name.startswith("README") for name, _ in PYTHON)
    assert len(COMMANDS) >= 7 and {line.partition(" ")[0] for _, line in COMMANDS} == set(APPS)


def test_the_figures_of_speed_are_those_of_the_results() -> None:
    text = figures.PAGE.read_text()
    assert figures.page(text) == text, "run python -m benchmarks.speed.figures"


def test_the_tables_of_scale_are_those_of_the_results() -> None:
    assert scale.PAGE.read_text() == scale.page(scale.PAGE.read_text()), (
        "write it again: python -m benchmarks.speed.scale --page"
    )


def test_the_simulation_gives_what_its_example_says() -> None:
    found = doctest.testmod(scale)
    assert found.attempted and not found.failed


def test_the_page_of_what_is_covered_is_up_to_date() -> None:
    assert coverage.PAGE.read_text() == coverage.page(), "write it again: python -m benchmarks.zoo.coverage"


def test_the_counts_of_trust_are_those_of_the_results() -> None:
    assert trust.PAGE.read_text() == trust.page(trust.PAGE.read_text()), (
        "write it again: python -m benchmarks.trust page"
    )


def test_the_table_of_versions_is_that_of_what_ran() -> None:
    assert tested.PAGE.read_text() == tested.page(tested.PAGE.read_text()), "python -m tests.helpers.tested"
    assert all(row["passed"] for row in json.loads(tested.ROWS.read_text()))


def test_a_row_of_versions_takes_the_place_of_the_one_with_the_same_minors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"jax": "0.12.3", "flax": "0.12.12", "numpy": "2.5.5", "torch": None}
    monkeypatch.setattr(tested, "installed_version", versions.get)
    monkeypatch.setattr(tested.platform, "python_version", lambda: "3.13.9")
    old = {"python": "3.13.0", "jax": "0.12.0.1", "flax": "0.12.12", "numpy": "2.5.5", "torch": None, "passed": 1}
    kept = [old | {"torch": "2.15.0", "date": "2026-01-01"}, old | {"python": "3.9.1", "date": "2026-01-01"}]
    (tmp_path / "rows.json").write_text(json.dumps([old | {"date": "2026-01-01"}, *kept]))
    tested.record(tmp_path / "rows.json", 7)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["python"], row["torch"], row["passed"]) for row in rows] == [
        ("3.9.1", None, 1), ("3.13.0", "2.15.0", 1), ("3.13.9", None, 7),
    ]  # fmt: skip


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_files_that_documents_name_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    folders = "jaxensemble|torch_bridge|tests|benchmarks|docs|examples"
    named = {ROOT / name for name in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", text)}
    links = {document.parent / name for name in re.findall(r"\]\(((?![a-z]+:)[^)#]+)", text)}
    assert not [str(path) for path in named | links if not path.exists()]


def test_make_targets_that_documents_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", document.read_text(), re.MULTILINE):
            name = "".join(target)
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"{document.name} names `make {name}`"
