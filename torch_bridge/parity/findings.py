"""The findings of a check: rows, notes, and outputs that prove little."""

from collections.abc import Collection

from torch_bridge.parity.result import Row


class Findings:
    """The findings of the stages so far.

    - `rows`: comparisons.
    - `notes`: remarks on comparisons that were not possible, or that prove little.
    - `silent`: outputs that prove little, by place.
    - `rounding`: outputs that are mostly rounding for the inputs themselves, by place.
    """

    def __init__(self, notes: list[str]) -> None:
        self.rows: list[Row] = []
        self.notes = notes
        self.silent: set[str] = set()
        self.rounding: set[str] = set()

    def add(self, found: list[Row] | str) -> None:
        """Adds the rows of a stage, or the note that says why it has none."""
        if isinstance(found, str):
            self.notes.append(found)
        else:
            self.rows += found


def case_name(what: str, place: str, places: Collection[str]) -> str:
    """The name of a comparison, with the place of the output where there are several outputs."""
    return f"{what}, {place}" if len(places) > 1 else what
