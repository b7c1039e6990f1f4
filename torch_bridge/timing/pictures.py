"""Timings as pictures."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Bar(NamedTuple):
    """Way of running: its name, its framework (`jax` or `torch`), and seconds: the median and the quartiles."""

    name: str
    framework: str
    median: float
    quartiles: tuple[float, float]


def draw_bars(bars: Iterable[Bar], path: Path) -> None:
    """Draws the bars, the fastest on top, in a colour for each framework."""
    from matplotlib.figure import Figure

    ran = sorted(bars, key=lambda bar: -bar.median)
    figure = Figure(figsize=(8, 0.6 + 0.35 * len(ran)), layout="constrained")
    axes = figure.subplots()
    colours = {"jax": "tab:blue", "torch": "tab:orange"}
    axes.barh(
        [bar.name for bar in ran],
        [1e3 * bar.median for bar in ran],
        xerr=[
            [1e3 * (bar.median - bar.quartiles[0]) for bar in ran],
            [1e3 * (bar.quartiles[1] - bar.median) for bar in ran],
        ],
        color=[colours[bar.framework] for bar in ran],
    )
    axes.set_xlabel("one call of all members, ms")
    figure.savefig(path, dpi=150)


def draw_curves(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path, ylabel: str) -> None:
    """Draws seconds over sizes on log axes: a panel for every kind of size, a curve for every way of running."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for axes, (xlabel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.loglog(points.keys(), [1e3 * seconds for seconds in points.values()], marker="o", label=name)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend()
    figure.savefig(path, dpi=100)
