"""Files and directories that are there whole or not at all, whatever happens while they are written.

A directory is built beside its target under a name of its own, flushed to the disk, and put in place by one rename. An
older directory changes places with it in the same step: at no moment is there none, or half of one. What may be removed
is told by the names of its files: a directory that holds anything else is never touched. Every call that changes the
disk goes through `_call_system`, which is where tests let it fail.

Windows has no descriptors of directories, no `flock` and no exchange. There a new directory is put in place by one
rename, too, but it is not flushed, an older one is not replaced (`InputError`), and what a killed process left stays.
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
"""Bytes given to one call of `os.write`."""

_DIRECTORY: int | None = getattr(os, "O_DIRECTORY", None)  # None on Windows, where no directory can be opened
_BINARY: int = getattr(os, "O_BINARY", 0)  # without it, Windows changes line ends
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h, and RENAME_SWAP of macOS's sys/stdio.h
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # POSIX lets systems choose between the first two


def _call_system(call: Callable[..., Any], *args: Any) -> Any:
    return call(*args)


@contextlib.contextmanager
def new_directory(target: Path, files: Collection[str], *, replace: bool = False) -> Iterator[Path]:
    """An empty directory to be filled by `write_new_file`, which becomes `target` when the block ends without an error.

    `files` are the names that it may get files of. `target` may exist if it is an empty directory or, with `replace`,
    one that holds nothing but files of these names: it is then replaced in one step, and removed once the new one is
    known to be on the disk. This is decided by what is there in that step, whatever others do meanwhile.

    Up to that removal any error, Ctrl-C included, leaves what was at `target` there (but for an empty directory, which
    may be gone), and what was written is removed. If even changing places again fails, `target` is the new directory,
    and the older one stays beside it. What a killed process has left behind the next one removes.

    **Raises:** `OSError` as the system does; `InputError` for a target that is not to be replaced, and where the file
    system cannot exchange two directories.
    """
    _remove_stale(target, files)
    with contextlib.ExitStack() as held:
        folder, opened = _make_folder(target, held)
        try:
            yield folder
            _flush(opened.descriptor)
            if replace and target.is_dir():
                # or another process would take it for a leftover once displaced
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
    """What a directory holds beside real files of the given names, sorted. A link is no real file."""
    entries = {entry.name: entry.lstat().st_mode for entry in folder.iterdir()}
    return sorted(name for name, mode in entries.items() if name not in files or not stat.S_ISREG(mode))


def write_new_file(path: Path, chunks: Iterable[Any]) -> tuple[int, str]:
    """A new file of the given bytes-like objects, flushed to the disk: its size and SHA-256.

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
    """A file with the given content, in place of an older one if there is one: always one or the other."""
    target = target.resolve()
    partial = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        write_new_file(partial, [content])
        _call_system(os.replace, partial, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that counts is on its way
            partial.unlink(missing_ok=True)
        raise
    with _open_directory(target.parent) as parent:
        _flush(parent.descriptor)


def _flush(descriptor: int | None) -> None:
    """Waits until the names in an open directory are on the disk, on systems that can be asked to."""
    if descriptor is not None:
        _call_system(os.fsync, descriptor)


def _put_in_place(folder: Path, target: Path, files: Collection[str], *, replace: bool) -> None:
    """Renames, or exchanges. What was at the target is then where `folder` was, and is looked at only there."""
    try:
        _rename(folder, target)
        return
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        if not replace or error.errno == errno.ENOTDIR:
            raise InputError(f"`{target}` exists by now, and is not replaced") from error
    _call_system(_exchange, folder, target)
    found = unexpected_entries(folder, files)
    if found:
        raise InputError(f"`{target}` is not replaced: by now it holds {', '.join(found)}")


def _rename(folder: Path, target: Path) -> None:
    """A rename that replaces an empty directory, and nothing else, as POSIX has it."""
    if _DIRECTORY is None and target.is_dir():
        with contextlib.suppress(OSError):  # the rename says why
            _call_system(os.rmdir, target)
    _call_system(os.rename, folder, target)


def _take_back(opened: "_OpenDirectory", folder: Path, target: Path) -> None:
    """Undoes `_put_in_place`, however far it came: the open directory is at `folder` again."""
    if not _is_at(opened, target):
        return
    if os.path.lexists(folder):
        _call_system(_exchange, folder, target)
    else:
        _call_system(os.rename, target, folder)


def _exchange(a: Path, b: Path) -> None:
    """Two paths change places in one step: renameat2(2) of Linux, renamex_np(2) of macOS. Windows has no such call."""
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
    if code in _CANNOT:
        raise InputError(
            f"`{b}` exists, and the file system it is on cannot replace a directory in one step, so that a crash could "
            "leave none: save to another path, or remove it first"
        )
    raise OSError(code, os.strerror(code), str(b))


def _libc() -> Any:
    """The C library that this process runs on; None on Windows, whose library has no exchange."""
    return None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class _OpenDirectory:
    """A directory that is held open, where the system can do that, and which directory it is."""

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
    """A new directory beside the target; it stays open and locked as long as `held` lasts."""
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
    """Whether the open directory is the one at that path."""
    try:
        return os.path.samestat(opened.status, path.lstat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int | None) -> bool | None:
    """Marks a directory as in use by a living process; the mark ends with the process.

    False if another one has it. None on a file system or a system (Windows) without locks: nobody can tell there
    whether the process that made a directory is alive, so that leftovers stay.
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
    """Removes what killed processes left beside this target, and nothing else."""
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
    """Removes a directory of such files; one that holds anything else stays whole, for its owner to find."""
    with contextlib.suppress(OSError):  # what is left is removed when the same target is saved to again
        if unexpected_entries(folder, files):
            return
        for path in (folder / name for name in sorted(files)):
            if os.path.lexists(path):
                _call_system(os.unlink, path)
        _call_system(os.rmdir, folder)


def as_path(path: Any, name: str) -> Path:
    """**Raises:** `InputError` for anything else than a path of this machine's files.

    >>> as_path(3, "path")
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: `path` must be a str or a Path; got 3
    """
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise InputError(f"`{name}` must be a str or a Path; got {path!r:.100}")
    return Path(path)
