"""Unattended runs on a GPU: the script's steps are complete, and its networks are the well-known ones."""

import re
import subprocess
from pathlib import Path

import pytest
from torch import nn

from benchmarks.speed.machine import main
from benchmarks.speed.networks import OWN
from benchmarks.speed.suites import SUITES
from torch_bridge.timing.variants import torch_variants

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def test_the_script_is_sound_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_step_names_what_exists() -> None:
    steps = re.search(r'^steps="\n(.*?)^"', SCRIPT.read_text(), re.DOTALL | re.MULTILINE)
    assert steps
    lines = [line.split() for line in steps[1].splitlines()]
    assert [name for name, *_ in lines[:2]] == ["machine", "tests"]
    assert all(limit.isdigit() for _, limit, *_ in lines)
    suites = [arguments[1] for _, _, *arguments in lines if arguments[0] == "$timing"]
    assert suites and set(suites) <= set(SUITES)
    assert (ROOT / "tests/torch_bridge/test_gpu.py").exists()


@pytest.mark.parametrize("suite", ["tutorial-short", "images", "training-short"])
def test_a_gpu_has_every_way_of_a_suite(suite: str) -> None:
    known = torch_variants("cuda", images=True)
    assert all(set(case.variants or ()) <= set(known) for case in SUITES[suite])


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_689_512), ("mobilenet_v2", 3_504_872)])
def test_our_networks_have_as_many_parameters_as_torchvisions(name: str, count: int) -> None:
    """https://docs.pytorch.org/vision/stable/models.html"""
    network: nn.Module = OWN[name]()
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_a_machine_is_described_whatever_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tmp_path)
    assert len(list(tmp_path.glob("machine-*.json"))) == 1
    assert "nvidia-smi" in capsys.readouterr().out
