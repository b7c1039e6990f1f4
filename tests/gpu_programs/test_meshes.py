"""Programs for four H200s that are not there: each has its share of the work, and sends nothing to the others."""

import math
import re

import jax.numpy as jnp
import pytest
import torch

import torch_bridge
from benchmarks.zoo.networks import varied
from jaxensemble import Ensemble
from tests.gpu_programs.test_gpu_programs import NETWORKS, as_users_compile
from tests.helpers import gpu_programs
from tests.helpers.gpu_programs import Contents

pytestmark = pytest.mark.skipif(gpu_programs.missing() is not None, reason=str(gpu_programs.missing()))

__all__ = ["as_users_compile"]  # a fixture of this module, too

GPUS = 4
COLLECTIVES = re.compile(r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-\w+)(?:-start)?\(")
FURTHER = pytest.param("resnet18", marks=pytest.mark.further)


def ported(name: str, members: int) -> Ensemble:
    make, _, shape = NETWORKS[name]
    torch.manual_seed(0)
    return torch_bridge.to_ensemble(varied(make(), members), (torch.zeros(shape),), check=False)


def check_share(whole: Contents, alone: Contents) -> None:
    """Checks that the program of one of four GPUs is that of a GPU which has a quarter of the members."""
    assert COLLECTIVES.findall(whole.text) == []
    assert (whole.launches, whole.loops) == (alone.launches, alone.loops)
    assert len(whole.moved) <= len(alone.moved)
    assert whole.temporaries <= alone.temporaries


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn", FURTHER])
def test_a_call(name: str, each: bool) -> None:
    _, _, shape = NETWORKS[name]
    programs = []
    for members, gpus in ((2 * GPUS, GPUS), (2, 1)):
        inputs = (jnp.zeros((members, *shape) if each else shape),)
        programs.append(gpu_programs.forward(ported(name, members), inputs, each=each, gpus=gpus))
    check_share(*programs)


@pytest.mark.parametrize("name", ["mlp", "cnn", FURTHER])
def test_a_training_step(name: str) -> None:
    inputs = (jnp.zeros(NETWORKS[name][2]),)
    check_share(
        gpu_programs.training_step(ported(name, 2 * GPUS), inputs, gpus=GPUS),
        gpu_programs.training_step(ported(name, 2), inputs),
    )


@pytest.mark.parametrize("figure", ["mean", "votes", "predictive_entropy", "expected_entropy", "variance"])
def test_a_prediction_sends_sums_over_members_alone(figure: str) -> None:
    _, _, (rows, *shape) = NETWORKS["mlp"]
    found = gpu_programs.prediction(ported("mlp", 2 * GPUS), (jnp.zeros((rows, *shape)),), figure, gpus=GPUS)
    assert set(COLLECTIVES.findall(found.text)) == {"all-reduce"}
    sent = re.findall(r"= (.*?) all-reduce(?:-start)?\(", found.text)
    numbers = [
        math.prod(map(int, filter(None, size.split(","))))
        for text in sent
        for size in re.findall(r"\[([\d,]*)\]", text)
    ]
    # At most a maximum, two sums [N, C] and the rows that are NaN; outputs are [8, N, C].
    assert sum(numbers) <= 3 * rows * 10 + rows
