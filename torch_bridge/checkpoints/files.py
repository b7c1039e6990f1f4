"""Reading of state dicts from checkpoint files, without running any code in them.

`.pt` files are pickles, and a pickle can run code. `torch.load` is called with `weights_only=True`, which builds
tensors and plain containers only. This argument of the call outranks `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` (torch 2.13,
torch/serialization.py), and there is no second attempt in a weaker mode. Archives are checked before PyTorch reads
them: it maps their members from the file, and checks neither compression, nor names, nor checksums.
"""

import hashlib
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from jaxensemble.errors import InputError, first_line
from jaxensemble.network.sources import Selection
from torch_bridge.arrays import unsupported_kind
from torch_bridge.checkpoints import hyperparameters
from torch_bridge.checkpoints.choice import Choice
from torch_bridge.checkpoints.expected import Expected
from torch_bridge.checkpoints.foreign_files import describe_stranger

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"

_SAVE = "where its code is available, save the weights alone: torch.save(model.state_dict(), path)"

_ZIP_MAGIC = b"PK\x03\x04"
_BLOCK = 1 << 20
_ANY = Choice()


def read_state_dict(
    path: str | Path, expected: Expected | None = None, choice: Choice = _ANY
) -> tuple[dict[str, Tensor], Selection]:
    """Reads the state dict of a model from a checkpoint file, by the model's names, and says how it was selected.

    Tensors are on the CPU, and map the file where its format allows, so that only the parts that are read take memory.
    They are valid as long as the file does not change.

    **Arguments:**

    - `path`: a `.safetensors` file, or a `.pt`, `.pth`, `.bin` or `.ckpt` file of `torch.save`: a state dict itself, or
      dicts with one in them.
    - `expected`: the content that the model needs.
    - `choice`: the choice of one of several state dicts, and of the way its names become the model's.

    **Raises:** `InputError` for a file that is missing, damaged or of another kind, with its kind and what to do; for a
    file that would call functions, with their names; and for a file that can be read in more than one way, with the
    arguments that choose one.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "linear.pt"
    ...     torch.save({"model": nn.DataParallel(nn.Linear(3, 2)).state_dict(), "epoch": 9}, path)
    ...     state, taken = read_state_dict(path, Expected.of(nn.Linear(3, 2)))
    >>> list(state), str(taken)
    (['weight', 'bias'], 'taken from `model`; prefix `module.` removed; left out: `epoch`')
    """
    path = checkpoint_path(path)
    if what := describe_stranger(path):
        raise InputError(f"`{path}` is no checkpoint. It is {what}")
    loaded = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickled(path)
    try:
        tensors, taken = choice.take(loaded, expected)
    except InputError as error:
        raise InputError(f"`{path}` {error.details}") from error
    _check_plain(tensors, path)
    tensors = {name: Tensor.detach(tensor) for name, tensor in tensors.items()}
    return expected.complete(tensors) if expected else tensors, taken


