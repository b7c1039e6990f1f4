"""Timings as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch_bridge.timing.result import Variant


def bars(variants: Sequence[Variant], path: Path) -> None:
    """A bar for every variant, the fastest on top; ours and PyTorch's in colours of their own."""
    from matplotlib.figure import Figure

    ran = sorted((v for v in variants if v.rounds), key=lambda v: -v.median)
    figure = Figure(figsize=(8, 0.6 + 0.35 * len(ran)), layout="constrained")
    axes = figure.subplots()
    colours = {"jax": "tab:blue", "torch": "tab:orange"}
    axes.barh(
        [v.name for v in ran],
        [1e3 * v.median for v in ran],
        xerr=[
            [1e3 * (v.median - v.quartiles[0]) for v in ran],
            [1e3 * (v.quartiles[1] - v.median) for v in ran],
        ],
        color=[colours[v.framework] for v in ran],
    )
    axes.set_xlabel("one call of all members, ms")
    figure.savefig(path, dpi=150)


def curves(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path, ylabel: str) -> None:
    """Sizes and seconds on log axes: a panel for every kind of size, a curve for every way of running."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for axes, (xlabel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.loglog(points.keys(), [1e3 * seconds for seconds in points.values()], marker="o", label=name)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend()
    figure.savefig(path, dpi=100)
