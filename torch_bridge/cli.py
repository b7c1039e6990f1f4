"""`torch-bridge`: port, check, time, print the source, and the demo, from the command line.

Commands import torch and JAX when they run, so that `doctor`, `--version` and the completion of shells do without.
"""

import ast
import contextlib
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from jaxensemble import terminal
from jaxensemble.doctor import diagnose
from jaxensemble.errors import InputError, describe_error
from jaxensemble.terminal import DebugOption, JsonOption, X64Option, show_result, use_x64

if TYPE_CHECKING:
    import torch

    from jaxensemble.ensemble import Ensemble
    from torch_bridge.graph.examples import Arguments

app = terminal.make_app(
    "torch-bridge", "Port PyTorch ensembles to Flax, and prove that they agree.", ("jax", "flax", "torch")
)

Factory = Annotated[str, typer.Argument(help="What makes one model, as package.module:factory.", show_default=False)]
InputsOption = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        help="Shape of one input: 64,1,28,28, or int64:64,16:1000 for integers below 1000; or what is no tensor: "
        "value:0.5, value:True, value:None. By name: mask=bool:64,16. Repeatable.",
    ),
]
DynamicOption = Annotated[
    list[str] | None,
    typer.Option("--dynamic", help="Axes of an input whose sizes stay open, by names: x:2=height,3=width. Repeatable."),
]
CheckpointsOption = Annotated[
    list[str] | None, typer.Option("--checkpoints", "-c", help="Checkpoint files, by path or glob; a member each.")
]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", help="Which of several sets of weights in a checkpoint is meant: model_ema, ema.state_dict."),
]
PrefixOption = Annotated[
    str | None, typer.Option("--prefix", help="Remove this from the beginning of every name in a checkpoint: encoder.")
]
RenameOption = Annotated[
    list[str] | None,
    typer.Option("--rename", help="Names in a checkpoint, or beginnings of names, as old=new: fc=head. Repeatable."),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Leave out names of a checkpoint by a pattern: 'projector.*'. Repeatable."),
]
MoreFiles = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE]...", help="Further checkpoint files, as shells write a pattern after --checkpoints out."
    ),
]
MembersOption = Annotated[
    int | None,
    typer.Option(min=1, help="How many members to make where there are no checkpoints: 2, and 10 to time, without it."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the first member; the next ones count up.")]
LayoutOption = Annotated[
    Literal["torch", "NHWC"], typer.Option(help="Layout of the ported network's inputs.", case_sensitive=True)
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Save the ensemble as this directory, which needs no PyTorch to load."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an ensemble that was saved there before.")]
CheckOption = Annotated[bool, typer.Option("--check/--no-check", help="Whether to compare it with PyTorch.")]
NonfiniteOption = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Port weights that are NaN or infinite as they are.")
]
PICTURES = (".png", ".svg", ".pdf", ".jpg")
SaveOption = Annotated[Path | None, typer.Option("--save", help="Write the report to this JSON file.")]


