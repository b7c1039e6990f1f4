"""Files of results: lines of JSON, appended one by one, so that a stopped run can go on."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxensemble.files.durable import write_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines of JSON to a file, and waits until they are on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
        out.flush()
        os.fsync(out.fileno())


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file with lines of JSON, in one step."""
    write_file(file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Reads the lines of a file, if it exists. An incomplete last line is left out."""
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
