"""Files given as checkpoints that are none, recognised by their beginnings."""

import json
from pathlib import Path

_HEAD = 4096
"""Number of bytes that are read."""

_SHOWN = 60
"""Most characters of a text that an error shows."""

_MAGIC = {
    b"\x1f\x8b": "a gzip archive; unpack it, and name the file in it",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, which Keras and h5py write; export the weights from PyTorch",
    b"\x93NUMPY": "a numpy array; make a state dict of tensors: torch.save({name: torch.from_numpy(array)}, path)",
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, which stands for the weights and does not hold "
    "them; fetch them in that repository: git lfs pull",
}

_DOWNLOAD = "download the file again by the link to the file itself, logged in if the site asks for it"


def describe_stranger(path: Path) -> str | None:
    """Returns the kind of a file, and what to do about it; None for a possible checkpoint, which is no plain text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "resnet.pt"
    ...     _ = path.write_text("<!DOCTYPE html><title>Sign in</title>")
    ...     print(describe_stranger(path))
    an HTML page, such as one that asks to log in or to confirm; download the file again by the link to the file itself,
    logged in if the site asks for it
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    text = _decode_text(head)
    if text is None:
        return None
    begin = text.lower()
    if begin.startswith(("<!doctype html", "<html", "<head", "<script")):
        return f"an HTML page, such as one that asks to log in or to confirm; {_DOWNLOAD}"
    if begin.startswith("<"):
        return f"XML, such as an error of a file server, and begins {_quoted_start(text)}; {_DOWNLOAD}"
    if begin.startswith(("{", "[")) and _is_json(path, len(head)):
        return (
            f"JSON, such as an index of other files or a server's error, and begins {_quoted_start(text)}; {_DOWNLOAD}"
        )
    return f"text, and begins {_quoted_start(text)}; {_DOWNLOAD}"


def _decode_text(head: bytes) -> str | None:
    """Returns the beginning of a file as text; None if it is not plain text."""
    try:
        text = head[: len(head) - 3 if len(head) == _HEAD else None].decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.lstrip() if all(c.isprintable() or c in "\t\r\n\f" for c in text) else None


def _is_json(path: Path, size: int) -> bool:
    if size == _HEAD:
        return True  # too long to be read for its name alone
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _quoted_start(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")
