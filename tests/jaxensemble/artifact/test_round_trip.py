"""Saving and loading: everything comes back bit for bit, without PyTorch, and PyTorch's keys are still known."""

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jaxensemble
from jaxensemble import Ensemble, InputError, NarrowIntegerWarning, StateError
from jaxensemble.artifact import Artifact
from jaxensemble.artifact.description import describe, describe_in_text
from jaxensemble.files import durable
from jaxensemble.modules.state import flatten, split, unflatten
from jaxensemble.network.proof import Lineage
from tests.helpers.artifacts import SAVED, X, run_without_torch, same_bits


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble.load(SAVED / "net")


@pytest.fixture(scope="module")
def folder(ensemble: Ensemble, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "net"
    ensemble.save(folder)
    return folder


def reloaded(ensemble: Ensemble, folder: Path) -> Ensemble:
    ensemble.save(folder / "again")
    return Ensemble.load(folder / "again")


def test_everything_comes_back(ensemble: Ensemble, folder: Path) -> None:
    loaded = Ensemble.load(folder)
    assert same_bits(loaded, ensemble)
    assert ensemble.constants and ensemble.rngs and ensemble.buffers
    for name in ("graphdef", "network", "origin", "proof"):
        assert getattr(loaded, name) == getattr(ensemble, name), name
    np.testing.assert_array_equal(loaded(X), ensemble(X))
    assert loaded.source() == ensemble.source() == (folder / "source.py").read_text()


LOAD = """
import sys
import numpy as np
from jaxensemble import Ensemble

ensemble = Ensemble.load(sys.argv[1])
np.save(sys.argv[3], np.asarray(ensemble(np.load(sys.argv[2]))))
print(len(ensemble), ensemble.origin.weights.by_key["fc.weight"].keys)
print(ensemble.source(), end="")
assert "torch" not in sys.modules
"""


def test_without_torch_it_loads_predicts_the_same_bits_and_prints_its_source(
    ensemble: Ensemble, folder: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", X)
    done = run_without_torch(LOAD, str(folder), str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "y.npy").tobytes() == np.asarray(ensemble(X)).tobytes()
    assert done.stdout == "3 ('fc.weight', 'tied.weight')\n" + ensemble.source()


def test_the_process_without_torch_has_none() -> None:
    assert "torch is blocked" in run_without_torch("import torch").stderr


# modes and random state


def test_modes_and_random_state_come_back(ensemble: Ensemble, tmp_path: Path) -> None:
    training = ensemble.train()
    loaded = reloaded(training, tmp_path)
    assert loaded.graphdef == training.graphdef != ensemble.graphdef
    key = jax.random.key(7)
    np.testing.assert_array_equal(loaded(X, key=key), training(X, key=key))
    assert loaded.eval().graphdef == ensemble.graphdef


def test_what_is_in_training_mode_is_told(ensemble: Ensemble, folder: Path, tmp_path: Path) -> None:
    ensemble.train().save(tmp_path / "training")
    artifact = Artifact.open(tmp_path / "training")
    assert describe(artifact)["training"] == list(ensemble.train().graphdef.training_layers()) != []
    assert "\nin training mode: bn" in describe_in_text(artifact)
    assert "what was verified is evaluation mode" not in describe_in_text(artifact)
    ensemble.train().proven(ensemble.proof).save(tmp_path / "proven")
    assert "; what was verified is evaluation mode\n" in describe_in_text(Artifact.open(tmp_path / "proven"))
    assert describe(Artifact.open(folder))["training"] == []


def test_one_layer_in_another_mode_comes_back(ensemble: Ensemble, tmp_path: Path) -> None:
    module = ensemble[0]
    module.bn.train()
    mixed = dataclasses.replace(ensemble, graphdef=split(module).graphdef)
    assert mixed.graphdef not in (ensemble.graphdef, ensemble.train().graphdef)
    assert reloaded(mixed, tmp_path).graphdef == mixed.graphdef


def test_keys_of_another_generator_come_back(ensemble: Ensemble, tmp_path: Path) -> None:
    def other(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf + 5
        return jax.random.split(jax.random.key(3, impl="rbg"), leaf.shape)

    changed = dataclasses.replace(ensemble, rngs=jax.tree.map(other, ensemble.rngs))
    assert same_bits(reloaded(changed, tmp_path), changed)


# dtypes


DTYPES = [
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool", "complex64",
]  # fmt: skip
WIDE = ["float64", "int64", "uint64"]


def of_dtype(ensemble: Ensemble, name: str) -> Ensemble:
    """The ensemble with random bits of a dtype, NaNs of all kinds among them, for one buffer."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    bits = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, (3, 4 * dtype.itemsize), np.uint8)
    return dataclasses.replace(
        ensemble, buffers=unflatten(flatten(ensemble.buffers) | {"mask": jnp.asarray(bits.view(dtype))})
    )


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(ensemble: Ensemble, name: str, tmp_path: Path) -> None:
    changed = of_dtype(ensemble, name)
    assert str(changed.buffers["mask"].dtype) == name
    assert same_bits(reloaded(changed, tmp_path), changed)


@pytest.mark.parametrize("name", WIDE)
def test_wide_dtypes_come_back(ensemble: Ensemble, name: str, tmp_path: Path, x64: None) -> None:
    changed = of_dtype(ensemble, name)
    assert same_bits(reloaded(changed, tmp_path), changed)


def test_without_x64_float64_is_refused_and_integers_never_wrap(ensemble: Ensemble, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        of_dtype(ensemble, "float64").save(tmp_path / "floats")
        small = dataclasses.replace(ensemble, buffers={**ensemble.buffers, "mask": jnp.full((3, 4), 7, jnp.int64)})
        small.save(tmp_path / "small")
        large = dataclasses.replace(ensemble, buffers={**ensemble.buffers, "mask": jnp.full((3, 4), 2**32, jnp.int64)})
        large.save(tmp_path / "large")
    with pytest.raises(InputError, match=r"(?s)holds of mask is float64.*enable 64-bit types"):
        Ensemble.load(tmp_path / "floats")
    with pytest.warns(NarrowIntegerWarning):
        loaded = Ensemble.load(tmp_path / "small").buffers["mask"]
    assert loaded.dtype == jnp.int32 and (loaded == 7).all()
    with pytest.raises(InputError, match=r"mask.*holds 4294967296"):
        Ensemble.load(tmp_path / "large")


def test_counters_that_were_64_bits_wide_are_taken_without_x64() -> None:
    with pytest.warns(NarrowIntegerWarning):
        buffers = Ensemble.load(SAVED / "net64").buffers
    assert buffers["bn"]["num_batches_tracked"].dtype == jnp.int32
    manifest = json.loads((SAVED / "net64/manifest.json").read_text())
    assert manifest["leaves"]["bn.num_batches_tracked"]["dtype"] == "int64"


def test_what_was_proven_with_64_bits_is_not_proven_without(tmp_path: Path) -> None:
    ids = np.arange(1, 7).reshape(2, 3)
    with jax.enable_x64(True):
        ensemble = Ensemble.load(SAVED / "hashing")
        expected = ensemble(ids)
    assert ensemble.proof is not None and ensemble.proof.x64
    ensemble.save(tmp_path / "net")  # arrays from outside
    with pytest.warns(NarrowIntegerWarning, match="was saved with JAX's 64-bit types on, and they are off"):
        assert Ensemble.load(tmp_path / "net").proof is None
    with jax.enable_x64(True):
        loaded = Ensemble.load(tmp_path / "net")
        assert loaded.proof == ensemble.proof
        np.testing.assert_array_equal(loaded(ids), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_embeddings_of_another_dtype_come_back(dtype: str, tmp_path: Path) -> None:
    ids = np.arange(4).reshape(2, 2)
    ensemble = Ensemble.load(SAVED / "words")
    with jax.enable_x64(dtype == "float64"):
        cast = ensemble.astype(dtype)
        loaded = reloaded(cast, tmp_path)
        assert loaded.graphdef == cast.graphdef and same_bits(loaded, cast)
        assert loaded(ids).dtype == dtype
    assert cast.astype("float32").graphdef == ensemble.graphdef


def test_dtypes_that_safetensors_lacks_are_refused(ensemble: Ensemble, tmp_path: Path) -> None:
    odd = dataclasses.replace(ensemble, buffers={**ensemble.buffers, "mask": jnp.zeros((3, 4), jnp.int4)})
    with pytest.raises(StateError, match=r"no dtype for these arrays: mask \(int4\)"):
        odd.save(tmp_path / "odd")
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_weights_keep_their_bits(ensemble: Ensemble, tmp_path: Path) -> None:
    params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), ensemble.params)
    changed = dataclasses.replace(ensemble, params=params)
    assert same_bits(reloaded(changed, tmp_path), changed)


# files that others read


def test_the_weights_are_a_safetensors_file_with_paths_for_keys(ensemble: Ensemble, folder: Path) -> None:
    arrays = safetensors.numpy.load_file(folder / "weights.safetensors")
    for name, leaf in (flatten(ensemble.params) | flatten(ensemble.buffers) | flatten(ensemble.constants)).items():
        np.testing.assert_array_equal(arrays.pop(name), leaf)
    assert all(name.startswith("drop.rngs.") for name in arrays)


def test_the_manifest_tells_versions_members_kinds_and_proof(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 1 and manifest["members"] == 3 and manifest["verified"] is True
    assert set(manifest["versions"]) == {"jaxensemble", "jax", "flax"}
    assert manifest["leaves"]["conv.kernel"]["kind"] == "params"
    assert manifest["leaves"]["bn.mean"]["kind"] == "buffers"
    assert {row["stage"] for row in manifest["proof"]["comparisons"]} >= {"weights", "float64, each its own"}
    assert ["fc.weight", "tied.weight"] in [entry["keys"] for entry in manifest["origin"]["weights"]["entries"]]
    assert {file.name for file in folder.iterdir()} == {*manifest["files"], "manifest.json"}


def test_verify_returns_the_manifest(folder: Path) -> None:
    manifest = jaxensemble.verify(folder)
    assert manifest.members == 3 and manifest.verified and manifest.proof is not None


# the proof


CHANGES: dict[str, Any] = {
    "slice": lambda e: e[:2],
    "concatenate": lambda e: Ensemble.concatenate([e, e]),
    "tree map": lambda e: jax.tree.map(lambda leaf: leaf, e),
    "astype": lambda e: e.astype(jnp.bfloat16),
    "train": lambda e: e.train(),
    "update": lambda e: e.update(X)[1],
    "replace": lambda e: dataclasses.replace(e, params=e.params),
    "gradients": lambda e: jax.grad(lambda e: e(X).sum(), allow_int=True)(e),
    "round trip through jit": lambda e: jax.jit(lambda e: e)(e),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_has_no_proof(ensemble: Ensemble, change: str) -> None:
    assert ensemble.proof is not None
    assert CHANGES[change](ensemble).proof is None


LOST = {"tree map", "replace", "gradients", "round trip through jit"}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_knows_the_proof_of_what_it_was_made_from(ensemble: Ensemble, change: str) -> None:
    lineage = CHANGES[change](ensemble).lineage
    assert ensemble.lineage is None
    assert lineage == (None if change in LOST else Lineage(ensemble.proof, trained=False))  # type: ignore[arg-type]
    assert CHANGES[change](ensemble.proven(None)).lineage is None


def test_a_lineage_is_saved_and_outlives_further_changes(ensemble: Ensemble, tmp_path: Path) -> None:
    trained = ensemble.with_params(jax.tree.map(lambda leaf: leaf + 1, ensemble.params)).trained_from(ensemble)
    changed = copy.deepcopy(pickle.loads(pickle.dumps(trained.eval()[:2].tune(X))))
    loaded = reloaded(changed, tmp_path)
    assert ensemble.proof is not None and loaded.proof is None
    assert loaded.lineage == trained.lineage == Lineage(ensemble.proof, trained=True)
    artifact = Artifact.open(tmp_path / "again")
    text = "trained from a verified port, NOT verified since: the port was verified against PyTorch on "
    assert (
        text + ensemble.proof.date in describe_in_text(artifact) and describe(artifact)["trained_from_verified"] is True
    )
    assert Ensemble.concatenate([loaded, loaded]).lineage == loaded.lineage
    assert Ensemble.concatenate([loaded, ensemble]).lineage is None  # one of the two was trained
    proven = trained.proven(ensemble.proof)  # as if it had been compared again
    proven.save(tmp_path / "again", force=True)
    again = Ensemble.load(tmp_path / "again")
    assert again.proof == ensemble.proof and again.lineage == trained.lineage
    assert again[:1].lineage == Lineage(ensemble.proof, trained=False)


def test_artifacts_without_a_lineage_or_sources_are_read(folder: Path) -> None:
    """Saved ensembles of older versions have no lineage."""
    assert {"lineage", "sources"}.isdisjoint(json.loads((SAVED / "net" / "manifest.json").read_text()))
    assert json.loads((folder / "manifest.json").read_text())["lineage"] is None
    ensemble = Ensemble.load(SAVED / "net")
    assert ensemble.lineage is None and ensemble.sources is None


def test_what_was_changed_in_place_has_no_proof(ensemble: Ensemble, tmp_path: Path) -> None:
    proven = jax.tree.map(jnp.copy, ensemble).proven(ensemble.proof)
    assert proven.proof == ensemble.proof
    before = proven.params["fc"]["kernel"]
    proven.params["fc"]["kernel"] = before + 1
    assert reloaded(proven, tmp_path).proof is None
    proven.params["fc"]["kernel"] = before
    assert proven.proof == ensemble.proof


def test_an_unproven_ensemble_is_saved_as_such(ensemble: Ensemble, tmp_path: Path) -> None:
    loaded = reloaded(ensemble[:2], tmp_path)
    assert loaded.proof is None and len(loaded) == 2
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["verified"] is False


def test_members_of_unequal_proofs_go_together(ensemble: Ensemble) -> None:
    doubled = jax.tree.map(lambda a, b: a, ensemble, ensemble.proven(None))
    assert len(doubled) == 3
    assert len(Ensemble.concatenate([ensemble, ensemble.proven(None)])) == 6


# places where an ensemble can be saved


def test_flax_modules_are_refused_with_what_to_do(tmp_path: Path) -> None:
    ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(2)])
    with pytest.raises(StateError, match="orbax"):
        ensemble.save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_structure_that_is_not_the_networks_is_refused(ensemble: Ensemble, tmp_path: Path) -> None:
    module = ensemble[0]
    module.drop.rate = 0.25
    with pytest.raises(StateError, match="no longer that of its network"):
        dataclasses.replace(ensemble, graphdef=split(module).graphdef).save(tmp_path / "net")


def test_arrays_of_other_shapes_are_refused(ensemble: Ensemble, tmp_path: Path) -> None:
    params = unflatten(flatten(ensemble.params) | {"conv.bias": jnp.zeros((3, 5)), "tied.bias": jnp.zeros((3, 1))})
    with pytest.raises(StateError, match=r"'conv.bias': expected params \[3, 3\], got params \[3, 5\]\n.*tied.bias"):
        dataclasses.replace(ensemble, params=params).save(tmp_path / "net")


def test_what_exists_is_replaced_only_when_asked(ensemble: Ensemble, tmp_path: Path) -> None:
    target = tmp_path / "net"
    ensemble.save(target)
    with pytest.raises(InputError, match="exists: force=True"):
        ensemble[:1].save(target)
    assert len(Ensemble.load(target)) == 3
    ensemble[:1].save(target, force=True)
    assert len(Ensemble.load(target)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]


def test_a_loaded_ensemble_is_saved_where_it_came_from(ensemble: Ensemble, tmp_path: Path) -> None:
    ensemble.save(tmp_path / "net")
    loaded = Ensemble.load(tmp_path / "net")
    loaded.save(tmp_path / "net", force=True)
    assert same_bits(Ensemble.load(tmp_path / "net"), ensemble)


def test_nothing_but_an_artifact_is_ever_replaced(ensemble: Ensemble, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for force in (False, True):
        with pytest.raises(InputError, match=r"no artifact, but holds thesis\.tex"):
            ensemble.save(home, force=force)
        with pytest.raises(InputError, match="is a file"):
            ensemble.save(tmp_path / "file", force=force)
        with pytest.raises(InputError, match="there is no directory"):
            ensemble.save(tmp_path / "no" / "net", force=force)
    assert (home / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("force", [False, True])
def test_what_comes_while_it_is_saved_is_kept(
    ensemble: Ensemble, tmp_path: Path, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, target = durable.write_new_file, tmp_path / "net"

    def meanwhile(path: Path, chunks: Any) -> tuple[int, str]:
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("years of work")
        return write(path, chunks)

    monkeypatch.setattr(durable, "write_new_file", meanwhile)
    with pytest.raises(InputError, match="is not replaced"):
        ensemble.save(target, force=force)
    assert (target / "thesis.txt").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [target] and len(list(target.iterdir())) == 1


def test_an_empty_directory_is_taken_and_a_link_is_followed(ensemble: Ensemble, tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    ensemble.save(tmp_path / "net")
    (tmp_path / "link").symlink_to("net")
    ensemble[:1].save(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and len(Ensemble.load(tmp_path / "net")) == 1


def test_a_copy_of_the_directory_is_as_good(folder: Path, tmp_path: Path, ensemble: Ensemble) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert same_bits(Ensemble.load(tmp_path / "copy"), ensemble)
