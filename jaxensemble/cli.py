"""`jaxensemble`: what a machine without PyTorch needs of a saved ensemble, from the command line.

Commands import JAX when they run, so that `doctor`, `--version` and the completion of shells do without.
"""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxensemble import terminal
from jaxensemble.doctor import diagnose
from jaxensemble.terminal import DebugOption, JsonOption, X64Option, show, wide

app = terminal.program(
    "jaxensemble",
    "Look at saved ensembles, check them, and predict with them. PyTorch is not needed.",
    ("jax", "flax"),
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A saved ensemble.", show_default=False)]
InputFile = Annotated[
    Path,
    typer.Argument(
        metavar="INPUT",
        help=".npy for a network with one input, .npz with an array for each: under its name, or as arr_0, arr_1 ...",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the outputs here: .npy for one array, .npz for several, each by its path."),
]


@app.command()
def inspect(folder: Folder, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say what is in an artifact, from its headers alone: members, arrays, inputs, and whether it was ever verified."""
    with _told(as_json, debug):
        from jaxensemble.artifact import Artifact
        from jaxensemble.artifact.description import describe, describe_in_text

        artifact = Artifact.open(folder)
        show(describe(artifact) if as_json else terminal.plain(describe_in_text(artifact)), as_json)


@app.command()
def verify(folder: Folder, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Read an artifact whole, compare every file and every array with its hash, and name what is damaged."""
    with _told(as_json, debug):
        from jaxensemble.artifact import Artifact
        from jaxensemble.artifact.description import describe_proof

        artifact = Artifact.open(folder)
        artifact.verify()
        manifest = artifact.manifest
        result = {"intact": True, "arrays": len(manifest.leaves), "verified": manifest.verified}
        text = (
            f"{folder}: intact, {len(manifest.leaves)} arrays of {manifest.members} members; {describe_proof(manifest)}"
        )
        show(result if as_json else terminal.plain(text), as_json)


@app.command()
def predict(
    folder: Folder,
    inputs: InputFile,
    out: OutOption = None,
    keep: Annotated[
        bool, typer.Option("--keep-compiled", help="Keep the compiled program for the next call, in the user's cache.")
    ] = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run all members, in evaluation mode, on arrays from a file."""
    with _told(as_json, debug), wide(x64):
        from jaxensemble import files
        from jaxensemble.artifact import Artifact
        from jaxensemble.artifact.description import describe_proof
        from jaxensemble.caches import keep_compiled

        if keep:
            keep_compiled()
        artifact = Artifact.open(folder)
        if out is not None:
            files.check_target(out, artifact.network)
        if not artifact.manifest.verified:
            typer.echo(f"jaxensemble: {describe_proof(artifact.manifest)}", err=True)
        arguments = files.arguments(artifact.network, files.read_arrays(inputs))
        outputs = files.named(artifact.load().eval()(*arguments))
        if out is not None:
            files.write_arrays(out, outputs)
        _show_outputs(outputs, out, as_json)


@app.command()
def source(folder: Folder, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the Flax source of the network, which is generated from its description and is what runs."""
    with _told(as_json, debug):
        from jaxensemble.artifact import Artifact
        from jaxensemble.source import print_source

        text = print_source(Artifact.open(folder).network)
        show({"source": text} if as_json else text.rstrip("\n"), as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, whether it works, and what to do. Exits with 1 where something will not work."""
    from jaxensemble.doctor import CHECKS

    with _told(as_json, debug=False):
        diagnose(CHECKS, as_json)


def main() -> None:
    """The entry point of the `jaxensemble` command."""
    app(prog_name="jaxensemble")  # by `python -m`, too, or the shell would complete `python` itself


def _told(as_json: bool, debug: bool) -> contextlib.AbstractContextManager[None]:
    return terminal.told("jaxensemble", as_json, debug)


def _show_outputs(outputs: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from jaxensemble.files import values

    told = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in outputs.items()}
    if as_json:
        written = {"out": str(out)} if out else {}
        numbers = {} if out else {name: {"values": values(array)} for name, array in outputs.items()}
        show({"outputs": {name: told[name] | numbers.get(name, {}) for name in outputs}, **written}, as_json=True)
        return
    for name, array in outputs.items():
        show(f"{name}: {array.dtype}{list(array.shape)}" + ("" if out else f"\n{array}"), as_json=False)


if __name__ == "__main__":
    main()
