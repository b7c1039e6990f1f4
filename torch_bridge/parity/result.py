"""The result of a check: rows, each with an error and the largest error that passes."""

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxensemble.arrays import is_x64_on
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import StateError
from jaxensemble.network.proof import Comparison, Proof
from torch_bridge.report import draw_table, save_json

WEIGHTS = "weights"
"""The stage in which nothing is computed."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: the error, and the largest error that passes."""

    stage: str
    case: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and self.error < float("inf")


def compared_arrays(ensemble: Ensemble) -> list[jax.Array]:
    """The arrays of an ensemble that a comparison depends on."""
    return jax.tree.leaves((ensemble.params, ensemble.buffers, ensemble.constants))


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The result of `check`. It has `passed` if every row has, and prints as a table.

    - `rows`: every comparison.
    - `diverged`: on failure, the first module whose output differs from PyTorch's.
    - `notes`: comparisons that were not possible, with the reason; and the source of weights in checkpoint files that
      hold more than weights.
    - `x64`: whether JAX had 64-bit types on.
    """

    rows: tuple[Row, ...]
    diverged: str | None = None
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    x64: bool = dataclasses.field(default_factory=is_x64_on)
    _compared: Sequence[jax.Array] = dataclasses.field(default=(), repr=False, compare=False)  # the ensemble's arrays

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def proven(self, ensemble: Ensemble) -> Ensemble:
        """The ensemble that was compared, with its proof.

        **Raises:** `StateError` if the comparison failed, or if the ensemble has other arrays, for example after more
        training.
        """
        if not self.passed:
            raise StateError(f"there is no proof: the comparison failed\n{self.failures}")
        leaves = compared_arrays(ensemble)
        if len(leaves) != len(self._compared) or not all(map(operator.is_, leaves, self._compared)):
            raise StateError("this ensemble has other arrays than the one that was compared: check it")
        return ensemble.proven(proof_of([self]))

    def __str__(self) -> str:
        rows = [
            (row.stage, row.case, f"{row.error:.2e}", f"{row.limit:.2e}", "pass" if row.passed else "FAIL", row.note)
            for row in self.rows
        ]
        verdict = "passed" if self.passed else "FAILED"
        text = draw_table(f"Parity with PyTorch: {verdict}", ("stage", "against", "error", "limit", "", "worst"), rows)
        extra = [f"first difference: {self.diverged}"] if self.diverged else []
        return "\n".join([text, *extra, *(f"note: {note}" for note in self.notes)])

    @property
    def failures(self) -> str:
        """The rows that did not pass, one per line, and the first module that differs."""
        rows = [
            f"  {row.stage}, {row.case}: {row.error:.2e}, at most {row.limit:.2e} {f'({row.note})' if row.note else ''}"
            for row in self.rows
            if not row.passed
        ]
        return "\n".join([*map(str.rstrip, rows), *([f"First difference: {self.diverged}."] if self.diverged else [])])

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in self.rows]
        return {
            "passed": self.passed,
            "diverged": self.diverged,
            "notes": list(self.notes),
            "rows": rows,
            "environment": self.environment,
        }

    def save(self, path: str | Path) -> None:
        """Writes `to_json()` to a file."""
        save_json(path, self.to_json())


def proof_of(reports: Sequence[ParityReport]) -> Proof | None:
    """The proof that passed reports make together. Rows of one name, each about some members, give their worst.

    None where only weights were compared, for example for a network that draws random numbers in evaluation mode too.
    """
    if all(row.stage == WEIGHTS for report in reports for row in report.rows):
        return None
    worst: dict[tuple[str, str], Row] = {}
    for row in (row for report in reports for row in report.rows):
        known = worst.get((row.stage, row.case))
        if known is None or _closeness(row) > _closeness(known):
            worst[row.stage, row.case] = row
    environment = reports[0].environment
    rows = (Comparison(row.stage, row.case, float(row.error), float(row.limit)) for row in worst.values())
    return Proof(
        environment["date"], dict(environment["versions"]), tuple(rows), x64=any(report.x64 for report in reports)
    )


def _closeness(row: Row) -> float:
    """The ratio of an error to its limit. A limit of zero, which only equality passes, leaves the error."""
    return row.error / row.limit if row.limit else row.error
