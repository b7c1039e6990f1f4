"""State dicts from checkpoint files, without running anything that a file may hold.

`.pt` files are pickles, and a pickle can run code. `torch.load` is called with `weights_only=True`, which builds
tensors and plain containers only. An argument given in the call outranks `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` (torch
2.13, torch/serialization.py), and there is no second attempt in a weaker mode. Archives are looked over before PyTorch
sees them: it maps their members as they lie in the file, and checks neither compression, nor names, nor checksums.
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
from torch_bridge.arrays import odd_kind

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under which keys training scripts and Lightning keep a model's state dict beside other things."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What `DataParallel`, `torch.compile` and Lightning modules put before every key."""

_SAVE = "where its code is at hand, save the weights alone: torch.save(model.state_dict(), path)"

_ZIP_MAGIC = b"PK\x03\x04"
_BLOCK = 1 << 20


def read_state_dict(path: str | Path, expected: Collection[str] | None = None) -> tuple[dict[str, Tensor], str]:
    """The state dict of a model in a checkpoint file, and a note of what was left out or renamed to get it.

    Tensors are on the CPU, and map the file where its format allows, so that only what is read takes up memory; they
    are good for as long as the file stays as it is.

    **Arguments:**

    - `path`: a `.safetensors` file, or a `.pt`, `.pth`, `.bin` or `.ckpt` file of `torch.save`: a state dict itself, or
      one under `state_dict`, `model_state_dict` or `model`.
    - `expected`: the keys that the model has. Prefixes (`module.`, `_orig_mod.`, `model.`, one after another) are
      stripped if all keys have them and more keys are the model's afterwards; without `expected`, none is.

    **Raises:** `InputError` for a file that is missing, damaged or anything else than that, naming what it is and what
    to do; with the names of the functions that a file would have called.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "linear.pt"
    ...     torch.save({"model": nn.DataParallel(nn.Linear(3, 2)).state_dict(), "epoch": 9}, path)
    ...     state, note = read_state_dict(path, ["weight", "bias"])
    >>> list(state), note
    (['weight', 'bias'], 'taken from `model`, `epoch` left out; prefix `module.` stripped')
    """
    path = checkpoint_path(path)
    loaded = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickled(path)
    state, notes = _unwrapped(loaded, path)
    if expected is not None:
        state, prefix = _without_prefix(state, set(expected))
        notes += [f"prefix `{prefix}` stripped"] if prefix else []
    return state, "; ".join(notes)


