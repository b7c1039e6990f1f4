"""The import boundary: needs and effects of importing the packages, and names that their sources never contain.

Each probe runs in a fresh interpreter, and each comes with a planted offender, which shows that the test can fail.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxensemble", "torch_bridge")
NEVER_IMPORTED = ("torch", "torch_bridge")
NOT_ON_WINDOWS = ("fcntl", "resource")

IMPORT_ALL = """
import importlib, pkgutil, sys

def reraise(name):
    raise  # walk_packages would pass over an ImportError

def import_all(package):
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + ".", reraise):
        if not module.name.endswith(".__main__"):  # importing that runs the program
            importlib.import_module(module.name)
    return sorted(name for name in sys.modules if name.partition(".")[0] == package)
"""

BLOCKING = """
import importlib.abc, json

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

BLOCKED = json.loads(sys.argv[2])
sys.meta_path.insert(0, Blocked())
"""

IMPORTED = BLOCKING + "print(json.dumps(import_all(sys.argv[1])))"

SAVED_AND_LOADED = """
import numpy as np
from flax import nnx
from jaxensemble import Ensemble, InputError
from jaxensemble.files import durable
from jaxensemble.modules.classes import load_class
from jaxensemble.network.network import Call, Layer, Network, Ref

layer = Layer("fc", "nnx.Linear", {"in_features": 3, "out_features": 2})
call = Call("y", "layer:fc", (Ref("x"),), {})
network = Network("Net", (Ref("x"),), Ref("y"), (layer,), (), (call,), {"": ("Net", "module")})
modules = [load_class(network)(rngs=nnx.Rngs(seed)) for seed in range(3)]
ensemble, x = Ensemble.from_modules(modules, network=network), np.ones((4, 3), "float32")
ensemble.save("net")
ensemble.save("net", force=True)
np.testing.assert_array_equal(Ensemble.load("net")(x), ensemble(x))
"""

ON_WINDOWS = """
durable._DIRECTORY, durable._libc = None, lambda: None  # neither descriptors of directories nor an exchange
ensemble.save("other")
np.testing.assert_array_equal(Ensemble.load("other")(x), ensemble(x))
try:
    ensemble.save("other", force=True)
except InputError as error:
    print(error)
"""

CHANGED_SETTINGS = """
import importlib.util, json
import jax, numpy as np

def settings():
    state = {f"jax.config.{name}": repr(value) for name, value in jax.config.values.items()}
    state["numpy.errstate"] = repr(np.geterr())
    state["numpy.random"] = repr(np.random.get_state())
    if importlib.util.find_spec("torch"):
        state |= {f"torch.{name}": repr(value) for name, value in torch_settings().items()}
    return state

def torch_settings():
    import torch
    return {
        "default_dtype": torch.get_default_dtype(),
        "default_device": torch.get_default_device(),
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "grad_enabled": torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "rng_state": torch.get_rng_state().tolist(),
    }

before = settings()
import_all(sys.argv[1])
after = settings()
print(json.dumps(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))))
"""


def _probe(
    script: str, *arguments: str, path: Path = ROOT, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    # Importing never needs an accelerator, and several probes at a time would compete for it.
    environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", IMPORT_ALL + script, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def _plant(folder: Path, source: str) -> None:
    package = folder / "planted"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text(source)


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_imports_without_torch() -> None:
    _assert_all_import("jaxensemble", NEVER_IMPORTED)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_without_what_windows_lacks(package: str) -> None:
    if package == "torch_bridge" and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed, and torch_bridge is for where it is")
    _assert_all_import(package, NOT_ON_WINDOWS)


def _assert_all_import(package: str, blocked: tuple[str, ...]) -> None:
    done = _probe(IMPORTED, package, json.dumps(blocked))
    assert done.returncode == 0, done.stderr
    expected = {_dotted(path) for path in _modules(package) if path.stem != "__main__"}
    assert set(json.loads(done.stdout)) >= expected


@pytest.mark.parametrize(
    ("source", "blocked"),
    [
        ("import torch", NEVER_IMPORTED),
        ("from torch import nn", NEVER_IMPORTED),
        ("import torch_bridge.parity", NEVER_IMPORTED),
        ("import fcntl", NOT_ON_WINDOWS),
        ("from resource import getrusage", NOT_ON_WINDOWS),
    ],
)
def test_a_planted_import_of_what_is_blocked_is_caught(tmp_path: Path, source: str, blocked: tuple[str, ...]) -> None:
    _plant(tmp_path, source)
    done = _probe(IMPORTED, "planted", json.dumps(blocked), path=tmp_path)
    assert done.returncode != 0
    assert "is blocked" in done.stderr


def test_ensembles_are_saved_and_loaded_without_what_windows_lacks(tmp_path: Path) -> None:
    script = BLOCKING + SAVED_AND_LOADED + ON_WINDOWS
    done = _probe(script, "jaxensemble", json.dumps(NOT_ON_WINDOWS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exists, and its file system cannot replace a directory in one step" in done.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["net", "other"]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_changes_no_global_setting(package: str) -> None:
    if package == "torch_bridge" and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed, and torch_bridge is for where it is")
    done = _probe(CHANGED_SETTINGS, package)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_a_planted_change_of_settings_is_caught(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the planted module changes a setting of torch")
    _plant(
        tmp_path,
        "import jax, torch\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "torch.set_grad_enabled(False)\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.backends.cudnn.allow_tf32 = False\n"
        "torch.manual_seed(1)\n",
    )
    done = _probe(CHANGED_SETTINGS, "planted", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {
        "jax.config.jax_enable_x64",
        "torch.grad_enabled",
        "torch.default_dtype",
        "torch.cudnn.allow_tf32",
        "torch.rng_state",
    } <= set(json.loads(done.stdout))


LIGHT = """
for package in sys.argv[1:]:
    importlib.import_module(package + ".cli")
