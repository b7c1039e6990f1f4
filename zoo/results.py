"""Results of the zoo as lines of JSON: appended one by one, so that a run which is stopped goes on where it was."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch_bridge.report import environment
from zoo.one import Result

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def append(file: Path, result: Result) -> None:
    """Adds a result, with date and versions."""
    found = environment()
    append_lines(file, [{**dataclasses.asdict(result), "date": found["date"][:10], "versions": found["versions"]}])


def load(file: Path) -> dict[str, Result]:
    """The last result of each network."""
    results: dict[str, Result] = {}
    names = {field.name for field in dataclasses.fields(Result)}
    for fields in lines(file):
        result = Result(**{name: value for name, value in fields.items() if name in names})
        results[result.name] = dataclasses.replace(result, input=tuple(result.input))
    return results


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines of JSON to a file, and waits until they are on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
        out.flush()
        os.fsync(out.fileno())


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes lines of JSON in the place of a file, in one step."""
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    append_lines(new, rows)
    new.replace(file)


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, if there is one. A last line that was torn off is as if it were not there."""
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
