"""Examples run, and print what they are meant to show."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import torch_bridge
from tests.helpers.artifacts import ROOT, run_without_torch
from torch_bridge.demo import SimpleMLP

EXAMPLES = ROOT / "examples"


def test_serving_needs_no_torch(tmp_path: Path) -> None:
    models = [SimpleMLP().eval() for _ in range(2)]
    torch_bridge.to_ensemble(models, (torch.randn(4, 1, 28, 28),)).save(tmp_path / "digits")
    script = "import runpy, sys\nsys.argv[0] = sys.argv.pop(1)\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_without_torch(script, str(EXAMPLES / "serve_without_torch.py"), str(tmp_path / "digits"))
    assert done.returncode == 0, done.stderr
    assert "Ensemble(2 x SimpleMLP" in done.stdout and "\nverified against PyTorch" in done.stdout
    assert "unsure by, in nats:" in done.stdout


def test_a_ported_network_in_ones_own_flax_code(capfd: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "in_your_own_flax_code.py"), run_name="__main__")
    out = capfd.readouterr().out
    before, after = (float(text) for text in out.partition("loss: ")[2].splitlines()[0].split(" -> "))
    assert after < before / 2
    assert "restored: True" in out and "'kernel': (3, 4, 16)" in out


def test_training_over_all_devices(tmp_path: Path) -> None:
    script = "import runpy, sys\nsys.argv[0] = sys.argv.pop(1)\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_without_torch(script, str(EXAMPLES / "many_hosts.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "One process: " in done.stdout and "16 members on 1 devices of 1 processes" in done.stdout
    assert float(done.stdout.split()[-1]) > 0.9
    assert (tmp_path / "run" / "5").is_dir()


def test_processes_of_a_cluster_do_not_train_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # without the other variables, by which JAX knows Open MPI
    script = "import runpy, sys\nsys.argv[0] = sys.argv.pop(1)\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_without_torch(script, str(EXAMPLES / "many_hosts.py"), str(tmp_path))
    assert done.returncode == 1 and "OMPI_COMM_WORLD_SIZE is set, but JAX has not found" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_deep_ensemble_learns_as_well_as_pytorchs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(EXAMPLES / "deep_ensemble.py")
    monkeypatch.setattr(sys, "argv", [path, "--epochs", "5"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(path, run_name="__main__")
    out = capfd.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("accuracy "))
    untrained, theirs, ours, _, both = (float(part) for part in line.split()[-9::2])
    assert untrained < 0.5 and min(theirs, ours, both) > 0.9, out


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in here] == []
