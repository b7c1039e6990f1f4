"""Options of the commands, and the ones that several commands share."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

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
SaveOption = Annotated[Path | None, typer.Option("--save", help="Write the report to this JSON file.")]


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The network that a command is about, and its example inputs."""

    factory: Factory
    inputs: InputsOption
    layout: LayoutOption = "torch"
    dynamic: DynamicOption = None


@dataclasses.dataclass(frozen=True)
class EnsembleOptions:
    """The ensemble that a command is about, its example inputs, and the checkpoints of its members."""

    factory: Factory
    inputs: InputsOption
    more: MoreFiles = None
    checkpoints: CheckpointsOption = None
    key: KeyOption = None
    prefix: PrefixOption = None
    rename: RenameOption = None
    ignore: IgnoreOption = None
    members: MembersOption = None
    seed: SeedOption = 0
    layout: LayoutOption = "torch"
    dynamic: DynamicOption = None


def expand_options(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that replaces a command's first parameter, a dataclass of options, by its fields.

    >>> @expand_options(NetworkOptions)
    ... def show(network: NetworkOptions, debug: bool = False) -> None:
    ...     print(network.factory, network.inputs, debug)
    >>> list(inspect.signature(show).parameters)
    ['factory', 'inputs', 'layout', 'dynamic', 'debug']
    >>> show(factory="networks:small", inputs=["64,8"], debug=True)
    networks:small ['64,8'] True
    """
    shared = inspect.signature(options).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        parameters = [*shared.values(), *own]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            command(options(**{name: values.pop(name) for name in shared if name in values}), **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
