"""Faults while saving: at every call that changes the disk, an error or the end of the process loses nothing."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxensemble
from jaxensemble import Ensemble, InputError
from jaxensemble.files import durable
from tests.helpers.artifacts import SAVED, same_bits


class Killed(BaseException):
    """An error in place of SIGKILL: nothing that runs after it reaches the disk."""


class Faults:
    """Replaces `durable._call_system`: counts the calls, and fails at call number `at`, or from it on."""

    def __init__(self, at: int | None = None, error: BaseException | None = None):
        self.at, self.error, self.calls = at, error, 0
        self.failed: Callable[..., Any] | None = None

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        self.calls += 1
        if self.error is not None and self.at is not None:
            dead = isinstance(self.error, Killed) and self.calls > self.at
            if self.calls == self.at:
                self.failed = call
            if self.calls == self.at or dead:
                raise self.error
        return call(*args)


ERRORS: list[BaseException] = [
    Killed(),
    KeyboardInterrupt(),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
]


@pytest.fixture(scope="module")
def ensembles() -> tuple[Ensemble, Ensemble]:
    first = Ensemble.load(SAVED / "linear")
    return first, jax.tree.map(lambda leaf: leaf + 1, first)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: getattr(error, "strerror", None) or type(error).__name__)
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replaced"])
def test_a_fault_at_any_call_leaves_the_old_artifact_or_the_new_one(
    ensembles: tuple[Ensemble, Ensemble],
    replace: bool,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = ensembles
    target = tmp_path / "net"
    monkeypatch.setattr(durable, "CHUNK", 1000)
    at = 0
    while True:
        at += 1
        monkeypatch.setattr(durable, "_call_system", Faults())
        if replace:
            old.save(target, force=True)
        elif target.exists():
            shutil.rmtree(target)
        monkeypatch.setattr(durable, "_call_system", faults := Faults(at, error))
        try:
            new.save(target, force=True)
        except BaseException as caught:
            assert caught is error
        if faults.calls < at:
            break
        monkeypatch.setattr(durable, "_call_system", Faults())
        if target.exists():
            jaxensemble.verify(target)
            loaded = Ensemble.load(target)
            assert same_bits(loaded, new) or (replace and same_bits(loaded, old))
        else:
            assert not replace
        removing = faults.failed in (os.unlink, os.rmdir)  # the old artifact: the new one is on the disk
        if not isinstance(error, Killed):
            assert same_bits(Ensemble.load(target), new if removing else old) if replace else not target.exists()
        left = [entry.name for entry in tmp_path.iterdir() if entry != target]
        assert isinstance(error, Killed) or len(left) <= removing, left
        (tmp_path / "other").mkdir(exist_ok=True)
        new.save(target, force=True)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["net", "other"]
        (tmp_path / "other").rmdir()
    assert at > (24 if replace else 18)  # with five kinds of faults, more than 200 points


def test_only_ones_own_leftovers_are_removed(tmp_path: Path) -> None:
    kept = [".net.tmp-notes", ".net.tmp-" + "0" * 31, ".other.tmp-" + "0" * 32, "net.tmp-" + "0" * 32]
    for name in [*kept, ".net.tmp-" + "0" * 32]:
        (tmp_path / name).mkdir()
    (tmp_path / (".net.tmp-" + "1" * 32)).write_text("a file")
    (stale := tmp_path / (".net.tmp-" + "2" * 32)).mkdir()
    (stale / "thesis.txt").write_text(
        "years of work"
    )  # as if a process was killed before it looked at the moved directory
    kept.append(stale.name)
    with durable.new_directory(tmp_path / "net", {"a"}) as folder:
        durable.write_new_file(folder / "a", [b"a"])
    assert (stale / "thesis.txt").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {*kept, "net", ".net.tmp-" + "1" * 32}


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "net"
    with durable.new_directory(target, {"a"}, replace=True) as first:
        durable.write_new_file(first / "a", [b"first"])
        with durable.new_directory(target, {"a"}, replace=True) as second:
            durable.write_new_file(second / "a", [b"second"])
        assert (target / "a").read_bytes() == b"second"
    assert (target / "a").read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
def test_what_others_put_there_meanwhile_is_kept(tmp_path: Path, before: bool, replace: bool) -> None:
    target = tmp_path / "net"
    if before:
        target.mkdir()
        (target / "a").write_text("old")
    with (
        pytest.raises(InputError, match="is not replaced"),
        durable.new_directory(target, {"a"}, replace=replace) as new,
    ):
        durable.write_new_file(new / "a", [b"new"])
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("years of work")
    assert (target / "thesis.txt").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [target] and (target / "a").exists() == before


def test_links_are_no_files_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path)
    (tmp_path / "a").write_text("")
    assert durable.unexpected_entries(tmp_path, {"a", "b"}) == ["b"]


def test_a_directory_taken_for_a_leftover_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = durable._lock, []

    def late(descriptor: int) -> bool | None:
        if not taken:  # another process has cleaned up between this one's `mkdir` and its lock
            taken.extend(tmp_path.iterdir())
            taken[0].rmdir()
        return lock(descriptor)

    monkeypatch.setattr(durable, "_lock", late)
    with durable.new_directory(tmp_path / "net", {"a"}) as folder:
        durable.write_new_file(folder / "a", [b"a"])
    assert list(tmp_path.iterdir()) == [tmp_path / "net"] and len(taken) == 1


def test_a_file_system_without_exchange_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "net"
    target.mkdir()
    (target / "a").write_text("old")

    class Without:
        def renameat2(self, *_: Any) -> int:
            durable.ctypes.set_errno(errno.EINVAL)
            return -1

        renamex_np = renameat2

    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: Without())
    with pytest.raises(InputError, match="cannot replace a directory in one step"):
        with durable.new_directory(target, {"a"}, replace=True):
            pass
    assert (target / "a").read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptors of directories, no locks, no exchange; a rename replaces nothing, not even empty directories."""
    rename = os.rename

    def strict(source: Path, target: Path) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        rename(source, target)

    monkeypatch.setattr(durable, "_DIRECTORY", None)
    monkeypatch.setattr(durable, "_libc", lambda: None)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(durable.os, "rename", strict)


