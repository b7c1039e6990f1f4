"""Checkpoint files that are not state dicts, or hold code. Each is a function of the path to write, and of a marker.

When the payload runs, it makes the directory `marker`.
"""

import argparse
import collections
import importlib
import io
import operator
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


class Payload:
    """An object that makes the directory `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Calling:
    """An object that is the result of a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class Stateful(dict[str, Any]):
    """An object whose state makes the directory `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return Stateful, (self.marker,), {"marker": self.marker}

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["marker"]).mkdir()


class Covered(dict[str, Any]):
    """An object that unpickles as an `OrderedDict` whose methods are replaced by attributes."""

    def __reduce__(self) -> Any:
        attributes = dict.fromkeys(("items", "keys", "values", "get"), 3)
        return collections.OrderedDict, (), attributes, None, iter(self.items())


def covered(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces methods of a tensor by attributes."""
    for name in ("detach", "numel", "element_size", "is_floating_point", "is_complex"):
        setattr(tensor, name, 3)
    return tensor


def _archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _pickled(path: Path, marker: Path) -> None:
    torch.save({"weight": torch.zeros(1), "more": Payload(marker)}, path)


def _legacy(path: Path, marker: Path) -> None:
    torch.save({"weight": Payload(marker)}, path, _use_new_zipfile_serialization=False)


def _bare_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Payload(marker)}))


def _whole_module(path: Path, marker: Path) -> None:
    torch.save(nn.Linear(3, 2), path)


def _torchscript(path: Path, marker: Path) -> None:
    members = {"m/data.pkl": pickle.dumps(Payload(marker)), "m/constants.pkl": b"", "m/version": b"3"}
    _archive(path, members)


def _exported(path: Path, marker: Path) -> None:
    _archive(path, {"m/archive_format": b"pt2", "m/data/x": pickle.dumps(Payload(marker))})


def _package(path: Path, marker: Path) -> None:
    _archive(path, {"m/.data/extern_modules": b"", "m/x/x.pkl": pickle.dumps(Payload(marker))})


def _any_zip(path: Path, marker: Path) -> None:
    _archive(path, {"weights.npy": pickle.dumps(Payload(marker))})


def _twice(path: Path, marker: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/data.pkl", pickle.dumps(Payload(marker)))


def _compressed(path: Path, marker: Path) -> None:
    _archive(path, {"m/data.pkl": pickle.dumps(Payload(marker)), "m/data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)


def _outside(path: Path, marker: Path) -> None:
    _archive(path, {"m/data.pkl": b"", "m/../../data/0": b""})


def _tar(path: Path, marker: Path) -> None:
    with tarfile.open(path, "w") as archive:
        content = pickle.dumps(Payload(marker))
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _text(path: Path, marker: Path) -> None:
    path.write_text("weights")


def _nothing(path: Path, marker: Path) -> None:
    path.touch()


def _nested(path: Path, marker: Path) -> None:
    """Nests a payload in an object that another one builds."""
    torch.save({"weight": Calling(list, ([Payload(marker)],))}, path)


def _imported(path: Path, marker: Path) -> None:
    """Calls a module's method, both found by their names."""
    make = operator.methodcaller("mkdir", str(marker))
    torch.save({"weight": Calling(make, (Calling(importlib.import_module, ("os",)),))}, path)


def _subclass(path: Path, marker: Path) -> None:
    """Sets a state on an object that is not a tensor."""
    torch.save({"weight": Stateful(marker)}, path)


def _bomb(path: Path, marker: Path) -> None:
    """Writes a few kilobytes that claim to be forty gigabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/data/0", bytes(1 << 20))
    size = (1 << 20).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (0xFFFFFFFE).to_bytes(4, "little")))


def _hyperparameters(path: Path, marker: Path) -> None:
    """Writes a payload within arguments, which may be next to the weights."""
    torch.save({"weight": torch.zeros(1), "args": argparse.Namespace(more=Payload(marker))}, path)


def _overlapping(path: Path, marker: Path) -> None:
    """Writes many members that share the same bytes of the file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/data/0", bytes(1 << 16))
        first = archive.getinfo("m/data/0")
        for k in range(1, 100):
            other = zipfile.ZipInfo(f"m/data/{k}")
            other.header_offset, other.CRC = first.header_offset, first.CRC
            other.file_size = other.compress_size = first.file_size
            archive.filelist.append(other)


def _attributes(path: Path, marker: Path) -> None:
    """Writes a dict and a tensor whose methods are replaced by attributes."""
    torch.save({"model": Covered({"weight": covered(torch.zeros(1).expand(2, 3))})}, path)


HOSTILE: dict[Callable[[Path, Path], None], str] = {
    _pickled: r"would run code: (os|posix|nt)\.mkdir",
    _legacy: r"would run code: (os|posix|nt)\.mkdir",
    _bare_pickle: "is not a readable checkpoint",
    _whole_module: r"(?s)would run code: .*torch\.nn\.modules\.linear\.Linear.*save the weights alone",
    _torchscript: "is a TorchScript module, which is a program",
    _exported: r"is an exported program \(.pt2\)",
    _package: r"is a torch\.package archive",
    _any_zip: "is a zip archive that torch.save did not write",
    _twice: r"twice the same member \(m/data.pkl\)",
    _compressed: "compressed members",
    _outside: "paths to outside",
    _nested: r"(?s)would run code: .*(os|posix|nt)\.mkdir",
    _imported: r"(?s)would run code: .*importlib\.import_module.*operator\.methodcaller",
    _subclass: r"would run code: tests\.helpers\.attacks\.checkpoints\.Stateful",
    _bomb: "compressed members",
    _overlapping: "members that overlap",
    _tar: "is a tar archive",
    _text: "is no checkpoint. It is text",
    _hyperparameters: r"would run code: (os|posix|nt)\.mkdir\.",
    _attributes: r"weight: \(2, 3\) values out of 4 bytes",
    _nothing: "is empty",
}
