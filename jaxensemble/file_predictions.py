"""The predictions of a saved ensemble for the rows of a file: all at once if they are few, else in blocks."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxensemble.array_files import (
    arguments_from_arrays,
    output_leaves,
    storable_array,
    storable_dtype,
    write_arrays,
)
from jaxensemble.compat import broadcast_one_to_all
from jaxensemble.devices.placement import gather
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, JaxEnsembleError
from jaxensemble.network.network import Network, Ref, references
from jaxensemble.row_blocks import GrowingFile, Progress, RowFile, blocks_of, choose_rows
from jaxensemble.terminal import show_rows
from jaxensemble.uncertainty import ClassPrediction
from jaxensemble.uncertainty.checks import warn_of_lost_rows
from jaxensemble.uncertainty.predictions import find_nan

SHOWN = 10
"""The rows whose figures are kept where not all are asked for."""


@dataclasses.dataclass
class Result:
    """The results for the rows of a file.

    - `shapes`: the dtype and shape of each output. `outputs`: outputs that are kept in memory.
    - `figures`: the figures of the prediction by name, of the first rows at least; `rows` is the number of rows so far.
    """

    shapes: dict[str, tuple[str, list[int]]] = dataclasses.field(default_factory=dict)
    outputs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    figures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A prediction for the rows of a file.

    - `read`: a function that reads outputs as a prediction, or gives None.
    - `rows`: the rows of a block; None for a number that suits their size.
    - `out`, `probabilities`: the files for outputs and for the probabilities of all members together.
    - `keeps_all`: whether outputs that are not written, and the figures of all rows, are results.
    - `writes`: whether this process writes and shows what is done; of several processes, one does.
    - `work`: all that decides the results, in plain values, for a run that goes on where another stopped.
    """

    network: Network
    file: RowFile
    read: Callable[[Any], Any]
    cast: bool
    seed: int | None
    rows: int | None
    out: Path | None
    probabilities: Path | None
    keeps_all: bool
    work: Any
    writes: bool = True

    def run(self, ensemble: Ensemble, *, resume: bool) -> Result:
        """Returns the results, after writing those that files are for.

        After an interruption the part that is written stays, for a run with `resume`; after an error, nothing does.

        **Raises:** `InputError` for inputs that do not fit, for one file for two things, and where a run cannot go on.
        """
        if (
            self.out is not None
            and self.probabilities is not None
            and self.out.resolve() == self.probabilities.resolve()
        ):
            raise InputError("--out and --probabilities must be two files")
        total, row_bytes = self.file.sizes(self._axes)
        size = choose_rows(self.rows, row_bytes)
        call = self._padded(ensemble, size) if total is not None and total > size else None
        if call is not None and total is not None:
            return self._run_blocks(call, total, size, resume=resume)
        if resume:
            raise InputError("--resume is for files of more rows than one block: run again without it")
        returned = ensemble(*self._arguments(0, total), key=self._key(None))
        result = _Collected(self, total or 0)
        result.add(0, returned)
        return result.end()

    def _run_blocks(self, call: Callable[..., Any], total: int, size: int, *, resume: bool) -> Result:
        files = [GrowingFile(path, axis) for path, axis in ((self.out, 1), (self.probabilities, 0)) if path is not None]
        growing = [file for file in files if file.path.suffix == ".npy"]
        progress = Progress(growing if self.writes else [], self.work, total)
        if resume and (self.keeps_all or len(growing) < len(files) or not files):
            raise InputError("--resume needs --out or --probabilities, each an .npy file, and no --json")
        reached = first = progress.begin(resume=resume)
        if jax.process_count() > 1:  # all begin where the one that writes does
            reached = first = int(broadcast_one_to_all(np.int32(first)))
        result = _Collected(self, total, {file.path: file for file in growing})
        try:
            with show_rows(total, first) if self.writes else contextlib.nullcontext(lambda done: None) as show:
                for start, last in blocks_of(first, total, size):
                    result.add(start, call(*self._arguments(start, last), key=self._key(start // size)))
                    reached = last
                    progress.done(last)
                    show(last)
        except (JaxEnsembleError, OSError):
            progress.end(whole=False)
            raise
        except KeyboardInterrupt as error:
            kept = ": the same command with --resume goes on from there" if growing and self.writes else ""
            raise KeyboardInterrupt(f"interrupted after {reached:,} of {total:,} rows{kept}") from error
        progress.end(whole=True)
        return result.end()

    def _padded(self, ensemble: Ensemble, size: int) -> Callable[..., Any] | None:
        """The ensemble for blocks of rows; None for a network that has to see all rows at once.

        **Raises:** `InputError` for such a network if the number of rows was given.
        """
        call = ensemble.padded(size)
        try:
            axes = call.output_axes(*self._arguments(0, size), key=self._key(0))
            if any(axis != 0 for axis in axes):
                raise InputError("an output of the network does not have the rows first")
        except InputError as error:
            if self.rows is not None:
                raise InputError(f"--rows: {error.details}") from error
            return None
        return call

    def _arguments(self, first: int, last: int | None) -> list[Any]:
        arrays = self.file.rows(first, last, self._axes)
        return arguments_from_arrays(self.network, arrays, cast=self.cast)

    def _key(self, block: int | None) -> Any:
        """The random key of a block; one for all rows where they run at once."""
        if self.seed is None:
            return None
        key = jax.random.key(self.seed)
        return key if block is None else jax.random.fold_in(key, block)

    @property
    def _axes(self) -> dict[str, int | None]:
        """The axis of rows of each array in the file, by its name there; None where the network has none."""
        names = [ref.name for ref in references(self.network.inputs) if isinstance(ref, Ref)]
        shapes = {name: self.network.input_shapes.get(name, ()) for name in names}
        shapes |= {f"arr_{k}": shapes[name] for k, name in enumerate(names)}
        found = {name: shapes.get(name, ()) for name in self.file.arrays}  # unknown names are refused with the others
        return {name: shape.index(None) if None in shape else None for name, shape in found.items()}


class _Collected:
    """The results so far."""

    def __init__(self, job: Job, total: int, files: Mapping[Path, GrowingFile] | None = None):
        self._job, self._total, self._files = job, total, files or {}
        self._outputs: dict[str, list[np.ndarray]] = {}
        self._figures: dict[str, list[np.ndarray]] = {}
        self._means: list[np.ndarray] = []
        self._lost: tuple[set[int], list[int]] = set(), []
        self._result = Result()

    def add(self, first: int, returned: Any) -> None:
        """Adds the results of the rows from `first` on: into files, or into memory."""
        job, prediction = self._job, self._job.read(returned)
        leaves = output_leaves(returned)
        for name, leaf in leaves.items():
            shape = [leaf.shape[0], self._total, *leaf.shape[2:]] if self._files or first else list(leaf.shape)
            self._result.shapes[name] = str(storable_dtype(leaf)), shape
        if job.out in self._files:
            self._write(job.out, first, storable_array(next(iter(leaves.values()))))
        elif job.out is not None or prediction is None or job.keeps_all:
            for name, leaf in leaves.items():
                self._outputs.setdefault(name, []).append(storable_array(leaf))
        if prediction is None:
            return
        lost = np.asarray(gather(find_nan(prediction)))
        rows = lost.shape[1]
        self._note_lost(first, lost)
        if job.probabilities in self._files:
            self._write(job.probabilities, first, np.asarray(gather(prediction.mean)))
        elif job.probabilities is not None:
            self._means.append(np.asarray(gather(prediction.mean)))
        # Of a run that goes on, the first rows are not known.
        if job.keeps_all or self._result.rows == first < SHOWN:
            for name, figure in figures_of(prediction).items():
                self._figures.setdefault(name, []).append(figure if job.keeps_all else figure[: SHOWN - first])
        self._result.rows = first + rows

    def end(self) -> Result:
        """Returns the results, and writes files that are written at once."""
        members, rows = self._lost
        writes = self._job.writes
        warn_of_lost_rows(sorted(members), rows, self._result.rows, stacklevel=2)
        outputs = {
            name: np.concatenate(parts, 1) if len(parts) > 1 else parts[0] for name, parts in self._outputs.items()
        }
        if writes and self._job.out is not None and outputs:
            write_arrays(self._job.out, outputs)
        if writes and self._means and self._job.probabilities is not None:
            write_arrays(self._job.probabilities, {"probabilities": np.concatenate(self._means)})
        figures = {name: np.concatenate(parts) for name, parts in self._figures.items()}
        return dataclasses.replace(self._result, outputs=outputs, figures=figures)

    def _write(self, path: Path | None, first: int, block: np.ndarray) -> None:
        assert path is not None
        if self._job.writes:
            self._files[path].write(first, block, self._total)

    def _note_lost(self, first: int, lost: np.ndarray) -> None:
        members, rows = self._lost
        members.update(np.flatnonzero(lost.any(1)).tolist())
        rows.extend((first + np.flatnonzero(lost.any(0))).tolist())


def figures_of(prediction: Any) -> dict[str, np.ndarray]:
    """The printed figures of a prediction, each `[N]`, or `[N, ...]` for a quantity."""
    names = {"mean": "mean", "std": "std"}
    if isinstance(prediction, ClassPrediction):
        names = {"class": "soft_vote", "confidence": "confidence", "entropy": "predictive_entropy"}
    figures = {shown: np.asarray(gather(getattr(prediction, name))) for shown, name in names.items()}
    if "class" in figures and np.isnan(figures["confidence"]).any():  # an integer cannot say that there is none
        figures["class"] = np.where(np.isnan(figures["confidence"]), "nan", figures["class"].astype(object))
    return figures
