"""Counts of `docs/trust.md`, made from `benchmarks/results/`."""

import json
from typing import Any

from benchmarks.pages import replace_part
from benchmarks.results import RESULTS, ROOT

PAGE = ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- counts: python -m benchmarks.trust page -->", "<!-- end of counts -->"

STATUSES = ("caught", "raised", "missed", "equal")


def page(text: str) -> str:
    """Returns the page with counts from the current results."""
    return replace_part(text, BEGIN, END, _counts())


def _counts() -> str:
    parts = [text(json.loads(path.read_text())) for name, text in _PARTS.items() if (path := RESULTS / name).exists()]
    return "\n\n".join(parts)


def _when(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "jax", "flax"))
    return f"{found['date']}, {versions}"


def _fuzz(found: dict[str, Any]) -> str:
    statuses = ", ".join(f"{count:,} {status}" for status, count in sorted(found["statuses"].items()))
    steps = ", ".join(f"{name} {count}" for name, count in sorted(found["steps"].items()))
    return (
        f"**Random networks** ({_when(found)}): {found['networks']:,} drawn; {statuses}.\n\n"
        f"Networks that passed, by their parts: {steps}."
    )


def _mutants(found: dict[str, Any]) -> str:
    head = ("planted error", *STATUSES)
    rows = [(name, *(str(kind.get(status, 0)) for status in STATUSES)) for name, kind in found["kinds"].items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---", *["---:"] * len(STATUSES)), *rows])
    return (
        f"**Planted errors** ({_when(found)}): {found['caught']:,} caught, {found['named']:,} of them with the module "
        "named. *Raised*: porting itself failed. *Equal*: the error changes no output, also for other "
        f"inputs.\n\n{table}"
    )


_PARTS = {"fuzz.json": _fuzz, "mutants.json": _mutants}