def checkpoint_path(path: Any) -> Path:
    """Returns the path of a file that can hold a checkpoint, by its suffix.

    **Raises:** `InputError` for other paths.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"a checkpoint is named by a str or a Path; got {type(path).__name__}")
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"`{path}` is a directory; name its files: sorted(Path({str(path)!r}).glob({checkpoint_pattern(path)!r}))"
        )
    if not path.exists():
        hint = ""
        if any(character in str(path) for character in "*?["):
            hint = f". Patterns are not expanded here: pass sorted(glob.glob({str(path)!r}))"
        raise InputError(f"there is no file `{path}`{hint}")
    if path.suffix not in (*PICKLED, SAFETENSORS):
        raise InputError(
            f"`{path}` must be a checkpoint of PyTorch ({', '.join(PICKLED)}) or safetensors ({SAFETENSORS}); got "
            f"{f'a {path.suffix} file' if path.suffix else 'no suffix'}"
        )
    if path.stat().st_size == 0:
        raise InputError(f"`{path}` is empty")
    return path


def checkpoint_pattern(folder: Path) -> str:
    """Returns a pattern of the checkpoints in a folder or its subfolders, by their most frequent suffix.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "seed0.ckpt").touch()
    ...     checkpoint_pattern(Path(folder))
    '*.ckpt'
    """
    for pattern in ("*", "*/*"):
        suffixes = Counter(path.suffix for path in sorted(folder.glob(pattern)) if path.is_file())
        known = {suffix: count for suffix, count in suffixes.items() if suffix in (*PICKLED, SAFETENSORS)}
        if known:
            return f"{pattern}{max(known, key=known.__getitem__)}"
    return "*.pt"


def verified_checksum(path: Path) -> str:
    """Returns the SHA-256 of a file, as hexadecimal digits, after verifying the checksums in the file.

    **Raises:** `InputError` naming a member of the archive whose bytes differ from the saved bytes.
    """
    if _has_magic(path, _ZIP_MAGIC):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.CRC:  # zero if saved without checksums
                    _verify_member(archive, info, path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    try:
        with archive.open(info) as member:
            while member.read(_BLOCK):
                pass
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"`{path}` is damaged: {first_line(error)}. Get the file again from where it came from"
        ) from error


def _has_magic(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if _has_magic(path, _ZIP_MAGIC):
        raise InputError(f"`{path}` is a zip archive, which torch.save writes, not a safetensors file: name it .pt")
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"`{path}` is not a readable safetensors file: {first_line(error)}") from error


def _read_pickled(path: Path) -> Any:
    is_archive = _has_magic(path, _ZIP_MAGIC)
    if is_archive:
        _check_archive(path)
    elif tarfile.is_tarfile(path):
        raise InputError(f"`{path}` is a tar archive, which PyTorch wrote before 2017; {_SAVE}")
    try:
        with hyperparameters.allow_stand_ins():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # damaged and hostile files make the loader raise many kinds
        raise InputError(_refusal(path, error)) from error


def _check_archive(path: Path) -> None:
    """Checks an archive by its directory alone. PyTorch writes uncompressed members under plain names.

    **Raises:** `InputError` for an archive that is damaged or different.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"`{path}` is damaged or cut short: {first_line(error)}") from error
    names, size = [info.filename for info in infos], path.stat().st_size
    if other := _other_archive(names):
        raise InputError(f"`{path}` is {other}, no checkpoint; {_SAVE}")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    odd = [
        (repeated, "twice the same member"),
        ([info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED], "compressed members"),
        ([info.filename for info in infos if info.flag_bits & 1], "encrypted members"),
        ([name for name in names if name.startswith("/") or ".." in PurePosixPath(name).parts], "paths to outside"),
        ([info.filename for info in infos if info.file_size > size], "members longer than the file"),
        (names if sum(info.file_size for info in infos) > size else [], "members that overlap"),
    ]
    found = [f"{what} ({', '.join(which[:3])})" for which, what in odd if which]
    if found:
        raise InputError(f"`{path}` is not as torch.save writes it: it has {', '.join(found)}")


def _other_archive(names: Collection[str]) -> str | None:
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "a TorchScript module, which is a program"
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return "an exported program (.pt2)"
    if ".data/extern_modules" in inner:
        return "a torch.package archive, which holds code"
    return None if "data.pkl" in inner else "a zip archive that torch.save did not write"


def _refusal(path: Path, error: Exception) -> str:
    blocked = _blocked_names(path, str(error))
    if blocked:
        return (
            f"`{path}` holds more than tensors, and loading it would run code: {', '.join(blocked)}. A "
            f"pickled module, or objects of other classes with the weights, cannot be read; {_SAVE}"
        )
    reason = next((line for line in str(error).splitlines() if "WeightsUnpickler error:" in line), str(error))
    reason = reason.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    if isinstance(error, KeyError) or reason.isdigit():  # an unknown byte in a pickle
        reason = "its content is no pickle"
    return f"`{path}` is not a readable checkpoint, or it is damaged: {reason.splitlines()[0]}"


def _blocked_names(path: Path, text: str) -> list[str]:
    """Returns the functions and classes in the file that are not allowed; for old files only the first."""
    named = re.findall(r"GLOBAL (\S+)", text)
    if not named:
        return []
    try:
        with hyperparameters.allow_stand_ins():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an old format, or a malformed pickle: PyTorch's message names the first
        return named[:1]


def _check_plain(state: Mapping[str, Tensor], path: Path) -> None:
    """Checks that all tensors are dense and plain, and have room in the file.

    Methods are called on the class, since a file may set attributes of a tensor to anything.

    **Raises:** `InputError` naming every other tensor.
    """
    odd = {key: unsupported_kind(value) for key, value in state.items()}
    odd |= {
        key: f"a tensor of class {type(value).__name__}"
        for key, value in state.items()
        if type(value) not in (Tensor, nn.Parameter)
    }
    odd |= {
        key: f"{tuple(value.shape)} values out of {value.untyped_storage().nbytes()} bytes, by strides"
        for key, value in state.items()
        if not odd[key] and Tensor.numel(value) * Tensor.element_size(value) > Tensor.untyped_storage(value).nbytes()
    }
    lines = [f"  {key}: {kind}" for key, kind in odd.items() if kind]
    if lines:
        raise InputError(f"`{path}` must hold plain dense tensors; got\n" + "\n".join(lines))
