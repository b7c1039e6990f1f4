"""Both command lines before any command runs: versions, completion, `python -m`, and broken installations."""

import importlib.metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxensemble import terminal
from tests.helpers.command_lines import PROGRAMS, app, python_m


@pytest.mark.parametrize(("program", "package"), PROGRAMS.items())
def test_versions_are_printed(program: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = python_m(package, "--version")
    flax = importlib.metadata.version("flax")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{program} ") and f", flax {flax}" in done.stdout
    assert ("torch" in done.stdout.split("(")[1]) == (program == "torch-bridge")
    monkeypatch.setattr(terminal, "installed_version", lambda name: {"jaxensemble": "1.2", "flax": "3"}.get(name))
    printed = CliRunner().invoke(app(program), ["--version"]).stdout
    assert printed.startswith(f"{program} 1.2 (jax not installed, flax 3")


@pytest.mark.parametrize("program", PROGRAMS)
def test_shells_complete_commands_and_options(program: str) -> None:
    def completed(*words: str) -> list[str]:
        line = " ".join([program, *words])
        environment = {
            f"_{program.replace('-', '_').upper()}_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words)),
        }
        return CliRunner().invoke(app(program), [], prog_name=program, env=environment).stdout.split()

    assert completed("doc") == ["doctor"]
    assert "source" in completed("")
    assert completed("source", "--js") == ["--json"]
    assert "--install-completion" in CliRunner().invoke(app(program), ["--help"]).stdout


@pytest.mark.parametrize(("program", "package"), PROGRAMS.items())
def test_the_module_is_the_command_line(program: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = python_m(package)
    assert f"Usage: {program} [OPTIONS] COMMAND" in done.stdout and "doctor" in done.stdout
    done = python_m(package, "no-such-command")
    assert done.returncode == 2 and "No such command 'no-such-command'" in done.stderr
    monkeypatch.setenv(f"_{program.replace('-', '_').upper()}_COMPLETE", "source_bash")
    assert python_m(package).stdout.strip().endswith(f" {program}")  # what the shell completes, and not `python`


def test_a_missing_package_is_told_and_sent_to_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("raise ImportError('no jaxlib')")
    done = python_m("jaxensemble", "inspect", "nothing", path=tmp_path)
    assert done.returncode == 5 and done.stderr == "jaxensemble: no jaxlib; see jaxensemble doctor\n"
