"""Tables of `docs/speed.md`, made from `benchmarks/results/` by `python -m benchmarks.speed.figures`."""

import collections
import json
from pathlib import Path
from typing import Any

from benchmarks.pages import replace_part
from benchmarks.results import RESULTS, ROOT
from benchmarks.speed.suites import SUITES
from torch_bridge.timing import Ratio
from torch_bridge.timing.pictures import draw_curves

PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- figures: python -m benchmarks.speed.figures -->", "<!-- end of figures -->"


def figures() -> str:
    """Returns a table for every suite that was timed."""
    files = [path for suite in SUITES for path in sorted(RESULTS.glob(f"{suite}-*.json")) if _suite(path) == suite]
    return "\n\n".join([*map(_table, files), *map(_memory, sorted(RESULTS.glob("memory-*.json")))])


def _suite(path: Path) -> str:
    """Returns the longest suite name that a file begins with: both `tutorial` and `tutorial-short` are suites."""
    return max((suite for suite in SUITES if path.stem.startswith(f"{suite}-")), key=len)


def _table(path: Path) -> str:
    content = json.loads(path.read_text())
    machines = dict.fromkeys(_machine(report["environment"]) for report in content["cases"].values())
    where = f"`{path.name}`: {'; '.join(machines)}"
    head = ("members x rows", "fastest of PyTorch's", "", "ours", "times as fast", "than `jax.vmap`", "control", "plan")
    lines = [head, ("---", "---", "---:", "---:", "---:", "---:", "---:", "---"), *map(_row, content["cases"].items())]
    picture = path.with_suffix(".png")
    drawn = [f"![time by size](../benchmarks/results/{picture.name})", ""] if picture.exists() else []
    return "\n".join([where, "", *drawn, *(f"| {' | '.join(line)} |" for line in lines)])


def _memory(path: Path) -> str:
    content = json.loads(path.read_text())
    rows = [tuple(map(str, row.values())) for row in content["rows"]]
    lines = [tuple(content["rows"][0]), ("---",) * 3 + ("---:",) * (len(rows[0]) - 3), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"`{path.name}`, a training step: {_machine(content['environment'])}\n\n{table}"


def _machine(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "jax", "flax"))
    device = found["jax_device"] if found["device"] != "cpu" else found["processor"]
    return f"{device}, {found['threads']} threads, {versions}, {found['date'][:10]}"


def _row(item: tuple[str, Any]) -> tuple[str, ...]:
    name, report = item
    times = {variant["name"]: variant for variant in report["variants"]}
    best = report["best"]
    if best is None:
        failures = "; ".join(f"{v['name']}: {v['failure']}" for v in report["variants"] if v["failure"])
        return (name, f"failed: {failures[:100]}", *[""] * 6)
    ours, theirs = times[best["ours"]], times[best["theirs"]]
    return (
        name,
        best["theirs"],
        _milliseconds(theirs["median"]),
        _milliseconds(ours["median"]),
        _interval(best),
        _value(_ratio(report["plain"]), 1) if report["plain"] else "",
        f"{report['control']['low']:.2f} to {report['control']['high']:.2f}" if report["control"] else "",
        f"`{ours['note'].removeprefix('measured: ').partition(': ')[0]}`" if ours["note"] else "",
    )


def _interval(found: dict[str, Any]) -> str:
    ratio = _ratio(found)
    return f"{_value(ratio, 2)} ({ratio.low:.2f} to {ratio.high:.2f})"


def _value(ratio: Ratio, digits: int) -> str:
    return "withheld" if ratio.withheld else f"{ratio.value:.{digits}f}"


def _ratio(found: dict[str, Any]) -> Ratio:
    return Ratio(*(found[name] for name in ("ours", "theirs", "value", "low", "high", "rounds")))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def draw(path: Path) -> None:
    """Draws the scaling suite's curves next to its file: the time of one member's call by members and by rows."""
    panels: Any = collections.defaultdict(lambda: collections.defaultdict(dict))
    for name, report in json.loads(path.read_text())["cases"].items():
        network, _, sizes = name.partition(", ")
        members, rows = map(int, sizes.split(" x "))
        times = {variant["name"]: variant["median"] for variant in report["variants"] if not variant["failure"]}
        if report["best"] is None:
            continue
        shown = {"jaxensemble": "jaxensemble", "jax.vmap": "jax.jit(jax.vmap)", "PyTorch": report["best"]["theirs"]}
        for label, variant in shown.items():
            if variant in times and rows == 64:
                panels[f"{network}: members, of 64 rows"][label][members] = times[variant] / members
            if variant in times and members == 10:
                panels[f"{network}: rows, of 10 members"][label][rows] = times[variant] / members
    ordered = {
        panel: {label: dict(sorted(points.items())) for label, points in lines.items()}
        for panel, lines in sorted(panels.items())
    }
    draw_curves(ordered, path.with_suffix(".png"), "one member's call, ms")


def page(text: str) -> str:
    """Returns the page with tables from the current results."""
    return replace_part(text, BEGIN, END, figures())


if __name__ == "__main__":
    for found in RESULTS.glob("scaling-*.json"):
        draw(found)
    PAGE.write_text(page(PAGE.read_text()))
