"""Finds the tests of files that were changed since the last commit, or by it: `make quick` runs them."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.helpers.artifacts import ROOT

PACKAGES = ("jaxensemble", "torch_bridge")

TESTS = ROOT / "tests"
ALWAYS = TESTS / "jaxensemble" / "test_imports.py"


def changed_files() -> list[Path]:
    """Returns the Python files that differ from the last commit; if none does, those that it changed."""
    since = [*_git("diff", "--name-only", "HEAD"), *_git("ls-files", "--others", "--exclude-standard")]
    return _python(since) or _python(_git("show", "--name-only", "--format=", "HEAD"))


def _python(names: list[str]) -> list[Path]:
    return [ROOT / name for name in sorted(names) if name.endswith(".py") and (ROOT / name).exists()]


def tests_of(files: list[Path]) -> list[Path]:
    """Returns what tests some files.

    These are modules of the packages themselves, for their examples; the tests of their rooms; changed tests; and tests
    that import a changed module or helper. All tests, if `conftest.py` is among the files.
    """
    every = sorted(TESTS.rglob("test_*.py"))
    if TESTS / "conftest.py" in files:
        return every
    modules = {module_of(path) for path in files}
    modules |= helpers_that_import({name for name in modules if name.startswith("tests.helpers")})
    tests = {ALWAYS, *(path for path in every if path in files or imported(path) & modules)}
    tests |= {test for path in files for test in room_tests(path)}
    return [path for path in files if path.relative_to(ROOT).parts[0] in PACKAGES] + sorted(tests)


def room_tests(path: Path) -> list[Path]:
    """Returns the test with a module's name in its room of `tests`, or else all tests of the nearest room with some."""
    inner = path.relative_to(ROOT)
    if inner.parts[0] not in PACKAGES:
        return []
    if (named := TESTS / inner.with_name(f"test_{inner.stem}.py")).exists():
        return [named]
    rooms = (sorted((TESTS / room).glob("test_*.py")) for room in inner.parents)
    return next(tests for tests in rooms if tests)


def helpers_that_import(modules: set[str]) -> set[str]:
    """Returns the helpers that import one of some modules, directly or through other helpers."""
    imports = {module_of(path): imported(path) for path in (TESTS / "helpers").rglob("*.py")}
    found: set[str] = set()
    while new := {name for name, names in imports.items() if names & (modules | found)} - found:
        found |= new
    return found


def module_of(path: Path) -> str:
    """Returns the name of a module, such as `jaxensemble.programs.rows`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Returns the names that a file imports: of `from a.b import c`, both `a.b` and `a.b.c`."""
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
