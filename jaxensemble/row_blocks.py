"""Files of more rows than memory holds: read in blocks, and written under other names until whole."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxensemble.array_files import read_arrays
from jaxensemble.errors import InputError
from jaxensemble.files.durable import write_file

MOST_ROWS, MOST_BYTES = 1024, 16 << 20
"""The most rows of a block, and bytes of its inputs, where a caller names no number of rows."""


INTERVAL = 1.0
"""The least seconds between two notes of what is written: a run that goes on repeats at most the blocks since then."""


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The arrays of a file, of which an .npy file is mapped once more for each block, so that memory stays flat.

    - `arrays`: of an .npy file mapped, of an .npz file in memory.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def open(cls, path: Path) -> "RowFile":
        """Opens a file.

        **Raises:** `InputError` for a file without arrays.
        """
        if path.suffix == ".npy":
            with contextlib.suppress(ValueError, EOFError):  # the error below says more
                return cls(path, {"arr_0": np.load(path, mmap_mode="r", allow_pickle=False)})
        return cls(path, read_arrays(path))

    def rows(self, first: int, last: int | None, axes: Mapping[str, int | None]) -> dict[str, np.ndarray]:
        """Returns the rows before `last`, or all for None, of every array; the whole of arrays without rows."""
        mapped = isinstance(next(iter(self.arrays.values())), np.memmap)
        arrays = {"arr_0": np.load(self.path, mmap_mode="r")} if mapped else self.arrays
        return {
            name: array
            if (axis := axes[name]) is None
            else np.array(array[(slice(None),) * axis + (slice(first, last),)])
            for name, array in arrays.items()
        }

    def sizes(self, axes: Mapping[str, int | None]) -> tuple[int | None, int]:
        """Returns the number of rows, None if arrays differ in it or have none, and the bytes of one row."""
        pairs = [(array, axis) for name, array in self.arrays.items() if (axis := axes[name]) is not None]
        counts = {array.shape[axis] if axis < array.ndim else None for array, axis in pairs}
        count = counts.pop() if len(counts) == 1 else None
        return count, sum(array.nbytes for array, _ in pairs) // max(count or 0, 1)


def choose_rows(given: int | None, row_bytes: int) -> int:
    """Returns the number of rows of a block."""
    return max(1, min(MOST_ROWS, MOST_BYTES // max(row_bytes, 1))) if given is None else given


class GrowingFile:
    """An .npy file that is written block by block. Until it is whole, its name begins with a dot and ends in .partial.

    - `axis`: the axis of rows.
    """

    def __init__(self, path: Path, axis: int):
        self.path, self.axis = path, axis
        self.partial = path.with_name(f".{path.name}.partial")

    def write(self, first: int, block: np.ndarray, rows: int) -> None:
        """Writes a block that begins at row `first`, of `rows` in all."""
        shape = (*block.shape[: self.axis], rows, *block.shape[self.axis + 1 :])
        if first == 0:
            self.partial.unlink(missing_ok=True)
            mapped = np.lib.format.open_memmap(self.partial, "w+", block.dtype, shape)
            self._reserve()
        else:
            mapped = np.lib.format.open_memmap(self.partial, "r+")
            if mapped.shape != shape or mapped.dtype != block.dtype:
                raise InputError(
                    f"`{self.partial}` holds {mapped.dtype}{list(mapped.shape)}: run again without --resume"
                )
        last = first + block.shape[self.axis]
        mapped[(slice(None),) * self.axis + (slice(first, last),)] = block

    def _reserve(self) -> None:
        """Has the system set the whole file aside: of a full disk, a mapped file would not say more than SIGBUS.

        **Raises:** `OSError` if there is no room.
        """
        if hasattr(os, "posix_fallocate"):
            with self.partial.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, self.partial.stat().st_size)

    def flush(self) -> None:
        """Has the system put what was written onto the disk."""
        with self.partial.open("rb+") as file:
            os.fsync(file.fileno())

    def put_in_place(self) -> None:
        """Gives the whole file its name."""
        self.partial.replace(self.path)

    def remove(self) -> None:
        """Removes what was written."""
        self.partial.unlink(missing_ok=True)


class Progress:
    """The rows that are written already, on disk beside the files, for a run that goes on from there.

    `work` says all that decides the results: a run with other work does not go on.
    """

    def __init__(self, files: list[GrowingFile], work: Any, rows: int):
        self._files, self._rows = files, rows
        self._note = files[0].path.with_name(f".{files[0].path.name}.progress") if files else None
        self._noted = -INTERVAL
        self._work = hashlib.sha256(json.dumps(work, sort_keys=True, default=str).encode()).hexdigest()

    def begin(self, *, resume: bool) -> int:
        """Returns the row to begin with. A run from the first row leaves no note of an earlier one.

        **Raises:** `InputError` for files of other work.
        """
        if self._note is None:
            return 0
        done = self._noted_rows() if resume and self._note.exists() else 0
        done = done if all(file.partial.exists() for file in self._files) else 0
        if not done:
            self._note.unlink(missing_ok=True)
        return done

    def _noted_rows(self) -> int:
        assert self._note is not None
        try:
            found = json.loads(self._note.read_text())
            done, work = found["done"], found["work"]
        except (ValueError, TypeError, KeyError):
            done, work = None, None
        if work != self._work or type(done) is not int or not 0 <= done <= self._rows:
            raise InputError(
                f"`{self._note}` is of another run: of another artifact, input or options. Run without --resume"
            )
        return done

    def done(self, rows: int) -> None:
        """Notes that so many rows are written, if the last note is older than `INTERVAL`."""
        if self._note is not None and time.monotonic() >= self._noted + INTERVAL:
            for file in self._files:
                file.flush()
            self._noted = time.monotonic()
            write_file(self._note, json.dumps({"done": rows, "work": self._work}).encode())

    def end(self, *, whole: bool) -> None:
        """Gives the files their names if they are whole, and removes them if not."""
        for file in self._files:
            file.put_in_place() if whole else file.remove()
        if self._note is not None:
            self._note.unlink(missing_ok=True)


def blocks_of(first: int, rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the first row of each block, and the row after its last.

    >>> list(blocks_of(4, 10, 4))
    [(4, 8), (8, 10)]
    """
    yield from ((start, min(start + size, rows)) for start in range(first, rows, size))
