"""`Proof`: what an ensemble keeps of the comparison with PyTorch that it passed when it was ported."""

import dataclasses
import math
from collections.abc import Mapping

from jaxensemble.errors import InputError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One thing that was compared: the error found, and the largest that passes."""

    stage: str
    case: str
    error: float
    limit: float


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was compared with PyTorch, when, and with which versions. All of it passed, or there would be no proof.

    It belongs to the very arrays that were compared. An ensemble made from another, by a change of weights or of mode,
    by slicing or by any JAX transformation, has none. Of an ensemble that was loaded it is what its file says.

    `x64`: whether JAX had 64-bit types on. If so it says nothing of 32-bit integers, which overflow elsewhere.
    """

    date: str
    versions: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    x64: bool = False


@dataclasses.dataclass(frozen=True)
class Lineage:
    """The proof of the ensemble that another one was made from, and whether it was trained from it.

    It says nothing of the outputs by now, unlike a proof: weights, members or the mode have changed since.
    """

    proof: Proof
    trained: bool


def check_proof(proof: Proof, where: str = "proof") -> None:
    """Whether a proof, which may come from a file, proves anything.

    **Raises:** `InputError` if it lists no comparison, or any that did not pass.

    >>> check_proof(Proof("2026-01-01", {}, (Comparison("float64", "loop", error=1.0, limit=1e-12),)))
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: proof: not passed: 'float64', 'loop': error 1.0 beside a limit of 1e-12
    """
    failed = [
        f"{row.stage!r}, {row.case!r}: error {row.error} beside a limit of {row.limit}"
        for row in proof.comparisons
        if not (math.isfinite(row.error) and row.error <= row.limit)
    ]
    if failed or not proof.comparisons:
        raise InputError(f"{where}: not passed: {'; '.join(failed) or 'nothing was compared'}")
