"""What is kept between processes: measured plans, and compiled programs where that is asked for."""

import os
import stat
import sys
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxensemble.errors import InputError


def cache_directory() -> Path:
    """Where measurements are kept: `JAXENSEMBLE_CACHE`, or a folder where the system has such."""
    given = os.environ.get("JAXENSEMBLE_CACHE")
    if given:
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxensemble"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxensemble"


def keep_compiled(directory: str | Path | None = None) -> Path:
    """Keeps every program that JAX compiles from now on in a directory: another process then need not compile it.

    This is JAX's persistent compilation cache, for all of the process. What is in the directory is run, so it must be
    the user's own: nobody else may be able to write to it.

    **Arguments:** `directory` is made, for this user only, where there is none; without it, one in the user's cache
    directory is taken.

    **Returns:** the directory.

    **Raises:** `InputError` for a directory that is not this user's own, or that others can write to.

    >>> import tempfile
    >>> keep_compiled(tempfile.mkdtemp()).is_dir()
    True
    >>> jax.config.update("jax_compilation_cache_dir", None)  # no longer
    """
    path = (cache_directory() / "programs" if directory is None else Path(directory)).absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InputError(
                f"compiled programs are run, and {path} can be written to by others than this user: take another "
                f"directory, or make this one your own: chmod 700 {path}"
            )
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()  # which otherwise stays as it was when the first program was compiled
    return path