@pytest.mark.usefixtures("windows")
def test_a_system_without_locks_and_exchange_writes_what_is_new(tmp_path: Path) -> None:
    target = tmp_path / "net"
    target.mkdir()  # empty, which may be replaced
    (leftover := tmp_path / (".net.tmp-" + "0" * 32)).mkdir()
    with durable.new_directory(target, {"a"}) as folder:
        durable.write_new_file(folder / "a", [b"new\n"])
    durable.write_file(tmp_path / "b", b"file\n")
    durable.write_file(tmp_path / "b", b"file, replaced\n")
    assert (target / "a").read_bytes() == b"new\n" and (tmp_path / "b").read_bytes() == b"file, replaced\n"
    assert leftover.exists()  # nobody knows whether its process is alive


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("replace", [False, True])
def test_a_system_without_exchange_refuses_to_replace(tmp_path: Path, replace: bool) -> None:
    target = tmp_path / "net"
    target.mkdir()
    (target / "a").write_text("old")
    reason = "cannot replace a directory in one step" if replace else "exists now, and is not replaced"
    with pytest.raises(InputError, match=reason), durable.new_directory(target, {"a"}, replace=replace) as folder:
        durable.write_new_file(folder / "a", [b"new"])
    assert (target / "a").read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize(
    "error", ERRORS[1:], ids=lambda error: getattr(error, "strerror", None) or type(error).__name__
)
def test_a_fault_without_descriptors_leaves_nothing(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 8):
        monkeypatch.setattr(durable, "_call_system", faults := Faults(at, error))
        with contextlib.suppress(type(error)), durable.new_directory(tmp_path / "net", {"a"}) as folder:
            durable.write_new_file(folder / "a", [b"new"])
        assert (faults.calls < at) == (tmp_path / "net").exists()
        assert len(list(tmp_path.iterdir())) == (faults.calls < at)
        if faults.calls < at:
            return
    pytest.fail("the directory was never written")


def test_the_system_calls_are_looked_for_where_they_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(durable.sys, "platform", "win32")
    assert durable._libc() is None
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with durable._open_directory(tmp_path) as opened:
        assert durable._lock(opened.descriptor) is None


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = durable.os.write
    monkeypatch.setattr(durable.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    size, digest = durable.write_new_file(tmp_path / "a", [b"01234567", b"", b"89"])
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert (size, digest) == (10, durable.hashlib.sha256(b"0123456789").hexdigest())


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "space"])
def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "a"
    for at in range(1, 6):
        monkeypatch.setattr(durable, "_call_system", Faults())
        durable.write_file(target, b"old")
        monkeypatch.setattr(durable, "_call_system", Faults(at, error))
        with pytest.raises(type(error)):
            durable.write_file(target, b"new")
        assert target.read_bytes() == (b"new" if at == 5 else b"old")
        assert list(tmp_path.iterdir()) == [target]
