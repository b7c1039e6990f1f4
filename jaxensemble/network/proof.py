"""`Proof`: the record of the comparison with PyTorch that an ensemble passed when it was ported."""

import dataclasses
import math
from collections.abc import Mapping

from jaxensemble.errors import InputError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison: the error that was found, and the largest error that passes."""

    stage: str
    case: str
    error: float
    limit: float


@dataclasses.dataclass(frozen=True)
class Proof:
    """Comparisons with PyTorch, their date and the versions. All comparisons passed, or there would be no proof.

    A proof belongs to the arrays that were compared. An ensemble made from another one, by a change of weights or of
    mode, by slicing or by any JAX transformation, has no proof. A loaded ensemble has the proof that its file states.

    `x64`: whether JAX had 64-bit types on. If so, the proof says nothing about 32-bit integers, which overflow sooner.
    """

    date: str
    versions: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    x64: bool = False


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Proof of the ensemble from which this ensemble was made, and whether this ensemble was trained from that one.

    Unlike a proof, a lineage says nothing about the present outputs: weights, members or the mode have changed since.
    """

    proof: Proof
    trained: bool


def check_proof(proof: Proof, where: str = "proof") -> None:
    """Checks that a proof, which may come from a file, lists comparisons and that all of them passed.

    **Raises:** `InputError` for a proof without comparisons, and for a comparison that did not pass.

    >>> check_proof(Proof("2026-01-01", {}, (Comparison("float64", "loop", error=1.0, limit=1e-12),)))
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: proof: not passed: 'float64', 'loop': error 1.0, limit 1e-12
    """
    failed = [
        f"{row.stage!r}, {row.case!r}: error {row.error}, limit {row.limit}"
        for row in proof.comparisons
        if not (math.isfinite(row.error) and row.error <= row.limit)
    ]
    if failed or not proof.comparisons:
        raise InputError(f"{where}: not passed: {'; '.join(failed) or 'nothing was compared'}")
