"""Timings as pictures."""

from collections.abc import Sequence
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
            [1e3 * (v.median - min(v.quartiles[0], v.median)) for v in ran],
            [1e3 * (max(v.quartiles[1], v.median) - v.median) for v in ran],
        ],
        color=[colours[v.framework] for v in ran],
    )
    axes.set_xlabel("one call of all members, ms")
    figure.savefig(path, dpi=150)
