"""The tests of what was changed since the last commit, or by it: what `make quick` runs."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.helpers.artifacts import ROOT

PACKAGES = ("jaxensemble", "torch_bridge")


def changed_files() -> list[Path]:
    """The Python files that differ from the last commit; if none does, those that it changed."""
    since = (["diff", "--name-only", "HEAD"], ["ls-files", "--others", "--exclude-standard"])
    last = (["diff", "--name-only", "HEAD~1", "HEAD"],)
    for commands in (since, last):
        names = {name for command in commands for name in _git(*command)}
        files = [ROOT / name for name in sorted(names) if name.endswith(".py") and (ROOT / name).exists()]
        if files:
            return files
    return []


def tests_of(files: list[Path]) -> list[Path]:
    """The test files that import one of these modules, the modules themselves for their examples, and changed tests."""
    modules = {module_of(path) for path in files}
    tests = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path in files or imported(path) & modules]
    return [path for path in files if path.relative_to(ROOT).parts[0] in PACKAGES] + tests


def module_of(path: Path) -> str:
    """The name of a module: `jaxensemble.rows`."""
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
    found = tests_of(changed_files()) or [ROOT / "tests" / "project" / "test_imports.py"]
    sys.stdout.write(" ".join(str(path.relative_to(ROOT)) for path in found) + "\n")