print(*sorted(sys.modules.keys() & {"jax", "flax", "numpy", "optax", "torch"}))
"""


def test_the_command_lines_import_nothing_heavy() -> None:
    done = _probe(LIGHT, *PACKAGES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_found_when_asked_for(package: str) -> None:
    if package == "torch_bridge":
        pytest.importorskip("torch")
    module, public = (importlib.import_module(name) for name in (package, f"{package}.public"))
    names = [name for name in vars(public) if not name.startswith("_")]
    everything: dict[str, object] = {}
    exec(f"from {package} import *", everything)
    assert set(names) <= set(everything)
    assert names and set(names) < set(dir(module))
    assert all(getattr(module, name) is getattr(public, name) for name in names)
    modules = {path.stem for path in (ROOT / package).glob("*.py")}
    assert not set(names) & modules  # or the module would be found
    assert getattr(module, "cli").__name__ == f"{package}.cli"  # noqa: B009 - as without a type checker
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {package} import nothing")


NOT_PUBLIC = (
    "jax.core", "jax.extend", "jax.experimental", "jax.interpreters", "jax._src", "flax.nnx.graphlib",
    "torch.utils._pytree", "torch.fx.experimental", "torch._dynamo", "torch._inductor", "torch._subclasses",
)  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_not_public_is_imported_in_one_module(package: str) -> None:
    sources = {_dotted(path): path.read_text("utf-8") for path in _modules(package)}
    assert _forbidden_imports(sources.pop(f"{package}.compat"), NOT_PUBLIC)
    assert {name: bad for name, text in sources.items() if (bad := _forbidden_imports(text, NOT_PUBLIC))} == {}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAMES = {"orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}
"""The distribution of a module that has another name."""


def _declared(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {name.group().lower().replace("_", "-") for name in names if name}


def _third_party(source: str, *, at_import: bool) -> set[str]:
    """The distributions that a source imports: all of them, or those that it cannot be imported without."""
    tree = ast.parse(source)
    nodes = tree.body if at_import else [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.Call)]
    roots = {name.partition(".")[0] for node in nodes for name in _imported(node)}
    roots -= {*sys.stdlib_module_names, *PACKAGES}
    return {NAMES.get(name, name.replace("_", "-")) for name in roots}


def _undeclared(source: str, always: set[str], anywhere: set[str]) -> set[str]:
    return _third_party(source, at_import=True) - always | _third_party(source, at_import=False) - anywhere


DECLARED = _declared(PROJECT["dependencies"])
EXTRAS = {name: _declared(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}
ALWAYS = {"jaxensemble": DECLARED, "torch_bridge": DECLARED | EXTRAS["torch"]}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package: str) -> None:
    always, anywhere = ALWAYS[package], ALWAYS[package].union(*EXTRAS.values())
    sources = {_dotted(path): path.read_text("utf-8") for path in _modules(package)}
    assert {name: bad for name, text in sources.items() if (bad := _undeclared(text, always, anywhere))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import scipy", {"scipy"}),
        ("from ml_dtypes import bfloat16\nimport os, numpy.linalg\nimport jaxensemble", set()),
        ("import orbax.checkpoint", {"orbax-checkpoint"}),  # an extra's, which is imported on request only
        ("def f():\n    import orbax.checkpoint, scipy", {"scipy"}),
        ("import torch", {"torch"}),
    ],
)
def test_the_scan_for_undeclared_imports_finds_planted_ones(source: str, found: set[str]) -> None:
    assert _undeclared(source, DECLARED, DECLARED.union(*EXTRAS.values())) == found


# Names that run code found in a file; a package stands for every name in it. `import pickle` for its errors is fine.
UNSAFE_CALLS = (
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle",
    "dill",
    "joblib.load",
    "torch.jit.load",
)
UNSAFE_KEYWORDS = (("weights_only", False), ("allow_pickle", True))
IMPORTERS = ("__import__", "import_module", "importlib.import_module")


def _is_within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def _imported(node: ast.AST) -> Iterator[str]:
    """The dotted names that one node imports, `from a import b` giving `a.b`."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            yield from (f"{module}.{alias.name}" for alias in names)
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(func) in IMPORTERS:
            yield name


