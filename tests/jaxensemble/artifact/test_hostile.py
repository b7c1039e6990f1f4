"""Artifacts from strangers and damaged ones: each error says what is wrong and where, and no code is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import jaxensemble
from jaxensemble import Ensemble, InputError
from jaxensemble.artifact import Artifact
from jaxensemble.artifact.loading import LIMITS
from tests.helpers.artifacts import SAVED, resign, rewrite
from tests.helpers.attacks.artifacts import MANIFESTS, NETWORKS


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "net"
    Ensemble.load(SAVED / "net")[:2].save(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "net"))


def refused(folder: Path, match: str) -> None:
    """Checks that loading and verifying refuse the artifact with the same error."""
    for read in (Ensemble.load, jaxensemble.verify):
        with pytest.raises(InputError, match=match) as caught:
            read(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(folder: Path, case: str) -> None:
    change, match = MANIFESTS[case]
    rewrite(folder, change)
    refused(folder, match)


def test_resigning_an_artifact_leaves_it_sound(folder: Path) -> None:
    rewrite(folder, lambda manifest: None)
    jaxensemble.verify(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "expected format version 1, got None"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 200_000, "no JSON"),
        (b'{"version": 1, "version": 1}', "'version' appears twice"),
        (b'{"version": NaN}', "NaN is no number"),
        (b'{"version": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b" " * (LIMITS["manifest.json"] + 1), "more than 16,777,216 bytes"),
    ],
    ids=["nothing", "cut", "list", "bytes", "deep", "twice", "nan", "long", "big"],
)
def test_what_is_no_manifest_is_refused(folder: Path, text: bytes, match: str) -> None:
    (folder / "manifest.json").write_bytes(text)
    refused(folder, match)


@pytest.mark.parametrize("case", NETWORKS)
def test_a_hostile_network_is_refused(folder: Path, case: str) -> None:
    change, match = NETWORKS[case]
    rewrite(folder, change, "network.json")
    if case == "name":  # the source keeps only letters of the name
        assert "import os" not in Ensemble.load(folder).source()
        return
    refused(folder, match)


def test_the_source_in_the_directory_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    size = (folder / "source.py").stat().st_size
    (folder / "source.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit".ljust(size))
    refused(folder, "source.py: its SHA-256")
    resign(folder)
    assert "open(" not in Ensemble.load(folder).source()
    assert not marker.exists()


# the directory


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no such directory")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "it is no directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "manifest.json is missing; network.json is missing; source.py is missing; weights")


def test_files_that_do_not_belong_there_are_refused(folder: Path) -> None:
    (folder / "__init__.py").write_text("")
    (folder / "more").mkdir()
    refused(folder, "'__init__.py' does not belong there; 'more' does not belong there")


@pytest.mark.parametrize("name", ["manifest.json", "network.json", "source.py", "weights.safetensors"])
def test_links_and_other_things_that_are_no_files_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, f"{name} is a symbolic link")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{name} is no file")
    (folder / name).unlink()
    refused(folder, f"{name} is missing")


# damage


def flipped(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_verify_names_the_damaged_arrays(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    begin = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8:begin])
    for name in ("bn.var", "fc.kernel"):
        flipped(weights, begin + header[name]["data_offsets"][1] - 1, 7)
    refused(folder, r"'(bn.var|fc.kernel)' \(float32\[.*\n.*'(fc.kernel|bn.var)' \(float32\[")


@pytest.mark.parametrize("name", ["manifest.json", "network.json", "source.py", "weights.safetensors"])
def test_any_flipped_bit_is_found(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(len(content), size=40):
        flipped(folder / name, int(position), int(generator.integers(8)))
        with pytest.raises(InputError):
            jaxensemble.verify(folder)
        (folder / name).write_bytes(content)
    jaxensemble.verify(folder)


@pytest.mark.parametrize("name", ["manifest.json", "network.json", "source.py", "weights.safetensors"])
def test_any_cut_or_added_byte_is_found(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for changed in (b"", content[:-1], content[: len(content) // 2], content + b"\0"):
        (folder / name).write_bytes(changed)
        refused(folder, "is no artifact" if name == "manifest.json" else f"is damaged: {name} has .* bytes, not")
    (folder / name).write_bytes(content)
    jaxensemble.verify(folder)


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    arrays = safetensors.numpy.load_file(folder / "weights.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / "weights.safetensors")
    resign(folder)


def test_other_arrays_than_the_manifest_lists_are_refused(folder: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["more"] = arrays.pop("bn.mean")
        arrays["bn.var"] = arrays["bn.var"].astype(np.float64)
        arrays["fc.kernel"] = arrays["fc.kernel"][:1]

    rewritten(folder, change)
    refused(
        folder,
        r"'bn.mean' is missing\n  'more' is not needed\n"
        r"  'fc.kernel': expected float32\[2, 12, 4\], got float32\[1, 12, 4\]\n"
        r"  'bn.var': expected float32\[2, 3\], got float64\[2, 3\]",
    )


def test_arrays_with_other_values_are_refused(folder: Path) -> None:
    rewritten(folder, lambda arrays: arrays.update({"bn.mean": arrays["bn.mean"] + 1}))
    refused(folder, "'bn.mean'.*its bytes are not those that were saved")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"],
    ids=["nothing", "zeros", "ones", "long header", "list"],
)
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "weights.safetensors").write_bytes(content)
    resign(folder)
    refused(folder, "no sound safetensors file")


def test_headers_are_all_that_is_read_to_look_at_an_artifact(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    flipped(weights, weights.stat().st_size - 1)
    assert Artifact.open(folder).manifest.members == 2
    refused(folder, "its bytes are not those that were saved")
