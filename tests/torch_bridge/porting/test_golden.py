"""Golden files: the printed source of well-known networks, one file each in `golden/`, for people to read.

After a change of `jaxensemble.source` or of a rule, `make golden` writes them again, the slow ones included. Read the
diff to judge the change.
"""

import dataclasses
import difflib
import importlib.util
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import torch_bridge
from benchmarks.speed import architectures
from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.state import State, flatten, merge, split
from jaxensemble.programs.rewrite import primitives
from tests.helpers.porting import randomised
from torch_bridge.demo import SimpleCNN, SimpleMLP

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"
HINT = "If the new source reads better, run `make golden` and commit the files."


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, the shape of one input, the most lines that its source may have, and its transposes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    lines: int
    transposes: int


CASES = {
    "lenet": Case(architectures.LeNet, (1, 28, 28), 30, 0),
    "tutorial_mlp": Case(SimpleMLP, (1, 28, 28), 30, 0),
    "tutorial_cnn": Case(SimpleCNN, (1, 28, 28), 30, 0),
    "resnet18": Case(architectures.resnet18, (3, 33, 33), 110, 1),
    "resnet50": Case(architectures.resnet50, (3, 33, 33), 110, 1),
    "mobilenet_v2": Case(architectures.MobileNetV2, (3, 33, 33), 130, 1),
    "vit_b_16": Case(architectures.VisionTransformer, (3, 224, 224), 110, 13),
    "convnext_tiny": Case(architectures.ConvNeXt, (3, 33, 33), 110, 1),
}
SLOW = ("resnet50", "mobilenet_v2", "vit_b_16", "convnext_tiny")
"""It takes torch.export 10 to 20 s to follow these; what they show beyond ResNet-18 has small tests of its own."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def ported(request: pytest.FixtureRequest) -> tuple[str, Ensemble, jax.Array, np.ndarray]:
    """A golden network, ported as an ensemble of two, a batch for it, and what PyTorch makes of that in member 1."""
    name, case = request.param, CASES[request.param]
    torch.manual_seed(0)
    members = [randomised(case.make().eval(), seed).float() for seed in range(2)]
    x = torch.randn(2, *case.shape)
    ensemble = torch_bridge.to_ensemble(members, (x,), check=False)
    if UPDATE:
        (GOLDEN / f"{name}.py").write_text(ensemble.source())
    with torch.no_grad():
        expected = members[1](x).numpy()
    return name, ensemble, jax.numpy.asarray(x.numpy()), expected


def test_source_is_the_golden_one(ported: Any) -> None:
    name, ensemble, _, _ = ported
    golden, actual = (GOLDEN / f"{name}.py").read_text(), ensemble.source()
    diff = difflib.unified_diff(golden.splitlines(), actual.splitlines(), f"golden/{name}.py", "printed", lineterm="")
    assert golden == actual, "\n".join([*diff, HINT])


@pytest.mark.further
def test_golden_file_computes_what_the_ensemble_does(ported: Any) -> None:
    """Imported on its own, with weights loaded by path: the same program, and the same numbers, bit by bit."""
    name, ensemble, x, expected = ported
    blank = nnx.eval_shape(lambda: _imported(GOLDEN / f"{name}.py")(rngs=nnx.Rngs(0)))
    nnx.Module.eval(blank)
    member = ensemble[1]
    model = merge(*_loaded(split(blank), split(member)))

    programs = [str(jax.make_jaxpr(lambda x, m=m: m(x))(x)) for m in (model, member)]
    assert programs[0] == programs[1]
    ours, theirs = (jax.jit(lambda x, m=m: m(x))(x) for m in (model, member))
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()  # float32; zoo and rules compare in float64


def test_arrays_are_transposed_at_the_input_and_nowhere_else(ported: Any) -> None:
    """An image of one channel is channels-last as it is; each attention of `jax.nn` moves its heads once."""
    name, ensemble, x, _ = ported
    assert primitives(ensemble[0], x)["transpose"] == CASES[name].transposes


def test_channels_last_images_need_no_transpose() -> None:
    x = torch.randn(2, 3, 33, 33)
    module = torch_bridge.to_flax(architectures.resnet18().eval(), (x,), input_layout="NHWC")
    assert primitives(module, x.movedim(1, -1).numpy())["transpose"] == 0


def _imported(path: Path) -> Any:
    """The network's class of a golden file, the last class in it."""
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [value for value in vars(module).values() if isinstance(value, type)][-1]


def _loaded(blank: State, weights: State) -> State:
    """The state of a blank model with the arrays that have the same paths; every path must have one."""
    for kind in ("params", "buffers", "constants", "rngs"):
        ours, theirs = flatten(getattr(blank, kind)), flatten(getattr(weights, kind))
        assert {path: leaf.shape for path, leaf in ours.items()} == {path: leaf.shape for path, leaf in theirs.items()}
    return weights._replace(graphdef=blank.graphdef)


# Of the files alone


@pytest.mark.parametrize("name", CASES)
def test_golden_file_is_short_and_needs_no_more_than_it_uses(name: str) -> None:
    lines = (GOLDEN / f"{name}.py").read_text().splitlines()
    assert len(lines) <= CASES[name].lines
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    known = ("import jax.numpy as jnp", "from flax import nnx", "from jax import lax", "from jaxensemble import ")
    assert imports and all(line.startswith(known) for line in imports)


def test_golden_files_are_formatted_and_lint_finds_nothing() -> None:
    settings = ["--isolated", "--line-length=120"]
    checks = [
        ["format", "--check", *settings],
        ["check", *settings, "--select=F,E,I,UP,B,C4", "--config=lint.isort.known-third-party=['jaxensemble']"],
    ]
    for check in checks:
        command = [sys.executable, "-m", "ruff", *check, str(GOLDEN)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.py")} == set(CASES)


# Of small networks


def printed(model: nn.Module, *shape: int) -> str:
    return torch_bridge.to_ensemble([model.eval()], (torch.randn(shape),), check=False).source()


def test_dropout_that_never_drops_is_not_printed() -> None:
    """Neither as a layer nor as a random stream; one that may drop is."""
    source = printed(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.AlphaDropout(0.0), nn.Linear(3, 2)), 2, 3)
    assert "Dropout" not in source
    assert "Dropout(0.1" in printed(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)), 2, 3)


def test_sequentials_with_few_named_children_are_dicts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Sequential(OrderedDict(drop=nn.Dropout(0.1), head=nn.Linear(3, 2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.heads(x)

    source = printed(Net(), 2, 3)
    assert "self.heads = nnx.Dict(drop=nnx.Dropout(0.1, rngs=rngs), head=nnx.Linear(3, 2, rngs=rngs))" in source
    assert "class Heads" not in source


def test_softmax_needs_no_axes_of_size_one() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.reshape(x.shape[0], 1, 4, 2, 3)
            scores = torch.einsum("BGIHD,BGJHD->BGHIJ", q, q) + self.bias
            return torch.einsum("BGHIJ,BGJHD->BGIHD", scores.softmax(-1), q).sum()

    source = printed(Scores(), 2, 4, 6)
    assert "nnx.softmax(" in source
    assert "squeeze" not in source and "expand_dims" not in source
