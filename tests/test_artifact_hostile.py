"""Artifacts from strangers and damaged ones: each is refused with what is wrong and where, and none runs any code."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from artifacts import ported, resign, rewrite

import jaxensemble
from jaxensemble import Ensemble, InputError
from jaxensemble.artifact import Artifact
from jaxensemble.artifact.loading import LIMITS


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "net"
    ported(2, check=False).save(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "net"))


def refused(folder: Path, match: str) -> None:
    """Loading and verifying refuse the artifact alike."""
    for read in (Ensemble.load, jaxensemble.verify):
        with pytest.raises(InputError, match=match) as caught:
            read(folder)
        assert str(folder) in str(caught.value)


def entry(content: dict[str, Any], path: str) -> dict[str, Any]:
    return next(entry for entry in content["origin"]["weights"]["entries"] if entry["path"] == path)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda m: m.update(version=2), "expected format version 1, got 2"),
    "no version": (lambda m: m.pop("version"), "expected format version 1, got None"),
    "boolean version": (lambda m: m.update(version=True), "expected format version 1, got True"),
    "missing field": (lambda m: m.pop("members"), "`members` is missing"),
    "unknown field": (lambda m: m.update(run="me"), "'run' is not known"),
    "mistyped field": (lambda m: m.update(members="2"), r"manifest.json.members: expected int, got '2'"),
    "path separator": (
        lambda m: m["files"].update({"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        "'../../etc/passwd' is no file of an artifact",
    ),
    "absolute path": (
        lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        "'/etc/passwd' is no file of an artifact",
    ),
    "unlisted file": (lambda m: m["files"].pop("source.py"), "source.py is not listed"),
    "no hash": (lambda m: m["leaves"]["bn.mean"].update(sha256="x"), "'bn.mean': 'x' is no hash"),
    "kind": (lambda m: m["leaves"]["bn.mean"].update(kind="code"), "'bn.mean': expected one of params.*got 'code'"),
    "other kind": (
        lambda m: m["leaves"]["bn.mean"].update(kind="params"),
        r"'bn.mean': expected buffers \[2, 3\], got params \[2, 3\]",
    ),
    "dtype": (lambda m: m["leaves"]["bn.mean"].update(dtype="object"), "'object' is no dtype"),
    "other dtype": (
        lambda m: m["leaves"]["bn.mean"].update(dtype="int32"),
        r"'bn.mean': expected int32\[2, 3\], got float32\[2, 3\]",
    ),
    "keys as weights": (lambda m: m["leaves"]["bn.mean"].update(dtype="key<fry>"), "buffers cannot be random keys"),
    "weights as keys": (
        lambda m: m["leaves"]["drop.rngs.key"].update(dtype="uint32", shape=[2, 2]),
        r"'drop.rngs.key': expected rngs of random keys \[2\], got rngs \[2, 2\]",
    ),
    "negative shape": (lambda m: m["leaves"]["bn.mean"].update(shape=[2, -3]), r"\[2, -3\] is no shape"),
    "huge shape": (lambda m: m["leaves"]["bn.mean"].update(shape=[2, 10**30]), "is no shape"),
    "members": (lambda m: m.update(members=3), r"shape \[2, 3\] does not begin with the 3 members"),
    "no members": (lambda m: m.update(members=0), "at least one member; got 0"),
    "missing leaves": (
        lambda m: [m["leaves"].pop(name) for name in ("fc.kernel", "conv.bias")] and m.update(origin=None),
        r"'fc.kernel' is not needed[\s\S]*'conv.bias' is not needed|'conv.bias' is not needed[\s\S]*'fc.kernel'",
    ),
    "extra leaves": (
        lambda m: m["leaves"].update(a=m["leaves"]["bn.mean"], b=m["leaves"]["bn.mean"]),
        r"'a' is missing\n  'b' is missing",
    ),
    "claimed proof": (lambda m: m.update(verified=True), "`verified` is True, with no proof"),
    "failed proof": (
        lambda m: m.update(
            verified=True,
            proof={
                "date": "",
                "versions": {},
                "comparisons": [{"stage": "s", "case": "c", "error": 1.0, "limit": 0.5}],
                "x64": False,
            },
        ),
        "not passed: 's', 'c'",
    ),
    "proof with 64 bits": (
        lambda m: m.update(
            verified=True,
            proof={
                "date": "",
                "versions": {},
                "comparisons": [{"stage": "s", "case": "c", "error": 0.0, "limit": 0.5}],
                "x64": True,
            },
        ),
        "`x64` is False, with a proof",
    ),
    "empty proof": (
        lambda m: m.update(verified=True, proof={"date": "", "versions": {}, "comparisons": [], "x64": False}),
        "nothing was compared",
    ),
    "permutation": (
        lambda m: entry(m, "fc.kernel")["rearrangement"].update(order=[0, 0]),
        r"'fc.kernel': order \[0, 0\] is no permutation of \d axes",
    ),
    "split": (lambda m: entry(m, "fc.kernel")["rearrangement"].update(split=[7]), r"split \[7\] has not the 48 elem"),
    "flip": (lambda m: entry(m, "fc.kernel")["rearrangement"].update(flipped=[9]), r"flipped \[9\] must be some of"),
    "torch shape": (lambda m: entry(m, "fc.kernel").update(shape=[-4, -12]), r"shape \[-4, -12\] has a negative size"),
    "torch dtype": (lambda m: entry(m, "fc.kernel").update(dtype="qint8"), "'qint8' is no dtype of a tensor"),
    "key twice": (lambda m: entry(m, "fc.kernel").update(keys=["bn.weight", "fc"]), "'bn.weight' is given 2 times"),
    "no key": (lambda m: entry(m, "fc.kernel").update(keys=[]), "a tensor needs a key"),
    "path twice": (lambda m: entry(m, "fc.kernel").update(path="conv.kernel"), "'conv.kernel' is given 2 times"),
    "path of nothing": (lambda m: entry(m, "fc.kernel").update(path="sys.path"), "'sys.path', where there is no"),
    "path of another": (lambda m: entry(m, "shift").update(path="conv.bias"), "is stored|given 2 times"),
    "layout": (lambda m: m["origin"].update(input_layout="__import__"), "input_layout: expected one of torch, NHWC"),
    "batch axis": (lambda m: m["origin"].update(batch_axis="os"), "batch_axis: expected int or a list or null"),
}


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
        (b'{"version": 1, "version": 1}', "'version' stands twice"),
        (b'{"version": NaN}', "NaN is no number"),
        (b'{"version": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b" " * (LIMITS["manifest.json"] + 1), "more than 16,777,216 bytes"),
    ],
    ids=["nothing", "cut", "list", "bytes", "deep", "twice", "nan", "long", "big"],
)
def test_what_is_no_manifest_is_refused(folder: Path, text: bytes, match: str) -> None:
    (folder / "manifest.json").write_bytes(text)
    refused(folder, match)


NETWORKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda n: n.update(format=7), "no network in JSON"),
    "call": (lambda n: n["calls"][-1].update(target="os.system"), "os.system"),
    "layer": (lambda n: n["layers"][0].update(type="nnx.jit"), "nnx.jit"),
    "option": (lambda n: n["layers"][0]["options"].update(in_features="__import__('os')"), "network.json"),
    "name": (lambda n: n.update(name="X:\n  import os\nclass Y"), "network"),
    "shape": (
        lambda n: n["layers"][0]["options"].update(out_features=5),
        r"'conv.bias': expected params \[2, 5\], got params \[2, 3\]",
    ),
    "huge": (lambda n: n["layers"][0]["options"].update(out_features=10**20), "do not fit"),
    "many layers": (
        lambda n: n["layers"][0].update(type="layers.LSTM", options={"num_layers": 10**9}),
        r"`num_layers` of conv: expected at most 2, the number of its arrays; got 1000000000",
    ),
    "no such layer": (lambda n: n["layers"].pop(), "there is no"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_hostile_network_is_refused(folder: Path, case: str) -> None:
    change, match = NETWORKS[case]
    rewrite(folder, change, "network.json")
    if case == "name":  # which the source spells as it can: nothing else is left of it
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
        refused(folder, "is no artifact")
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