def checkpoint_path(path: Any) -> Path:
    """**Raises:** `InputError` unless `path` is that of a file, and one of a kind that can hold a checkpoint."""
    if not isinstance(path, str | Path):
        raise InputError(f"a checkpoint is named by a str or a Path; got {type(path).__name__}")
    path = Path(path)
    if path.is_dir():
        raise InputError(f"`{path}` is a directory; name its files: sorted(Path({str(path)!r}).glob('*.pt'))")
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


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits, after its own checksums were verified.

    **Raises:** `InputError` naming a member of the archive whose bytes are not those that were saved.
    """
    if _begins(path, _ZIP_MAGIC):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.CRC:  # zero where it was saved without checksums
                    _verify(archive, info, path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    try:
        with archive.open(info) as member:
            while member.read(_BLOCK):
                pass
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"`{path}` is damaged: {first_line(error)}. Get the file again from where it came from"
        ) from error


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"`{path}` is no safetensors file that can be read: {first_line(error)}") from error


def _read_pickled(path: Path) -> Any:
    is_archive = _begins(path, _ZIP_MAGIC)
    if is_archive:
        _check_archive(path)
    elif tarfile.is_tarfile(path):
        raise InputError(f"`{path}` is a tar archive, as PyTorch wrote them before 2017; {_SAVE}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # whatever a damaged or hostile file makes of the loader is told as one kind of error
        raise InputError(_refusal(path, error)) from error


def _check_archive(path: Path) -> None:
    """Looks an archive over by its directory alone. What PyTorch writes is stored as it is, under plain names."""
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
    blocked = _blocked(path, str(error))
    if blocked:
        return (
            f"`{path}` holds more than tensors, and to load it would be to run code: {', '.join(blocked)}. A whole "
            f"module that was pickled, or other objects beside the weights, cannot be read; {_SAVE}"
        )
    reason = next((line for line in str(error).splitlines() if "WeightsUnpickler error:" in line), str(error))
    reason = reason.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    if isinstance(error, KeyError) or reason.isdigit():  # a byte that means nothing to a pickle
        reason = "its content is no pickle"
    return f"`{path}` is no checkpoint that can be read, or it is damaged: {reason.splitlines()[0]}"


def _blocked(path: Path, text: str) -> list[str]:
    """The functions and classes that the file names and that are not allowed; of old files only the first."""
    named = re.findall(r"GLOBAL (\S+)", text)
    if not named:
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an old format, or a pickle that is malformed on purpose: PyTorch's message names the first
        return named[:1]


def _unwrapped(loaded: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    if not isinstance(loaded, Mapping):
        raise InputError(f"`{path}` must hold a state dict; got {_told(loaded)}; {_SAVE}")
    if loaded and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
        _check_plain(loaded, path)
        return {key: value.detach() for key, value in loaded.items()}, []
    wrappers = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
    if len(wrappers) == 1:
        state, notes = _unwrapped(loaded[wrappers[0]], path)
        others = [f"`{key}`" for key in loaded if key != wrappers[0]]
        left = f", {', '.join(others)} left out" if others else ""
        return state, [f"taken from `{wrappers[0]}`{left}", *notes]
    contents = [f"  {key!r}: {_told(value)}" for key, value in loaded.items() if not isinstance(value, Tensor)]
    tensors = len(loaded) - len(contents)
    told = "\n".join([*contents, *([f"  {tensors} tensors"] if tensors else [])]) or "  nothing"
    raise InputError(
        f"`{path}` must hold a state dict, or one dict of tensors under {', '.join(map(repr, WRAPPERS))}; "
        f"{'several' if wrappers else 'none'} of these fit:\n{told}\n"
        "Take out the one that is meant: torch.save(checkpoint['...'], path)"
    )


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {len(value)}"
    return f"a {type(value).__name__}" if not isinstance(value, Tensor) else f"a tensor of shape {tuple(value.shape)}"


def _check_plain(state: Mapping[str, Tensor], path: Path) -> None:
    """**Raises:** `InputError` naming every tensor that is not dense and plain, or has no room in the file."""
    odd = {key: odd_kind(value) for key, value in state.items()}
    odd |= {
        key: f"a tensor of class {type(value).__name__}"
        for key, value in state.items()
        if type(value) not in (Tensor, nn.Parameter)
    }
    odd |= {
        key: f"{tuple(value.shape)} values out of {value.untyped_storage().nbytes()} bytes, told by strides"
        for key, value in state.items()
        if not odd[key] and value.numel() * value.element_size() > value.untyped_storage().nbytes()
    }
    lines = [f"  {key}: {kind}" for key, kind in odd.items() if kind]
    if lines:
        raise InputError(f"`{path}` must hold plain dense tensors; got\n" + "\n".join(lines))


def _without_prefix(state: dict[str, Tensor], expected: set[str]) -> tuple[dict[str, Tensor], str]:
    """The state with the prefix left out after which most keys are expected ones, and that prefix."""
    prefixes = [""]
    keys = list(state)
    while prefix := next((p for p in PREFIXES if keys and all(key.startswith(p) for key in keys)), ""):
        prefixes.append(prefixes[-1] + prefix)
        keys = [key.removeprefix(prefix) for key in keys]
    best = max(prefixes, key=lambda p: sum(key.removeprefix(p) in expected for key in state))
    return {key.removeprefix(best): value for key, value in state.items()}, best
