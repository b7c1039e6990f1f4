"""The tests of what was changed since the last commit, or by it: what `make quick` runs."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.helpers.artifacts import ROOT

PACKAGES = ("jaxensemble", "torch_bridge")


ALWAYS = ROOT / "tests" / "jaxensemble" / "test_imports.py"


def changed_files() -> list[Path]:
    """The Python files that differ from the last commit; if none does, those that it changed."""
    since = [*_git("diff", "--name-only", "HEAD"), *_git("ls-files", "--others", "--exclude-standard")]
    return _python(since) or _python(_git("show", "--name-only", "--format=", "HEAD"))


def _python(names: list[str]) -> list[Path]:
    return [ROOT / name for name in sorted(names) if name.endswith(".py") and (ROOT / name).exists()]


def tests_of(files: list[Path]) -> list[Path]:
    """The modules themselves, for their examples; changed tests, and those that import one of the modules.

    All tests, where what all of them run under was changed.
    """
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    if ROOT / "tests" / "conftest.py" in files:
        return every
    modules = {module_of(path) for path in files}
    tests = {ALWAYS, *(path for path in every if path in files or imported(path) & modules)}
    return [path for path in files if path.relative_to(ROOT).parts[0] in PACKAGES] + sorted(tests)


def module_of(path: Path) -> str:
    """The name of a module: `jaxensemble.programs.rows`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The names that a file imports: of `from a.b import c`, both `a.b` and `a.b.c`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.stdout.write(" ".join(str(path.relative_to(ROOT)) for path in tests_of(changed_files())) + "\n")
