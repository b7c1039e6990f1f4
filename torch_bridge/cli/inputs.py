"""Example inputs and open sizes, as `--input` and `--dynamic` specify them."""

import ast
import re
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch

    from torch_bridge.graph.examples import Arguments


def make_examples(specs: list[str], seed: int) -> "Arguments":
    """Returns the arguments of one call. Some may be given by name: `mask=bool:64,16`."""
    import torch

    from torch_bridge.graph.examples import Arguments

    generator = torch.Generator().manual_seed(seed)
    pairs = [re.fullmatch(r"(?:([A-Za-z_]\w*)=)?(.*)", spec, re.DOTALL) for spec in specs]
    made = [(pair[1], _make_example(pair[2], generator)) for pair in pairs if pair]
    return Arguments.of(tuple(x for name, x in made if not name), {name: x for name, x in made if name}, "--input")


def _make_example(spec: str, generator: "torch.Generator") -> Any:
    """Returns noise for `64,1,28,28` or `float64:64,3`, integers for `int64:64,16:1000`, a constant for `value:0.5`."""
    import torch

    if spec.startswith("value:"):
        return _parse_value(spec.removeprefix("value:"))
    parts = spec.split(":")
    name = parts.pop(0) if not parts[0][:1].isdigit() else "float32"
    dtype = getattr(torch, name, None)
    try:
        shape = [int(size) for size in parts[0].split(",")]
        bound = int(parts[1]) if len(parts) > 1 else 2
    except (IndexError, ValueError):
        shape, bound = [], 0
    if not isinstance(dtype, torch.dtype) or not shape or min(shape) < 1 or bound < 1:
        raise typer.BadParameter(
            f"expected a shape such as 64,1,28,28, float64:64,3 or int64:64,16:1000, or value:0.5; got {spec!r}",
            param_hint="--input",
        )
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    return torch.randint(bound, shape, generator=generator).to(dtype)


def parse_open_sizes(specs: list[str] | None) -> dict[str | int, dict[int, str]]:
    """Returns the names of open axes by the name or the position of an input: `x:2=height,3=width`, `0:1=length`."""
    found: dict[str | int, dict[int, str]] = {}
    for spec in specs or ():
        place, _, axes = spec.rpartition(":")
        if not re.fullmatch(r"\w+:\d+=\w+(,\d+=\w+)*", spec):
            raise typer.BadParameter(f"expected x:2=height,3=width; got {spec!r}", param_hint="--dynamic")
        pairs = [axis.split("=") for axis in axes.split(",")]
        found.setdefault(int(place) if place.isdigit() else place, {}).update({int(k): name for k, name in pairs})
    return found


def _parse_value(text: str) -> Any:
    """Returns a Python literal, or any other text as it is: `value:gelu`."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