def _forbidden_imports(source: str, roots: tuple[str, ...] = NEVER_IMPORTED) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt | ast.Call)]
    return [f"{node.lineno}: {name}" for node in nodes for name in _imported(node) if _is_within(name, roots)]


def _unsafe(node: ast.AST) -> Iterator[str]:
    yield from (name for name in _imported(node) if _is_within(name, UNSAFE_CALLS))
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func)
    if _is_within(name, UNSAFE_CALLS):
        yield name
    for keyword in node.keywords:
        if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in UNSAFE_KEYWORDS:
            yield f"{keyword.arg}={keyword.value.value}"
    if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
        yield "torch.load without weights_only"


def _unsafe_loads(source: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt | ast.Call)]
    return [f"{node.lineno}: {name}" for node in nodes for name in _unsafe(node)]


def test_no_source_of_the_runtime_imports_torch() -> None:
    modules = _modules("jaxensemble")
    assert modules
    assert {_dotted(path): bad for path in modules if (bad := _forbidden_imports(path.read_text("utf-8")))} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_source_loads_what_could_run_code(package: str) -> None:
    modules = _modules(package)
    assert modules
    found = {_dotted(path): bad for path in modules if (bad := _unsafe_loads(path.read_text("utf-8")))}
    assert {name: [text.partition(" ")[2] for text in bad] for name, bad in found.items()} == OWN.get(package, {})


OWN = {"torch_bridge": {
    # The user's modules on their way to a process of ours, in a directory that nobody else can write to.
    "torch_bridge.timing.run": ["cloudpickle", "cloudpickle.dumps", "cloudpickle.dumps"],
    "torch_bridge.timing.worker": ["pickle.load", "pickle.load"],
}}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", ["1: torch"]),
        ("import jax, torch.nn as nn", ["1: torch.nn"]),
        ("from torch.nn import Linear", ["1: torch.nn.Linear"]),
        ("def f():\n    from torch_bridge import check", ["2: torch_bridge.check"]),
        ("importlib.import_module('torch.fx')", ["1: torch.fx"]),
        ("__import__('torch')", ["1: torch"]),
        ("import torchlike\nfrom . import torch\nimport_module(name)", []),
    ],
)
def test_the_scan_for_imports_finds_planted_ones(source: str, found: list[str]) -> None:
    assert _forbidden_imports(source) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(path, weights_only=False)", ["1: weights_only=False"]),
        ("torch.load(path)", ["1: torch.load without weights_only"]),
        ("with path.open() as file:\n    pickle.load(file)", ["2: pickle.load"]),
        ("pickle.Unpickler(file).load()", ["1: pickle.Unpickler"]),
        ("import dill", ["1: dill"]),
        ("from pickle import loads", ["1: pickle.loads"]),
        ("torch.jit.load(path)", ["1: torch.jit.load"]),
        ("from torch.jit import load", ["1: torch.jit.load"]),
        ("np.load(path, allow_pickle=True)", ["1: allow_pickle=True"]),
        ("import pickle\ntorch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)", []),
    ],
)
def test_the_scan_for_unsafe_loads_finds_planted_ones(source: str, found: list[str]) -> None:
    assert _unsafe_loads(source) == found
