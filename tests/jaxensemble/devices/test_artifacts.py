"""Artifacts read onto a mesh, and saved from one."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxensemble import Ensemble, InputError, verify
from jaxensemble.artifact import weights
from jaxensemble.devices.placement import Placement
from jaxensemble.modules.state import KINDS
from tests.helpers.artifacts import SAVED, X
from tests.helpers.training import same_bits
from tests.jaxensemble.devices.test_over import mesh

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices; the tests' settings make four CPUs")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Three members, saved by this version: the artifact in `tests/saved` has no hash for each member."""
    Ensemble.load(SAVED / "net").save(tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize("devices", [4, 3, 2, 1])
def test_members_are_read_onto_their_devices(saved: Path, devices: int) -> None:
    ensemble, spread = Ensemble.load(saved), Ensemble.load(saved, mesh(devices))
    assert len(spread) == 3 and spread.placement == ensemble.over(mesh(devices)).placement
    assert spread.proof == ensemble.proof is not None and spread.sources == ensemble.sources
    back = spread.over(None)
    same_bits(back, ensemble)
    np.testing.assert_allclose(spread(X), ensemble(X), rtol=1e-5, atol=1e-6)


def test_an_artifact_saved_from_a_mesh_is_the_same(saved: Path, tmp_path: Path) -> None:
    Ensemble.load(saved).over(mesh()).save(tmp_path / "again")
    for name in ("weights.safetensors", "network.json", "source.py"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert verify(tmp_path / "again") == verify(saved)


def own_members(monkeypatch: pytest.MonkeyPatch, members: list[int]) -> None:
    """Has the placement say that this process has some members alone, as one of several processes does."""
    monkeypatch.setattr(Placement, "own_members", property(lambda self: members))
    monkeypatch.setattr(Placement, "assemble", lambda self, values: jax.numpy.asarray(values))


def test_a_process_reads_the_bytes_of_its_own_members_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = dict.fromkeys(KINDS, 0)
    for record in verify(saved).leaves.values():
        sizes[record.kind] += int(np.prod(record.stored[1])) * np.dtype(record.stored[0]).itemsize
    shared = sizes.pop("constants")
    read: list[int] = []
    into = weights._read_into
    monkeypatch.setattr(weights, "_read_into", lambda file, data: read.append(data.nbytes) or into(file, data))
    own_members(monkeypatch, [1])
    Ensemble.load(saved, mesh(1))
    assert sum(read) == shared + sum(sizes.values()) // 3


def test_a_damaged_member_is_named_where_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((saved / "weights.safetensors").read_bytes())
    content[-1] ^= 1  # of the last member
    (saved / "weights.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="the bytes of member 2 are not those that were saved"):
        Ensemble.load(saved, mesh())
    own_members(monkeypatch, [0, 1])
    Ensemble.load(saved, mesh(1))


def test_older_artifacts_say_what_to_do() -> None:
    with pytest.raises(InputError, match="was saved by an older version, without a hash for each member: load it"):
        Ensemble.load(SAVED / "net", mesh())


@pytest.mark.parametrize("change", [lambda hashes: hashes[:2], lambda hashes: ["0"] * 3, lambda hashes: "abc"])
def test_wrong_hashes_of_members_are_refused(saved: Path, tmp_path: Path, change: Any) -> None:
    from jaxensemble.artifact.manifest import _digest

    shutil.copytree(saved, tmp_path / "wrong")
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["member_hashes"] = change(manifest["member_hashes"])
    (tmp_path / "wrong" / "manifest.json").write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))
    with pytest.raises(InputError, match="member_hashes"):
        Ensemble.load(tmp_path / "wrong")
