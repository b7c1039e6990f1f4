"""Files and directories that exist whole or not at all, whatever happens while they are written.

A directory is built next to its target under a name of its own, flushed to the disk, and put in place by one rename. An
older directory is exchanged with it in the same step: at no moment is there no directory, or half of one. A directory
may be removed only if all its files have the expected names; any other directory is never touched. Every call that
changes the disk goes through `_call_system`, where tests make calls fail.

Windows has no descriptors of directories, no `flock` and no exchange. There a new directory is put in place by one
rename, but not flushed; an older directory is not replaced (`InputError`); and leftovers of killed processes stay.
"""

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import os
import re
import stat
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxensemble.errors import InputError

CHUNK = 16 << 20
"""The most bytes of one call of `os.write`."""

_DIRECTORY: int | None = getattr(os, "O_DIRECTORY", None)  # None on Windows, where no directory can be opened
_BINARY: int = getattr(os, "O_BINARY", 0)  # without it, Windows changes line ends
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h, and RENAME_SWAP of macOS's sys/stdio.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_EXISTS = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # POSIX lets systems choose between the first two


def _call_system(call: Callable[..., Any], *args: Any) -> Any:
    return call(*args)


@contextlib.contextmanager
def new_directory(target: Path, files: Collection[str], *, replace: bool = False) -> Iterator[Path]:
    """An empty directory for files of `write_new_file`; it becomes `target` when the block ends without an error.

    **Arguments:**

    - `target`: a path that does not exist, or an empty directory; with `replace`, also a directory that holds no other
      files than `files`. It is replaced in one step, and removed when the new directory is known to be on the disk.
      The content at the moment of this step decides, whatever other processes do meanwhile.
    - `files`: the names of the files that the directory may hold.

    Until the older directory is removed, any error, Ctrl-C included, leaves it at `target` (only an empty directory may
    be gone), and removes the new files. If exchanging the directories back fails too, `target` is the new directory,
    and the older one stays next to it. The next process removes what a killed process left behind.

    **Raises:** `OSError` from the system; `InputError` for a target that must not be replaced, and where the file
    system cannot exchange two directories.
    """
    _remove_stale(target, files)
    with contextlib.ExitStack() as held:
        folder, opened = _make_folder(target, held)
        try:
            yield folder
            _flush(opened.descriptor)
            if replace and target.is_dir():
                # once displaced, another process would take an unlocked directory for a leftover
                _lock(held.enter_context(_open_directory(target)).descriptor)
            _put_in_place(folder, target, files, replace=replace)
            with _open_directory(target.parent) as parent:
                _flush(parent.descriptor)
        except BaseException:
            _take_back(opened, folder, target)
            _remove(folder, files)
            raise
        _remove(folder, files)  # where the older directory is now, if there was one


def unexpected_entries(folder: Path, files: Collection[str]) -> list[str]:
    """The entries of a directory that are not regular files with the given names, sorted. A link is no regular file."""
    entries = {entry.name: entry.lstat().st_mode for entry in folder.iterdir()}
    return sorted(name for name, mode in entries.items() if name not in files or not stat.S_ISREG(mode))


