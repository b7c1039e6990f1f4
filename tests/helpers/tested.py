"""The table in README of versions and the tests that passed with them.

`python -m tests.helpers.tested` writes it again.
"""

import datetime
import json
import platform
import re
from pathlib import Path
from typing import Any

from jaxensemble.terminal import installed_version
from tests.helpers.artifacts import ROOT

ROWS = ROOT / "jaxensemble" / "tested_with.json"
PAGE = ROOT / "README.md"
COLUMNS = {"python": "Python", "jax": "JAX", "flax": "Flax", "torch": "PyTorch", "passed": "tests", "date": "on"}
KEY = ("python", "jax", "torch")

_TABLE = re.compile(r"(<!-- tested with -->\n).*?(<!-- end -->)", re.DOTALL)


def record(path: Path, passed: int) -> None:
    """Adds this process's versions to the rows of a file, in place of the row with the same minor versions."""
    versions = {
        name: (installed_version(name) or "").partition("+")[0] or None for name in ("jax", "flax", "numpy", "torch")
    }
    row = {"python": platform.python_version(), **versions, "passed": passed, "date": str(datetime.date.today())}
    others = [other for other in json.loads(path.read_text()) if _minors(other) != _minors(row)]
    rows = sorted([*others, row], key=lambda row: [_numbers(row[name]) for name in KEY])
    path.write_text("[\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n]\n")


def page(text: str) -> str:
    """Returns the page with a table of the current rows."""
    rows = [{**row, "torch": row["torch"] or "-"} for row in json.loads(ROWS.read_text())]
    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(str(row[name]) for name in COLUMNS) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    return _TABLE.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def _minors(row: dict[str, Any]) -> list[list[int]]:
    return [_numbers(row[name])[:2] for name in KEY]


def _numbers(version: str | None) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version or "")]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
