"""Results of the zoo as lines of JSON: appended one by one, so that a run which is stopped goes on where it was."""

import dataclasses
import json
import os
from pathlib import Path

from torch_bridge.report import environment
from zoo.one import Result

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def append(file: Path, result: Result) -> None:
    """Adds one line, and waits until it is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = environment()
    line = {**dataclasses.asdict(result), "date": found["date"][:10], "versions": found["versions"]}
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())


def load(file: Path) -> dict[str, Result]:
    """The last result of each network. A last line that was torn off is as if it were not there."""
    results: dict[str, Result] = {}
    names = {field.name for field in dataclasses.fields(Result)}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        result = Result(**{name: value for name, value in fields.items() if name in names})
        results[result.name] = dataclasses.replace(result, input=tuple(result.input))
    return results