def write_new_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a new file of the given bytes-like objects, flushes it to the disk, and returns its size and SHA-256.

    **Raises:** `OSError`, also if the file exists.
    """
    size, digest = 0, hashlib.sha256()
    descriptor = _call_system(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            size, _ = size + len(rest), digest.update(rest)
            while rest:
                rest = rest[_call_system(os.write, descriptor, rest[:CHUNK]) :]
        _call_system(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def write_file(target: Path, content: bytes) -> None:
    """Writes a file with the given content, or replaces an older file in one step."""
    target = target.resolve()
    partial = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        write_new_file(partial, [content])
        _call_system(os.replace, partial, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the error raised below is the important one
            partial.unlink(missing_ok=True)
        raise
    with _open_directory(target.parent) as parent:
        _flush(parent.descriptor)


def _flush(descriptor: int | None) -> None:
    """Waits until the names in an open directory are on the disk, on systems that can be asked to."""
    if descriptor is not None:
        _call_system(os.fsync, descriptor)


def _put_in_place(folder: Path, target: Path, files: Collection[str], *, replace: bool) -> None:
    """Renames a directory to its target, or exchanges the two, and then checks the content of the older one."""
    try:
        _rename(folder, target)
        return
    except OSError as error:
        if error.errno not in _EXISTS:
            raise
        if not replace or error.errno == errno.ENOTDIR:
            raise InputError(f"`{target}` exists now, and is not replaced") from error
    _call_system(_exchange, folder, target)
    found = unexpected_entries(folder, files)
    if found:
        raise InputError(f"`{target}` is not replaced: it now holds {', '.join(found)}")


def _rename(folder: Path, target: Path) -> None:
    """Renames a directory; as in POSIX, the target may be an empty directory and nothing else."""
    if _DIRECTORY is None and target.is_dir():
        with contextlib.suppress(OSError):  # the rename below raises the error
            _call_system(os.rmdir, target)
    _call_system(os.rename, folder, target)


def _take_back(opened: "_OpenDirectory", folder: Path, target: Path) -> None:
    """Undoes `_put_in_place`, whichever of its steps were done: the open directory is at `folder` again."""
    if not _is_at(opened, target):
        return
    if os.path.lexists(folder):
        _call_system(_exchange, folder, target)
    else:
        _call_system(os.rename, target, folder)


def _exchange(a: Path, b: Path) -> None:
    """Exchanges two paths in one step: with renameat2(2) on Linux, renamex_np(2) on macOS. Windows has no such call."""
    libc, one, other = _libc(), os.fsencode(a), os.fsencode(b)
    if hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(one, other, _RENAME_EXCHANGE)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
    else:
        failed, _ = -1, ctypes.set_errno(errno.ENOSYS)
    if not failed:
        return
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        raise InputError(
            f"`{b}` exists, and its file system cannot replace a directory in one step, so that a crash could leave "
            "no directory: save to another path, or remove this one first"
        )
    raise OSError(code, os.strerror(code), str(b))


def _libc() -> Any:
    """The C library of this process; None on Windows, whose library has no exchange."""
    return None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class _OpenDirectory:
    """A directory that is held open, if the system can, and the status that identifies it."""

    descriptor: int | None
    status: os.stat_result


@contextlib.contextmanager
def _open_directory(folder: Path) -> Iterator[_OpenDirectory]:
    if _DIRECTORY is None:
        yield _OpenDirectory(None, folder.lstat())
        return
    descriptor = os.open(folder, os.O_RDONLY | _DIRECTORY)
    try:
        yield _OpenDirectory(descriptor, os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _make_folder(target: Path, held: contextlib.ExitStack) -> tuple[Path, _OpenDirectory]:
    """Makes a new directory next to the target; it stays open and locked as long as `held` lasts."""
    while True:
        folder = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
        _call_system(os.mkdir, folder)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as tried:
            opened = tried.enter_context(
                _open_directory(folder)
            )  # until it is locked, others may take it for a leftover
            if _lock(opened.descriptor) is not False and _is_at(opened, folder):
                held.push(tried.pop_all())
                return folder, opened


def _is_at(opened: _OpenDirectory, path: Path) -> bool:
    """Returns whether the open directory is the one at a path."""
    try:
        return os.path.samestat(opened.status, path.lstat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int | None) -> bool | None:
    """Locks a directory that a living process uses; the lock ends with the process.

    **Returns:** whether the lock was taken: False if another process has it. None on a file system or a system
    (Windows) without locks. There nobody knows whether the process that made a directory is alive, so that leftovers
    stay.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    if descriptor is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_stale(target: Path, files: Collection[str]) -> None:
    """Removes the directories that killed processes left next to a target, and nothing else."""
    pattern = re.compile(re.escape(f".{target.name}.tmp-") + "[0-9a-f]{32}")
    for path in list(target.parent.iterdir()):
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with (
                contextlib.suppress(FileNotFoundError),
                _open_directory(path) as opened,
            ):  # another process may be faster
                if _lock(opened.descriptor):
                    _remove(path, files)


def _remove(folder: Path, files: Collection[str]) -> None:
    """Removes a directory of the given files. A directory with any other entry stays whole, for its owner to find."""
    with contextlib.suppress(OSError):  # the next save to this target removes leftovers
        if unexpected_entries(folder, files):
            return
        for path in (folder / name for name in sorted(files)):
            if os.path.lexists(path):
                _call_system(os.unlink, path)
        _call_system(os.rmdir, folder)


def as_path(path: Any, name: str) -> Path:
    """Checks that an argument is a path, and returns it as a `Path`.

    **Raises:** `InputError` for any other object.

    >>> as_path(3, "path")
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: `path` must be a str or a Path; got 3
    """
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise InputError(f"`{name}` must be a str or a Path; got {path!r:.100}")
    return Path(path)
