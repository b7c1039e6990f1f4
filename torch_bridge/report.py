"""Reports as terminal tables, and as JSON."""

import datetime
import importlib.metadata
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import torch
from rich.console import Console
from rich.table import Table

from jaxensemble.files.durable import write_file
from jaxensemble.running.device import cores, processor


def draw_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 110) -> str:
    """Returns a table as plain text."""
    drawn = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for k, column in enumerate(columns):
        drawn.add_column(column, overflow="fold", no_wrap=False, justify="left" if k == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False, markup=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def environment() -> dict[str, Any]:
    """Returns the conditions of a measurement: versions, devices, threads, date."""
    others = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    versions = {"torch": str(torch.__version__), **others}  # torch.__version__ names the build: 2.15.0+cu132
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "processor": processor(),
        "cores": cores(),
        "jax_device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "torch_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch_threads": torch.get_num_threads(),
    }


def save_json(path: str | Path, content: Any) -> None:
    """Writes a report as JSON, whole or not at all."""
    write_file(Path(path), f"{json.dumps(content, indent=2)}\n".encode())
