"""Results of the zoo, a line of JSON for each network."""

import dataclasses
from pathlib import Path

from benchmarks.results import append_lines, read_lines
from benchmarks.zoo.one import Result
from torch_bridge.report import environment


def append(file: Path, result: Result) -> None:
    """Adds a result to a file, with date and versions."""
    found = environment()
    append_lines(file, [{**dataclasses.asdict(result), "date": found["date"][:10], "versions": found["versions"]}])


def load(file: Path) -> dict[str, Result]:
    """Returns the last result of each network."""
    results: dict[str, Result] = {}
    names = {field.name for field in dataclasses.fields(Result)}
    for fields in read_lines(file):
        result = Result(**{name: value for name, value in fields.items() if name in names})
        results[result.name] = dataclasses.replace(result, input=tuple(result.input))
    return results
