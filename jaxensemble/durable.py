"""Files and directories that are there whole or not at all, whatever happens while they are written.

A directory is built beside its target under a name of its own, flushed to the disk, and put in place by one rename. An
older directory changes places with it in the same step: at no moment is there none, or half of one. Every call that
changes the disk goes through `_system`, which is where tests let it fail.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxensemble.errors import InputError

CHUNK = 16 << 20
"""Bytes given to one `write`."""

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h, and RENAME_SWAP of macOS's sys/stdio.h
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def _system(call: Callable[..., Any], *args: Any) -> Any:
    return call(*args)


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """An empty directory to be filled by `write`, which becomes `target` when the block ends without an error.

    `target` may exist: it is then replaced in one step, and removed afterwards. On any error, Ctrl-C included, what was
    written is removed and `target` is what it was. Whatever a killed process has left behind the next one removes.

    **Raises:** `OSError` as the system does; `InputError` where the file system cannot exchange two directories.
    """
    _remove_stale(target)
    folder = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    _system(os.mkdir, folder)
    try:
        with _opened(folder) as descriptor:
            _lock(descriptor)
            yield folder
            _system(os.fsync, descriptor)
            replaced = _put_in_place(folder, target)
        with _opened(target.parent) as descriptor:
            _system(os.fsync, descriptor)
    except BaseException:
        _remove(folder)
        raise
    if replaced:
        _remove(folder)  # where the older directory is now


def write(path: Path, chunks: Iterable[Any]) -> tuple[int, str]:
    """A new file of the given bytes-like objects, flushed to the disk: its size and SHA-256.

    **Raises:** `OSError`, also if the file exists.
    """
    size, digest = 0, hashlib.sha256()
    descriptor = _system(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            size, _ = size + len(rest), digest.update(rest)
            while rest:
                rest = rest[_system(os.write, descriptor, rest[:CHUNK]) :]
        _system(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def write_file(target: Path, content: bytes) -> None:
    """A file with the given content, in place of an older one if there is one: always one or the other."""
    target = target.resolve()
    partial = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        write(partial, [content])
        _system(os.replace, partial, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that counts is on its way
            partial.unlink(missing_ok=True)
        raise
    with _opened(target.parent) as descriptor:
        _system(os.fsync, descriptor)


def _put_in_place(folder: Path, target: Path) -> bool:
    """Renames, and tells whether an older directory is now where `folder` was. An empty one is simply replaced."""
    if not target.is_dir() or next(target.iterdir(), None) is None:
        _system(os.rename, folder, target)
        return False
    _system(_exchange, folder, target)
    return True


def _exchange(a: Path, b: Path) -> None:
    """Two paths change places in one step: renameat2(2) of Linux, renamex_np(2) of macOS."""
    libc, one, other = ctypes.CDLL(None, use_errno=True), os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        failed = libc.renamex_np(one, other, _RENAME_EXCHANGE)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
    else:
        failed, _ = -1, ctypes.set_errno(errno.ENOSYS)
    if not failed:
        return
    code = ctypes.get_errno()
    if code in _CANNOT:
        raise InputError(
            f"`{b}` exists, and the file system it is on cannot replace a directory in one step, so that a crash could "
            "leave none: save to another path, or remove it first"
        )
    raise OSError(code, os.strerror(code), str(b))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Marks a directory as in use by a living process; whether that could be done. The lock ends with the process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, or on a file system without locks, where leftovers then stay
        return False
    return True


def _remove_stale(target: Path) -> None:
    """Removes what killed processes left beside this target, and nothing else."""
    pattern = re.compile(re.escape(f".{target.name}.tmp-") + "[0-9a-f]{32}")
    for path in list(target.parent.iterdir()):
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError), _opened(path) as descriptor:  # another process may be faster
                if _lock(descriptor):
                    _remove(path)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what is left is removed when the same target is saved to again
        _system(shutil.rmtree, folder)
