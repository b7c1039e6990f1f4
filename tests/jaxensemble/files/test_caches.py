"""Caches that are kept between processes."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxensemble import InputError, keep_compiled

PROGRAM = """
import sys
import jax
import numpy as np
from flax import nnx
from jaxensemble import Ensemble, Plan, keep_compiled

events = []
jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name))
ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(4)])
keep_compiled(sys.argv[1])
events.clear()
ensemble(np.ones((5, 3), "float32"))
print(events.count("/jax/compilation_cache/cache_hits"), events.count("/jax/compilation_cache/cache_misses"))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    run = [sys.executable, "-c", PROGRAM, str(tmp_path / "programs")]
    first, second = (subprocess.run(run, check=True, capture_output=True, text=True).stdout for _ in range(2))
    hits, misses = map(int, first.split())
    assert hits == 0 and misses > 0
    assert second.split() == [str(misses), "0"]


@pytest.fixture
def _unchanged():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("_unchanged")
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    made = keep_compiled(tmp_path / "new" / "programs")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o770)
    with pytest.raises(InputError, match=r"(?s)can be written to by other users.*chmod 700 .*programs$"):
        keep_compiled(made)
    made.chmod(0o1777)  # like /tmp, which others need as it is
    with pytest.raises(InputError, match=r"(?s)use a directory below it.*programs/programs'\)$"):
        keep_compiled(made)
    made.chmod(0o700)
    assert keep_compiled(made) == made
    made.chmod(0o755)
    (made / "program").touch(0o666)
    (made / "program").chmod(0o666)
    with pytest.raises(InputError, match=r"programs/program can be written to by other users"):
        keep_compiled(made)
    (made / "program").unlink()
    made.parent.chmod(0o777)  # in it, somebody else could make another directory of this name
    with pytest.raises(InputError, match=r"new can be written to by other users"):
        keep_compiled(made)
    made.parent.chmod(0o1777)  # like /tmp
    assert keep_compiled(made) == made


@pytest.mark.usefixtures("_unchanged")
def test_what_is_no_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is no directory"):
        keep_compiled(tmp_path / "file")
    with pytest.raises(InputError, match=r"file/inner cannot be made: Not a directory"):
        keep_compiled(tmp_path / "file" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep_compiled("~/programs") == tmp_path / "programs"
