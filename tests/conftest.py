"""Settings of all tests. `JAX_PLATFORMS` says which devices JAX uses; the Makefile sets it."""

import gc
import importlib.util
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

if importlib.util.find_spec("beartype") is not None:
    from tests.helpers.shapes import install_checks

    install_checks()  # before the modules whose shapes are checked are imported

from jaxensemble import Ensemble
from jaxensemble.terminal import installed_version
from tests.helpers.tested import record
from tests.helpers.training import MLP

HAS_TORCH = importlib.util.find_spec("torch") is not None
STARTED = time.monotonic()
VERSIONED = ("jax", "jaxlib", "flax", "torch")

# Files that need a package that is not installed are left out, and the header names them.
NEEDED_FOR = {
    "beartype": "tests.helpers.shapes",
    "expecttest": "torch.testing._internal",
    "hypothesis": "hypothesis",
    "sklearn": "sklearn",
}
MISSING = [name for name in NEEDED_FOR if importlib.util.find_spec(name) is None]
TEXTS = {path: path.read_text("utf-8") for path in sorted(Path(__file__).parent.rglob("test_*.py"))}
collect_ignore = [path for path, text in TEXTS.items() if any(NEEDED_FOR[name] in text for name in MISSING)]
collect_ignore_glob = ["saved/*"]  # sources of networks, not modules of ours

if "hypothesis" not in MISSING:
    import hypothesis

    # No deadline: the first example of a shape is compiled. No database: the examples are the same in every run.
    hypothesis.settings.register_profile("jaxensemble", deadline=None, derandomize=True, database=None, max_examples=25)
    hypothesis.settings.load_profile("jaxensemble")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Adds a budget, and the setting of pytest-timeout if it is not loaded, since unknown settings are errors."""
    parser.addoption("--budget", type=float, default=math.inf, help="seconds after which no more tests are begun")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds that a test may take; not loaded: pytest-timeout")


def pytest_report_header() -> str:
    platforms = os.environ.get("JAX_PLATFORMS", "unset")
    left_out = (
        f"; without {', '.join(MISSING)}: no {', '.join(path.name for path in collect_ignore)}" if MISSING else ""
    )
    versions = ", ".join(f"{name} {installed_version(name) or 'absent'}" for name in VERSIONED)
    return f"{versions}; JAX_PLATFORMS {platforms}{left_out}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget: Any = item.config.getoption("--budget")
    if time.monotonic() - STARTED > budget:
        pytest.skip(f"not begun within {budget:g} seconds")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """Records the versions that all tests passed with, if the environment names a file for them."""
    file = os.environ.get("TESTED_WITH")
    if file and exitstatus == 0:
        record(Path(file), len(terminalreporter.stats.get("passed", ())))


def pytest_configure() -> None:
    """Gives JAX four CPU devices, for tests of meshes, and torch one thread.

    The processes of pytest-xdist share the cores, and the order of sums stays the same.
    """
    jax.config.update("jax_num_cpu_devices", 4)
    if HAS_TORCH:
        import torch

        torch.set_num_threads(1)


def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


LONG = "timing/run.py::torch_bridge.timing.run.time"
"""An example that starts processes, as tests do with more of them: it is for `make slow`, too."""

FEW = 10
"""Of cases that are `thinned`, the first of so many is for `make test`."""


@pytest.hookimpl(tryfirst=True)  # before pytest itself leaves out by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks further cases of `thinned` tests, and skips tests that are marked `gpu` if JAX sees no GPU.

    Devices are looked for only if a test asks for one.
    """
    seen: dict[str, int] = {}
    for item in items:
        if item.get_closest_marker("thinned"):
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % FEW:
                item.add_marker("further")
        if item.nodeid.endswith(LONG):
            item.add_marker("further")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        skip = pytest.mark.skip(reason=f"needs a GPU; JAX sees {jax.devices()}")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    """Seeds torch before every test, so that a test alone draws the same numbers as in the whole suite."""
    if HAS_TORCH:
        import torch

        torch.manual_seed(0)


@pytest.fixture
def x64() -> Iterator[None]:
    """Switches float64 on in JAX, for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="session")
def true_float32() -> Iterator[None]:
    """Has JAX compute products in float32 on GPUs that have TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_forgotten() -> Iterator[None]:
    """Clears compiled programs after each file: with thousands of them, everything takes twice as long."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def mlp() -> Ensemble:
    """Three members of a small network."""
    return Ensemble.from_modules([MLP(rngs=nnx.Rngs(seed)) for seed in range(3)])
