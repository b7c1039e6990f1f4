"""Ensembles over the devices of several processes: the same numbers as in one process."""

import itertools
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxensemble import Ensemble, verify
from tests.helpers import hosts
from tests.helpers.artifacts import SAVED

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices; the tests' settings make four CPUs")

RUNS = [
    (2, [3]),
    pytest.param(2, [8], marks=pytest.mark.further),
    pytest.param(4, [3, 8], marks=pytest.mark.further),
]
"""Numbers of processes, with numbers of members: those that the devices do not divide, and that they do."""

SUMMED = ("classification", "regression", "batch")
"""Beginnings of the names of arrays that are sums over members: processes may add in another order than one does."""

HEARTBEAT = 8
"""Seconds without a sign of life after which a process counts as dead."""


def joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of all processes; those that several have must be the same in all."""
    whole: dict[str, np.ndarray] = {}
    for name, array in itertools.chain.from_iterable(part.items() for part in found):
        np.testing.assert_array_equal(whole.setdefault(name, array), array, err_msg=name)
    return whole


def is_summed(name: str) -> bool:
    return name.split(" ", 1)[1].startswith(SUMMED)


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        if is_summed(name):
            # A sum of 8 numbers below 1 in another order differs by at most 7 roundings, of 2**-24 each.
            np.testing.assert_allclose(array, wanted[name], rtol=0, atol=7 * 2**-24, err_msg=name)
        else:
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Compares with one device, whose program sums the products of more members at once, as in the tests of meshes."""
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=2e-5, atol=2e-6, err_msg=name)


def run_in_one(work: str, folder: Path, count: int, **settings: Any) -> dict[str, np.ndarray]:
    """The arrays that one process finds, with as many devices as `count` processes have."""
    devices = count * hosts.DEVICES
    if devices == jax.device_count():
        return hosts.run_cases(work, hosts.mesh_of_all(), folder, **settings)
    return hosts.run(1, work, folder, devices=devices, **settings)[0]


def net_of(members: int) -> Ensemble:
    ensemble = Ensemble.load(SAVED / "net")
    return ensemble if members == 3 else Ensemble.concatenate([ensemble, ensemble, ensemble[:2]])


@pytest.mark.parametrize(("count", "cases"), RUNS)
def test_numbers_are_those_of_one_process(tmp_path: Path, count: int, cases: list[int]) -> None:
    for members in cases:
        net_of(members).save(tmp_path / f"net-{members}")
    parts = hosts.run(count, "everything", tmp_path, cases=cases)
    found = joined(parts)
    same(found, run_in_one("everything", tmp_path, count, cases=cases))
    close(found, hosts.run_cases("everything", None, tmp_path, cases=cases))
    summed = {name for name in found if is_summed(name)}
    assert all(summed <= part.keys() for part in parts)  # every process has every prediction
    for members in cases:
        saved, again = tmp_path / f"net-{members}", tmp_path / f"again-{members}-{count}"
        for name in ("weights.safetensors", "network.json", "source.py"):
            assert (again / name).read_bytes() == (saved / name).read_bytes()
        assert verify(again).proof == verify(saved).proof


def ran(folder: Path, devices: int | None, epochs: int = 8) -> dict[str, np.ndarray]:
    """The arrays of a run of `fit` in this process, which goes on from the checkpoints in a folder."""
    mesh = None if devices is None else jax.make_mesh((devices,), ("members",))
    return hosts.run_cases("resume", mesh, folder, [3], epochs=epochs)


@pytest.mark.further
@pytest.mark.parametrize(
    ("count", "sign"),
    [
        (2, signal.SIGKILL),
        (2, signal.SIGSTOP),  # alive, and silent
        (4, signal.SIGKILL),
    ],
)
def test_a_dead_process_ends_the_others(tmp_path: Path, count: int, sign: signal.Signals) -> None:
    processes = hosts.start(
        count, work="resume", folder=str(tmp_path), cases=[3], epochs=8, end=[1, 3, sign], heartbeat=HEARTBEAT
    )
    others = [process for k, process in enumerate(processes) if k != 1]
    try:
        ends = hosts.wait(others, 120)
    finally:
        processes[1].kill()
        processes[1].communicate()
    for code, errors in ends:
        assert code not in (0, None)
        assert "heartbeat" in errors or "Gloo" in errors or "died" in errors, errors
    assert sorted(path.name for path in (tmp_path / "run-3").iterdir() if path.name.isdigit()) == ["2", "3"]
    wanted = ran(tmp_path / "whole", 4)
    for name, devices in {"mesh": 4, "fewer": 2, "alone": None}.items():
        shutil.copytree(tmp_path / "run-3", tmp_path / name / "run-3")
        close(ran(tmp_path / name, devices), wanted)


@pytest.mark.further
def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    hosts.run(4, "resume", tmp_path, cases=[3, 8], epochs=3)
    found = joined(hosts.run(2, "resume", tmp_path, cases=[3, 8], epochs=8))
    close(found, hosts.run_cases("resume", None, tmp_path / "whole", [3, 8], epochs=8))
    again = joined(hosts.run(2, "resume", tmp_path, cases=[3, 8], epochs=8))  # of a run that is at its end
    same(again, found)