@app.command()
def port(
    factory: Factory,
    inputs: InputsOption,
    more: MoreFiles = None,
    checkpoints: CheckpointsOption = None,
    key: KeyOption = None,
    prefix: PrefixOption = None,
    rename: RenameOption = None,
    ignore: IgnoreOption = None,
    members: MembersOption = None,
    seed: SeedOption = 0,
    layout: LayoutOption = "torch",
    dynamic: DynamicOption = None,
    mode: Annotated[
        Literal["eval", "train", "as_is"], typer.Option(help="The mode to port in; as_is: as the factory leaves it.")
    ] = "eval",
    out: OutOption = None,
    force: ForceOption = False,
    check: CheckOption = True,
    allow_nonfinite: NonfiniteOption = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Port an ensemble and prove that it gives what PyTorch gives. Only then it is saved."""
    with _told(as_json, debug), use_x64(x64):
        from jaxensemble.artifact.saving import check_artifact_path
        from jaxensemble.files.schema import to_plain
        from jaxensemble.network.sources import describe_sources

        if out is not None:
            check_artifact_path(out, force=force)
        read = _read(checkpoints, more, members, key, prefix, rename, ignore)
        ensemble, _ = _ported(
            factory, inputs, read, members or 2, seed, layout, dynamic,
            mode=mode, check=check, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
        if out is not None:
            ensemble.save(out, force=force)
        result = {"ensemble": repr(ensemble), "members": len(ensemble), "passed": True if ensemble.proof else None}
        verdict = "agrees with PyTorch" if ensemble.proof else "NOT compared with PyTorch"
        result |= {"out": str(out) if out else None, "sources": to_plain(ensemble.sources)}
        saved = f"; saved to {out}" if out else ""
        lines = [f"{ensemble!r}: {verdict}{saved}", *describe_sources(ensemble.sources or ())]
        show_result(result if as_json else terminal.escape_controls("\n".join(lines)), as_json)


@app.command()
def check(
    factory: Factory,
    inputs: InputsOption,
    more: MoreFiles = None,
    checkpoints: CheckpointsOption = None,
    key: KeyOption = None,
    prefix: PrefixOption = None,
    rename: RenameOption = None,
    ignore: IgnoreOption = None,
    members: MembersOption = None,
    seed: SeedOption = 0,
    layout: LayoutOption = "torch",
    dynamic: DynamicOption = None,
    save: SaveOption = None,
    train: Annotated[bool, typer.Option("--train", help="Compare ten training steps, too.")] = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare an ensemble with PyTorch thoroughly, and print the table. Exits with 1 where they differ."""
    with _told(as_json, debug), use_x64(x64):
        from torch_bridge import parity

        _check_folders(save)
        read = _read(checkpoints, more, members, key, prefix, rename, ignore)
        ensemble, models = _ported(factory, inputs, read, members or 2, seed, layout, dynamic, check=False)
        with _status("comparing with PyTorch"):
            report = parity.check(models(), ensemble, *_examples(inputs, seed), train=train)
        show_result(report.to_json() if as_json else str(report), as_json)
        if save is not None:
            report.save(save)
        if not report.passed:
            raise typer.Exit(1)


@app.command()
def bench(
    factory: Factory,
    inputs: InputsOption,
    more: MoreFiles = None,
    checkpoints: CheckpointsOption = None,
    key: KeyOption = None,
    prefix: PrefixOption = None,
    rename: RenameOption = None,
    ignore: IgnoreOption = None,
    members: MembersOption = None,
    seed: SeedOption = 0,
    layout: LayoutOption = "torch",
    dynamic: DynamicOption = None,
    dtype: Annotated[str, typer.Option(help="What both compute in: float32, bfloat16, float16 or float64.")] = "",
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="One of PyTorch's ways; all without. Repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of calls for every way.")] = 10,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let both round float32 products to TF32.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Time a training step, of Adam, not a prediction.")] = False,
    save: SaveOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the times into this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time an ensemble beside every way that PyTorch has of running it, on this device."""
    with _told(as_json, debug), use_x64(x64):
        from torch_bridge.graph.examples import map_tensors
        from torch_bridge.timing import time

        _check_folders(save, plot)
        if plot is not None and plot.suffix not in PICTURES:
            raise typer.BadParameter(
                f"expected a file ending in {', '.join(PICTURES)}; got {plot}", param_hint="--plot"
            )
        kind = _floating(dtype) if dtype else None
        read = _read(checkpoints, more, members, key, prefix, rename, ignore)
        ensemble, models = _ported(factory, inputs, read, members or 10, seed, layout, dynamic, check=False)
        made, examples = models(), _examples(inputs, seed)
        if kind is not None:
            ensemble, made = ensemble.astype(dtype), [model.to(kind) for model in made]
            examples = map_tensors(lambda x: x.to(kind) if x.is_floating_point() else x, examples)
        with Console(stderr=True).status("timing") as status:
            report = time(
                made, ensemble, examples.positional, examples.named,
                variants=variants, rounds=rounds, tf32=tf32, train=train, progress=status.update,
            )  # fmt: skip
        show_result(report.to_json() if as_json else report.to_markdown() if markdown else str(report), as_json)
        if save is not None:
            report.save(save)
        if plot is not None:
            report.plot(plot)


def _floating(dtype: str) -> "torch.dtype":
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise typer.BadParameter(f"expected a floating-point dtype; got {dtype!r}", param_hint="--dtype")
    return kind


def _check_folders(*paths: Path | None) -> None:
    """**Raises:** `FileNotFoundError` before any work whose result could not be written."""
    missing = sorted({str(path.parent) for path in paths if path is not None and not path.parent.is_dir()})
    if missing:
        raise FileNotFoundError(f"there is no directory {', '.join(missing)} to write to: make it first")


@app.command()
def source(
    factory: Factory,
    inputs: InputsOption,
    layout: LayoutOption = "torch",
    dynamic: DynamicOption = None,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the Flax source of a network."""
    with _told(as_json, debug), use_x64(x64):
        ensemble, _ = _ported(factory, inputs, None, 1, 0, layout, dynamic, check=False)
        show_result({"source": ensemble.source()} if as_json else ensemble.source().rstrip("\n"), as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the pictures.")] = Path("demo"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train ensembles on handwritten digits in PyTorch, port them, prove it, and look at their uncertainty."""
    with _told(as_json, debug):
        from torch_bridge import demo as demonstration

        figures = demonstration.run(out, quiet=as_json)
        if as_json:
            show_result(figures, as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, whether it works, and what to do. Exits with 1 where something will not work."""
    from torch_bridge.doctor import CHECKS

    with _told(as_json, debug=False):
        diagnose(CHECKS, as_json)


def main() -> None:
    """The entry point of the `torch-bridge` command."""
    app(prog_name="torch-bridge")  # by `python -m`, too, or the shell would complete `python` itself


def _ported(
    factory: str,
    inputs: list[str],
    read: dict[str, Any] | None,
    members: int,
    seed: int,
    layout: str,
    dynamic: list[str] | None,
    *,
    mode: Literal["eval", "train", "as_is"] = "eval",
    check: bool,
    allow_nonfinite: bool = False,
) -> "tuple[Ensemble, Callable[[], list[torch.nn.Module]]]":
    """The ensemble, and its members as PyTorch modules for those who ask for them; `read` is what `_read` gives."""
    import torch

    from torch_bridge.checkpoints import load_ensemble, load_members
    from torch_bridge.porting.port import to_ensemble

    make, examples = _made_by(factory, evaluating=mode == "eval"), _examples(inputs, seed)
    if read:
        with _status(f"porting {len(read['paths'])} checkpoints"):
            ensemble = load_ensemble(
                make,
                example_inputs=examples.positional,
                example_kwargs=examples.named,
                dynamic=_open_sizes(dynamic),
                input_layout=layout,
                mode=mode,
                check=check,
                allow_nonfinite=allow_nonfinite,
                **read,
            )
        return ensemble, lambda: load_members(make, **read)
    models = []
    for k in range(members):
        torch.manual_seed(seed + k)
        models.append(make())
    with _status(f"porting {members} members"):
        ensemble = to_ensemble(
            models, *examples, dynamic=_open_sizes(dynamic),
            input_layout=layout, mode=mode, check=check, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
    return ensemble, lambda: models


def _made_by(factory: str, *, evaluating: bool) -> "Callable[[], torch.nn.Module]":
    """What makes models, in evaluation mode if asked for. What else the factory does is for its author to mend."""
    import torch

    make = _factory(factory)

    def made() -> torch.nn.Module:
        try:
            model = make()
        except Exception as error:
            raise InputError(
                f"{factory} cannot be called without arguments: {describe_error(error)}", details=str(error)
            ) from error
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"{factory} must return a torch.nn.Module; got {type(model).__name__}")
        return model.eval() if evaluating else model

    return made


def _factory(name: str) -> Callable[[], Any]:
    """`package.module:factory`, found from the working directory as well."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise typer.BadParameter(f"expected package.module:factory; got {name!r}", param_hint="FACTORY")
    if "/" in module or Path(module).is_file():
        dotted = ".".join(Path(module).with_suffix("").parts)
        raise typer.BadParameter(f"a module is named without .py: {dotted}:{attribute}", param_hint="FACTORY")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise InputError(f"module {module!r} cannot be imported: it needs {error.name!r}") from error
        raise InputError(f"there is no module {module!r} here or installed; expected package.module:factory") from error
    except Exception as error:
        raise InputError(
            f"module {module!r} cannot be imported: {describe_error(error)}", details=str(error)
        ) from error
    make = getattr(found, attribute, None)
    if not callable(make):
        raise InputError(f"module {module!r} has no function or class {attribute!r}")
    return make


def _examples(specs: list[str], seed: int) -> "Arguments":
    """The arguments of one call, of which some may be given by name: `mask=bool:64,16`."""
    import torch

    from torch_bridge.graph.examples import Arguments

    generator = torch.Generator().manual_seed(seed)
    pairs = [re.fullmatch(r"(?:([A-Za-z_]\w*)=)?(.*)", spec, re.DOTALL) for spec in specs]
    made = [(pair[1], _example(pair[2], generator)) for pair in pairs if pair]
    return Arguments.of(tuple(x for name, x in made if not name), {name: x for name, x in made if name}, "--input")


def _example(spec: str, generator: "torch.Generator") -> Any:
    """`64,1,28,28`, `float64:64,3` or `int64:64,16:1000`: noise, or integers below a bound. `value:0.5`: a constant."""
    import torch

    if spec.startswith("value:"):
        return _value(spec.removeprefix("value:"))
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


def _open_sizes(specs: list[str] | None) -> dict[str | int, dict[int, str]]:
    """`x:2=height,3=width` or `0:1=length`: the names of open axes by the name of an input, or by its place."""
    found: dict[str | int, dict[int, str]] = {}
    for spec in specs or ():
        place, _, axes = spec.rpartition(":")
        if not re.fullmatch(r"\w+:\d+=\w+(,\d+=\w+)*", spec):
            raise typer.BadParameter(f"expected x:2=height,3=width; got {spec!r}", param_hint="--dynamic")
        pairs = [axis.split("=") for axis in axes.split(",")]
        found.setdefault(int(place) if place.isdigit() else place, {}).update({int(k): name for k, name in pairs})
    return found


def _value(text: str) -> Any:
    """A number, boolean, string or None as Python writes it; any other text as it is: `value:gelu`."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _read(
    checkpoints: list[str] | None,
    more: list[str] | None,
    members: int | None,
    key: str | None,
    prefix: str | None,
    rename: list[str] | None,
    ignore: list[str] | None,
) -> dict[str, Any] | None:
    """The files, and which weights in them are meant, as arguments of `load_ensemble`; None without files."""
    pairs = [pair.partition("=") for pair in rename or ()]
    if odd := [old for old, separator, _ in pairs if not separator]:
        raise typer.BadParameter(f"expected old=new; got {', '.join(odd)}", param_hint="--rename")
    chosen = {"key": key, "prefix": prefix, "rename": {old: new for old, _, new in pairs}, "ignore": ignore or []}
    if checkpoints and members is not None:
        raise typer.BadParameter("every file of --checkpoints is a member: leave it out", param_hint="--members")
    if checkpoints:
        return {"paths": _paths([*checkpoints, *(more or ())]), **chosen}
    if more:
        raise typer.BadParameter(f"--checkpoints has to come before files; got {', '.join(more)}", param_hint="FILE")
    if given := [f"--{name}" for name, value in chosen.items() if value not in (None, {}, [])]:
        raise typer.BadParameter("they say how checkpoints are read; name these", param_hint=", ".join(given))
    return None


def _paths(patterns: list[str]) -> list[Path]:
    """Files by path or glob, each pattern's in the order of their names."""
    from torch_bridge.checkpoints.files import checkpoint_pattern

    if folders := [Path(pattern) for pattern in patterns if Path(pattern).is_dir()]:
        named = " ".join(f"'{folder / checkpoint_pattern(folder)}'" for folder in folders)
        raise InputError(f"{', '.join(map(str, folders))}: a directory; name the files in it: --checkpoints {named}")
    found = [(pattern, _matching(pattern)) for pattern in patterns]
    empty = [pattern for pattern, paths in found if not paths]
    if empty:
        raise FileNotFoundError(f"no file matches {', '.join(map(repr, empty))}")
    return [path for _, paths in found for path in paths]


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _status(text: str) -> contextlib.AbstractContextManager[Any]:
    """A line with a spinner on standard error, where that is a terminal."""
    return Console(stderr=True).status(text)


def _told(as_json: bool, debug: bool) -> contextlib.AbstractContextManager[None]:
    return terminal.report_errors("torch-bridge", as_json, debug)
