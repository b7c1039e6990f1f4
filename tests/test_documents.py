"""What the documents say works, works: Python blocks run as pasted, `torch-bridge` commands exit with 0."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torch_bridge.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of a language, with a name for its test."""
    found = []
    for document in DOCUMENTS:
        for k, code in enumerate(re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)):
            found.append((f"{document.name}-{k}", code))
    return found


PYTHON = blocks("python")
COMMANDS = [
    (f"{name}-{k}", line)
    for name, code in blocks("sh")
    for k, line in enumerate(code.splitlines())
    if line.startswith("torch-bridge")
]


@pytest.mark.parametrize("code", [code for _, code in PYTHON], ids=[name for name, _ in PYTHON])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<document>", "exec"), {"__name__": "__document__"})


@pytest.mark.parametrize("line", [line for _, line in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_commands_succeed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
    assert result.exit_code == 0, result.output


def test_the_readme_has_blocks_to_run() -> None:
    assert any(name.startswith("README") for name, _ in PYTHON)
    assert len(COMMANDS) >= 3


def test_make_targets_that_documents_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", document.read_text(), re.MULTILINE):
            name = "".join(target)
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"{document.name} names `make {name}`"
