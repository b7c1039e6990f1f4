"""Ensembles that the options of a command describe, ported from checkpoints or from new models."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console

from jaxensemble.errors import InputError
from torch_bridge.cli.factory import load_factory
from torch_bridge.cli.inputs import make_examples, parse_open_sizes
from torch_bridge.cli.options import EnsembleOptions

if TYPE_CHECKING:
    import torch

    from jaxensemble.ensemble import Ensemble


def port_ensemble(
    options: EnsembleOptions,
    members: int,
    *,
    mode: Literal["eval", "train", "as_is"] = "eval",
    check: bool,
    allow_nonfinite: bool = False,
) -> "tuple[Ensemble, Callable[[], list[torch.nn.Module]]]":
    """Returns the ported ensemble, and a function that returns its members as PyTorch modules.

    **Arguments:**

    - `members`: the number of members to make if the options give neither checkpoints nor a number.
    """
    checkpoints = _checkpoint_arguments(options)
    import torch

    from torch_bridge.checkpoints import load_ensemble, load_members
    from torch_bridge.porting.port import to_ensemble

    make = load_factory(options.factory, evaluating=mode == "eval")
    examples = make_examples(options.inputs, options.seed)
    if checkpoints:
        with show_status(f"porting {len(checkpoints['paths'])} checkpoints"):
            ensemble = load_ensemble(
                make,
                example_inputs=examples.positional,
                example_kwargs=examples.named,
                dynamic=parse_open_sizes(options.dynamic),
                input_layout=options.layout,
                mode=mode,
                check=check,
                allow_nonfinite=allow_nonfinite,
                **checkpoints,
            )
        return ensemble, lambda: load_members(make, **checkpoints)
    models = []
    for k in range(options.members or members):
        torch.manual_seed(options.seed + k)
        models.append(make())
    with show_status(f"porting {len(models)} members"):
        ensemble = to_ensemble(
            models,
            *examples,
            dynamic=parse_open_sizes(options.dynamic),
            input_layout=options.layout,
            mode=mode,
            check=check,
            allow_nonfinite=allow_nonfinite,
        )
    return ensemble, lambda: models


def _checkpoint_arguments(options: EnsembleOptions) -> dict[str, Any] | None:
    """Returns the files, and the choice of weights in them, as arguments of `load_ensemble`; None without files."""
    pairs = [pair.partition("=") for pair in options.rename or ()]
    if odd := [old for old, separator, _ in pairs if not separator]:
        raise typer.BadParameter(f"expected old=new; got {', '.join(odd)}", param_hint="--rename")
    rename = {old: new for old, _, new in pairs}
    choice = {"key": options.key, "prefix": options.prefix, "rename": rename, "ignore": options.ignore or []}
    more = options.more or []
    if options.checkpoints and options.members is not None:
        raise typer.BadParameter("every file of --checkpoints is a member: leave it out", param_hint="--members")
    if options.checkpoints:
        return {"paths": _find_paths([*options.checkpoints, *more]), **choice}
    if more:
        raise typer.BadParameter(f"--checkpoints has to come before files; got {', '.join(more)}", param_hint="FILE")
    if given := [f"--{name}" for name, value in choice.items() if value not in (None, {}, [])]:
        raise typer.BadParameter("they say how checkpoints are read; name these", param_hint=", ".join(given))
    return None


def _find_paths(patterns: list[str]) -> list[Path]:
    """Returns the files of paths and glob patterns, those of each pattern in the order of their names."""
    from torch_bridge.checkpoints.files import checkpoint_pattern

    if folders := [Path(pattern) for pattern in patterns if Path(pattern).is_dir()]:
        named = " ".join(f"'{folder / checkpoint_pattern(folder)}'" for folder in folders)
        raise InputError(f"{', '.join(map(str, folders))}: a directory; name the files in it: --checkpoints {named}")
    found = [(pattern, _match_pattern(pattern)) for pattern in patterns]
    empty = [pattern for pattern, paths in found if not paths]
    if empty:
        raise FileNotFoundError(f"no file matches {', '.join(map(repr, empty))}")
    return [path for _, paths in found for path in paths]


def _match_pattern(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def show_status(text: str) -> contextlib.AbstractContextManager[Any]:
    """Shows a line with a spinner on standard error, if that is a terminal."""
    return Console(stderr=True).status(text)
