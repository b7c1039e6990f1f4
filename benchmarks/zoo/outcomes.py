"""Outcomes of the operators of PyTorch's database: see `benchmarks.zoo.operators`."""

import dataclasses
from pathlib import Path

from benchmarks.results import RESULTS, read_lines

FILE = RESULTS / "operators.jsonl"

STATUSES = ("exact", "left out", "refused", "missing", "wrong", "crashed")
"""From best to worst. Left out is what cannot be compared: random numbers, and samples without dense tensors."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one operator: the worst status of its samples, how many are exact, and why others are not.

    `missing` are the operations without a rule.
    """

    name: str
    status: str
    samples: int = 0
    exact: int = 0
    missing: tuple[str, ...] = ()
    reason: str = ""


def load(file: Path = FILE) -> dict[str, Outcome]:
    """Returns the last outcome of each operator."""
    found = {}
    for fields in read_lines(file):
        found[fields["name"]] = Outcome(**{**fields, "missing": tuple(fields["missing"])})
    return found
