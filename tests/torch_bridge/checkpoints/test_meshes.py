"""Checkpoint files that are read onto a mesh of devices."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxensemble import Ensemble, InputError
from jaxensemble.devices.placement import Placement
from tests.helpers.training import same_bits
from tests.torch_bridge.checkpoints.test_checkpoints import X, net, saved, states
from torch_bridge.checkpoints import load_ensemble as load
from torch_bridge.checkpoints import member_files

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices; the tests' settings make four CPUs")


def mesh(*shape: int) -> Any:
    return jax.make_mesh(shape, ("members", "rows")[: len(shape)])


def load_ensemble(*arguments: Any, **options: Any) -> Ensemble:
    """Loads with the same buffers where the file has none: the factory draws them."""
    torch.manual_seed(1)
    return load(*arguments, **options)


@pytest.mark.parametrize(("members", "shape"), [(3, (4,)), (4, (4,)), (3, (2, 2))])
def test_members_are_read_onto_their_devices(tmp_path: Path, members: int, shape: tuple[int, ...]) -> None:
    paths, rows = saved(tmp_path, states(members=members)), None if len(shape) == 1 else "rows"
    wanted = load_ensemble(net, paths, (X,)).over(mesh(*shape), rows=rows)
    found = load_ensemble(net, paths, (X,), mesh=mesh(*shape), rows=rows)
    assert found.placement == wanted.placement and len(found) == members
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    same_bits(found, wanted)
    assert [leaf.sharding for leaf in jax.tree.leaves(found)] == [leaf.sharding for leaf in jax.tree.leaves(wanted)]
    assert found.proof is not None and wanted.proof is not None
    assert found.proof.comparisons == wanted.proof.comparisons and found.sources == wanted.sources
    x = torch.cat([X] * 2)
    np.testing.assert_array_equal(found(x), wanted(x))


def one_of_several(monkeypatch: pytest.MonkeyPatch, members: list[int]) -> None:
    """Has the placement say that this process has some members alone, as one of several processes does."""
    monkeypatch.setattr(Placement, "own_members", property(lambda self: members))
    monkeypatch.setattr(Placement, "is_local", property(lambda self: False))


def test_a_process_reads_the_files_of_its_own_members_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, read = saved(tmp_path, states(members=4)), list[str]()
    whole = load_ensemble(net, paths, (X,), check=False)
    one_of_several(monkeypatch, [1, 2])
    for path in (paths[0], paths[3]):
        path.unlink()  # on another machine
    of_file = member_files.read_state_dict
    monkeypatch.setattr(
        member_files, "read_state_dict", lambda file, *others: read.append(file.name) or of_file(file, *others)
    )
    given: list[Any] = []

    def assemble(self: Placement, values: np.ndarray) -> jax.Array:
        given.append(values)
        return jax.numpy.zeros((self.slots, *values.shape[1:]), values.dtype)

    monkeypatch.setattr(Placement, "assemble", assemble)
    ensemble = load_ensemble(net, paths, (X,), check=False, mesh=mesh(4))
    assert set(read) == {"member1.pt", "member2.pt"}
    assert ensemble.sources is None and ensemble.proof is None
    wanted = [np.asarray(leaf)[1:3] for leaf in jax.tree.leaves((whole.params, whole.buffers))]
    assert sorted(values.tobytes() for values in given) == sorted(values.tobytes() for values in wanted)


def test_members_of_several_processes_are_named_and_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = saved(tmp_path, states(members=4))
    paths[2].write_bytes(b"no checkpoint")
    one_of_several(monkeypatch, [1, 2])
    with pytest.raises(InputError, match="`check` must be False where members are in several processes"):
        load_ensemble(net, paths, (X,), mesh=mesh(4))
    with pytest.raises(InputError, match=r"member 2 \(member2.pt\)"):
        load_ensemble(net, paths, (X,), check=False, mesh=mesh(4))


def test_wrong_meshes_are_refused(tmp_path: Path) -> None:
    paths = saved(tmp_path, states())
    with pytest.raises(InputError, match="different axes of the mesh, which are members"):
        load_ensemble(net, paths, (X,), mesh=mesh(4), members="m")
    with pytest.raises(InputError, match="`paths` must name at least one file"):
        load_ensemble(net, [], (X,), mesh=mesh(4))
