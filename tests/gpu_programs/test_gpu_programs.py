"""Programs for an H200, compiled on any machine, and held to counts: see `tests.helpers.gpu_programs`.

The numbers of the table are those of jax 0.10.2. A better program lowers its numbers; none may grow.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import nn

import torch_bridge
from benchmarks.speed.architectures import MobileNetV2, VisionTransformer, resnet18
from benchmarks.zoo.networks import varied
from jaxensemble import Ensemble, Plan
from tests.helpers import gpu_programs
from tests.helpers.gpu_programs import Contents
from torch_bridge.demo import SimpleCNN, SimpleMLP

pytestmark = pytest.mark.skipif(gpu_programs.missing() is not None, reason=str(gpu_programs.missing()))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "mlp": (SimpleMLP, 10, (64, 1, 28, 28)),
    "cnn": (SimpleCNN, 10, (64, 1, 28, 28)),
    "resnet18": (resnet18, 4, (8, 3, 64, 64)),
    "mobilenet_v2": (MobileNetV2, 4, (8, 3, 64, 64)),
    "vit": (lambda: VisionTransformer(32, 8, 192, 4, 3), 4, (8, 3, 32, 32)),
}
"""Networks, members, and the shape of a minibatch."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A program and the most that it may have: see `Contents`. Temporaries are in MB."""

    network: str
    dtype: str
    each: bool
    launches: int
    temporaries: float
    moved: int = 0
    moved_weights: int = 0

    def __str__(self) -> str:
        return f"{self.network}-{self.dtype}-{'each' if self.each else 'same'}"


FORWARD = [
    # The first product is divided into four sums, and adds them up in a kernel of its own.
    Case("mlp", "float32", False, launches=4, temporaries=1.64),
    Case("mlp", "float32", True, launches=4, temporaries=1.64),
    # Rows of 784 numbers of two bytes are padded to 800: both inputs and weights.
    Case("mlp", "bfloat16", False, launches=6, temporaries=3.5, moved=2, moved_weights=1),
    Case("mlp", "bfloat16", True, launches=6, temporaries=4.4, moved=2, moved_weights=1),
    # Every convolution is one kernel with bias and activation, except the first with a minibatch for each member: XLA
    # leaves convolutions of groups of one channel as they are.
    Case("cnn", "float32", False, launches=6, temporaries=149.8),
    Case("cnn", "float32", True, launches=8, temporaries=149.8, moved=1),
    Case("cnn", "bfloat16", False, launches=6, temporaries=74.9),
    Case("cnn", "bfloat16", True, launches=8, temporaries=74.9, moved=1),
    # One kernel transposes the minibatch. In half precision, normalisations are not folded into convolutions.
    Case("resnet18", "float32", False, launches=24, temporaries=10.6, moved=1),
    Case("resnet18", "float32", True, launches=24, temporaries=10.6, moved=1),
    Case("resnet18", "bfloat16", False, launches=39, temporaries=5.3, moved=1),
    Case("mobilenet_v2", "float32", False, launches=90, temporaries=25.3, moved=1),
    Case("mobilenet_v2", "bfloat16", False, launches=107, temporaries=12.7, moved=1),
    # Heads are transposed before and after attention.
    Case("vit", "float32", False, launches=62, temporaries=7.2, moved=13),
]

TRAINING = [
    # The program reads and writes weights as they are stacked: their layouts are no choice of the compiler.
    Case("mlp", "float32", False, launches=26, temporaries=0.34, moved=1, moved_weights=1),
    Case("mlp", "float32", True, launches=24, temporaries=0.05),
    Case("mlp", "bfloat16", False, launches=27, temporaries=2.1, moved=2, moved_weights=1),
    Case("cnn", "float32", False, launches=41, temporaries=536.3, moved=3, moved_weights=2),
    Case("cnn", "float32", True, launches=42, temporaries=538.3, moved=4, moved_weights=2),
    Case("cnn", "bfloat16", False, launches=41, temporaries=315.3, moved=3, moved_weights=2),
    Case("resnet18", "float32", False, launches=405, temporaries=63.5, moved=22, moved_weights=21),
    Case("mobilenet_v2", "float32", False, launches=1026, temporaries=76.7, moved=53, moved_weights=52),
]

FEW = ("mlp-float32-same", "mlp-float32-each", "mlp-bfloat16-same", "cnn-float32-same", "cnn-bfloat16-same")
"""The cases of `make test`. The others are marked `further`."""


def _params(cases: list[Case]) -> list[object]:
    marks = {False: [pytest.mark.further], True: []}
    return [pytest.param(case, id=str(case), marks=marks[str(case) in FEW]) for case in cases]


@pytest.fixture(autouse=True, scope="module")
def as_users_compile() -> Iterator[None]:
    """Has XLA run all its passes, and products in the precision of JAX, which other tests change."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.default_matmul_precision(None):  # type: ignore[arg-type]
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def _ported(name: str) -> Ensemble:
    make, members, shape = NETWORKS[name]
    torch.manual_seed(0)
    return torch_bridge.to_ensemble(varied(make(), members), (torch.zeros(shape),), check=False)


def _inputs(case: Case) -> tuple[jax.Array]:
    _, members, shape = NETWORKS[case.network]
    return (jnp.zeros((members, *shape) if case.each else shape, case.dtype),)


def _check(found: Contents, case: Case) -> None:
    assert found.loops == 0
    assert found.launches <= case.launches, found.thunks
    assert len(found.moved) <= case.moved, found.moved
    assert len(found.moved_weights) <= case.moved_weights, found.moved_weights
    assert found.temporaries <= case.temporaries * 1e6


@pytest.mark.parametrize("case", _params(FORWARD))
def test_a_call(case: Case) -> None:
    found = gpu_programs.forward(_ported(case.network).astype(case.dtype), _inputs(case), each=case.each)
    _check(found, case)


@pytest.mark.parametrize("case", _params(TRAINING))
def test_a_training_step(case: Case) -> None:
    found = gpu_programs.training_step(_ported(case.network).astype(case.dtype), _inputs(case), each=case.each)
    _check(found, case)


def test_few_kernels_are_one_graph_under_a_compiler_of_a_plan() -> None:
    case = FORWARD[0]
    found = [
        gpu_programs.forward(_ported(case.network), _inputs(case), plan=Plan(compiler=name))
        for name in (None, "graphs")
    ]
    assert [(contents.launches, contents.graphs, contents.outside) for contents in found] == [(4, 0, 4), (4, 1, 0)]


def test_a_loop_of_the_host_is_found() -> None:
    case = FORWARD[0]
    found = gpu_programs.forward(_ported("mlp"), _inputs(case), plan=Plan(members=1))
    assert found.loops == 1
    assert found.launches > case.launches
