"""Directories that are kept between processes: for measured plans and, on request, compiled programs."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxensemble.compat import reset_compilation_cache
from jaxensemble.errors import InputError


def cache_directory() -> Path:
    """The directory of measurements: `JAXENSEMBLE_CACHE`, or a folder in the system's usual place for caches."""
    given = os.environ.get("JAXENSEMBLE_CACHE")
    if given:
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxensemble"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxensemble"


def keep_compiled(directory: str | Path | None = None) -> Path:
    """Keeps every program that JAX compiles from now on in a directory: another process then need not compile it.

    This is JAX's persistent compilation cache, for all of the process. Programs in the directory are run, so it must be
    the user's own: nobody else may be able to write to it.

    **Arguments:**

    - `directory`: made for this user only, if it does not exist; None for a folder in the user's cache directory.

    **Returns:** the directory.

    **Raises:** `InputError` for a directory that is not this user's own, or that others can write to.

    >>> import tempfile
    >>> keep_compiled(tempfile.mkdtemp()).is_dir()
    True
    >>> jax.config.update("jax_compilation_cache_dir", None)  # switches the cache off
    """
    path = (cache_directory() / "programs" if directory is None else Path(directory).expanduser()).absolute()
    _make_private(path)
    if open_to_others := [str(place) for place in open_places(path)]:
        shared = path.stat().st_uid != os.getuid() or path.stat().st_mode & stat.S_ISVTX  # like /tmp
        advice = (
            f"use a directory below it, made for this user alone: keep_compiled({str(path / 'programs')!r})"
            if shared
            else f"use another directory, or make this one your own: chmod 700 {path}"
        )
        raise InputError(
            f"compiled programs are run, and {', '.join(open_to_others)} can be written to by other users: {advice}"
        )
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    reset_compilation_cache()  # JAX reads its settings once, when it compiles the first program
    return path


def _make_private(path: Path) -> None:
    missing = [place for place in (path, *path.parents) if not place.exists()]
    try:
        for place in missing[::-1]:
            place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror or error}") from error
    if not path.is_dir():
        raise InputError(f"{path} is no directory: specify another path for compiled programs")


def open_places(path: Path) -> Iterator[Path]:
    """Yields the paths that users other than this one and root can write to: the directory, its entries, its parents.

    Yields none on Windows, which has other permissions.
    """
    if not hasattr(os, "getuid"):
        return
    if _is_open(path, stat.S_IWGRP | stat.S_IWOTH):
        yield path
    if path.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH):
        yield from (place for place in path.iterdir() if _is_open(place, stat.S_IWGRP | stat.S_IWOTH))
    for place in path.parents:
        if not place.stat().st_mode & stat.S_ISVTX and _is_open(place, stat.S_IWOTH):
            yield place


def _is_open(place: Path, writable: int) -> bool:
    status = place.stat()
    return bool(status.st_mode & writable) or status.st_uid not in (os.getuid(), 0)
