"""The rooms of both packages: which may import which, and that none imports in a circle."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers.artifacts import ROOT

FLOORS = {
    "jaxensemble": (
        "compat dtypes errors lazy records version",
        "arrays files terminal",
        "devices ops",
        "layers programs",
        "network uncertainty",
        "source",
        "modules",
        "array_files artifact running",
        "ensemble torch_func",
        "doctor row_blocks training",
        "file_predictions machines",
        "cli public",
        "__main__",
    ),
    "jaxensemble.source": ("names", "read", "plan", "write"),
    "torch_bridge": (
        "arrays compat report",
        "members state_dicts",
        "graph optimizers",
        "lowering",
        "parity",
        "porting timing",
        "checkpoints demo doctor",
        "cli public",
        "__main__",
    ),
    "torch_bridge.graph": ("sizes", "caches", "gradients"),
    "torch_bridge.lowering": ("layouts", "rules"),
}
"""Rooms from the lowest floor to the highest. A room imports only rooms on floors below its own.

Of the two packages every room and every module is listed, of a room that has rooms within it these.
"""

Imports = Mapping[str, set[str]]
"""The modules that a module imports, by name."""


def read_imports(folder: Path, *, within_functions: bool = True) -> dict[str, set[str]]:
    """Every module below a folder with the modules of the same package that it imports."""
    paths = {_dotted(path, folder.parent): path for path in folder.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text("utf-8"))
        nodes = ast.walk(tree) if within_functions else tree.body
        found[module] = {name for node in nodes for name in _imported(node, paths) if name != module}
    return found


def _dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _imported(node: ast.AST, modules: Iterable[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom) and node.module and node.module in modules:
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name if name in modules else node.module for name in names)


def arrows(imports: Imports, folder: str) -> dict[str, set[str]]:
    """The entries of a folder (rooms and modules), each with the other entries that it imports."""
    found: dict[str, set[str]] = {}
    for module, names in imports.items():
        if module.startswith(f"{folder}."):
            entry = _entry(module, folder)
            others = {_entry(name, folder) for name in names if name == folder or name.startswith(f"{folder}.")}
            found.setdefault(entry, set()).update(others - {entry})
    return found


def _entry(module: str, folder: str) -> str:
    return module.removeprefix(folder).removeprefix(".").partition(".")[0] or "__init__"


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Entries that import each other in a circle; none where there is no circle."""
    left = {name: set(others) for name, others in graph.items()}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)


PACKAGES = ("jaxensemble", "torch_bridge")
IMPORTS = {package: read_imports(ROOT / package) for package in PACKAGES}
AT_IMPORT = {package: read_imports(ROOT / package, within_functions=False) for package in PACKAGES}
FOLDERS = [
    _dotted(path, ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("__init__.py"))
]  # fmt: skip


@pytest.mark.parametrize("folder", FLOORS)
def test_a_room_imports_rooms_below_alone(folder: str) -> None:
    floors = {room: number for number, rooms in enumerate(FLOORS[folder]) for room in rooms.split()}
    found = arrows(IMPORTS[folder.partition(".")[0]], folder)
    upwards = [
        f"{room} (floor {floors[room]}) imports {other} (floor {floors[other]})"
        for room, others in sorted(found.items())
        for other in sorted(others)
        if room in floors and other in floors and floors[other] >= floors[room]
    ]
    assert upwards == []
    if folder in PACKAGES:
        assert found.keys() == floors.keys(), "a new room needs a floor"
    assert floors.keys() <= found.keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_room_imports_in_a_circle(folder: str) -> None:
    """Modules of one room may import each other within functions; rooms may not."""
    package, path = folder.partition(".")[0], ROOT.joinpath(*folder.split("."))
    rooms = {child.name for child in path.iterdir() if (child / "__init__.py").exists()}
    whole, outside = (arrows(found[package], folder) for found in (IMPORTS, AT_IMPORT))
    graph = {
        entry: outside.get(entry, set()) | {other for other in others if {entry, other} & rooms}
        for entry, others in whole.items()
    }
    assert circle(graph) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_the_room_that_it_is_in(folder: str) -> None:
    found = arrows(IMPORTS[folder.partition(".")[0]], folder)
    names = {"__main__", "public"}  # which are about the package as a whole
    assert {entry for entry, others in found.items() if "__init__" in others} - names == set()


def test_planted_circles_are_found(tmp_path: Path) -> None:
    package = tmp_path / "planted"
    for room, source in {"a": "from planted.b import one", "b": "def f():\n    from planted.a import two"}.items():
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
        (package / room / "one.py").write_text(source)
    (package / "__init__.py").write_text("")
    assert circle(arrows(read_imports(package), "planted")) == ["a", "b"]
    assert circle(arrows(read_imports(package, within_functions=False), "planted")) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_about_rooms_lists_them_all(package: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = [child.name for child in sorted((ROOT / package).iterdir()) if (child / "__init__.py").exists()]
    assert [room for room in rooms if f"`{room}/`" not in page] == []
