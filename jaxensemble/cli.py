"""The command line `jaxensemble`, for saved ensembles on machines without PyTorch.

Commands import JAX when they run, so that `doctor`, `--version` and the completion of shells work without JAX.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxensemble import terminal
from jaxensemble.doctor import diagnose
from jaxensemble.terminal import DebugOption, JsonOption, X64Option, show_result, use_x64

if TYPE_CHECKING:
    import numpy as np

    from jaxensemble.file_predictions import Result

SHOWN = 10
"""The most rows whose predictions are printed."""

app = terminal.make_app(
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
    """Say what is in an artifact: members, arrays, inputs, and whether it was ever verified. Weights are not read."""
    with _report_errors(as_json, debug):
        from jaxensemble.artifact import Artifact
        from jaxensemble.artifact.description import describe, describe_in_text

        artifact = Artifact.open(folder)
        show_result(describe(artifact) if as_json else terminal.escape_controls(describe_in_text(artifact)), as_json)


@app.command()
def verify(folder: Folder, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Read an artifact whole, compare every file and every array with its hash, and name what is damaged."""
    with _report_errors(as_json, debug):
        from jaxensemble.artifact import Artifact
        from jaxensemble.artifact.description import describe_proof

        artifact = Artifact.open(folder)
        artifact.verify()
        manifest = artifact.manifest
        result = {"intact": True, "arrays": len(manifest.leaves), "verified": manifest.verified}
        text = (
            f"{folder}: intact, {len(manifest.leaves)} arrays of {manifest.members} members; {describe_proof(manifest)}"
        )
        show_result(result if as_json else terminal.escape_controls(text), as_json)


@app.command()
def predict(
    folder: Folder,
    inputs: InputFile,
    out: OutOption = None,
    task: Annotated[
        Literal["classification", "regression", "outputs"] | None,
        typer.Option(help="What the outputs are. Without it, one array [M, N, C] holds the logits of C classes."),
    ] = None,
    class_axis: Annotated[
        int | None,
        typer.Option(help="The axis of one member's outputs along which classes are: 1 for [N, C, H, W].", metavar="K"),
    ] = None,
    probabilities: Annotated[
        Path | None, typer.Option(help="Write the ensemble's probabilities, such as [N, C], into this .npy file.")
    ] = None,
    cast: Annotated[
        bool, typer.Option("--cast", help="Round floating-point inputs to the dtypes that the network was ported with.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the random numbers of a network that draws in evaluation mode, too.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="The rows of a block. Without it, as many as 16 MB of inputs hold, at most 1024."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the files that an interrupted run has left, to the same end.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep-compiled", help="Keep the compiled program for the next call, in the user's cache.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Put the members over N devices of this machine: GPUs, or parts of a CPU."
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Put the members over the devices of all processes that a cluster such as Slurm has started together. "
            "The first one prints and writes.",
        ),
    ] = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run all members, in evaluation mode, on arrays from a file: in blocks of rows, if there are many."""
    with _report_errors(as_json, debug), use_x64(x64):
        from jaxensemble import array_files
        from jaxensemble.artifact import Artifact
        from jaxensemble.artifact.description import describe_proof
        from jaxensemble.file_predictions import Job
        from jaxensemble.files.caches import keep_compiled
        from jaxensemble.machines import find_mesh, is_first_process, read_ensemble
        from jaxensemble.row_blocks import RowFile

        if keep:
            keep_compiled()
        mesh = find_mesh(devices, distributed=distributed)
        artifact = Artifact.open(folder)
        network = artifact.network
        if out is not None:
            array_files.check_output_path(out, network)
        if probabilities is not None:
            array_files.check_array_path(probabilities)
        first = is_first_process(mesh)
        if first and not artifact.manifest.verified:
            typer.echo(f"jaxensemble: {describe_proof(artifact.manifest)}", err=True)
        options = [task, class_axis, cast, seed, x64, rows, str(out), str(probabilities), mesh and mesh.size]
        status = inputs.stat()
        job = Job(
            network=network,
            file=RowFile.open(inputs),
            read=lambda returned: _interpret_outputs(task, returned, class_axis, probabilities),
            cast=cast,
            seed=seed,
            rows=rows,
            out=out,
            probabilities=probabilities,
            keeps_all=as_json,
            writes=first,
            work=[artifact.manifest.to_json(), str(inputs.resolve()), status.st_size, status.st_mtime_ns, options],
        )
        result = job.run(read_ensemble(artifact, mesh).eval(), resume=resume)
        if first:
            _show_result(result, out, as_json)


@app.command()
def source(folder: Folder, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the Flax source of the network, which is generated from its description and is what runs."""
    with _report_errors(as_json, debug):
        from jaxensemble.artifact import Artifact
        from jaxensemble.source import print_source

        text = print_source(Artifact.open(folder).network)
        show_result({"source": text} if as_json else text.rstrip("\n"), as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, whether it works, and what to do. Exits with 1 where something will not work."""
    from jaxensemble.doctor import CHECKS

    with _report_errors(as_json, debug=False):
        diagnose(CHECKS, as_json)


def main() -> None:
    """The entry point of the `jaxensemble` command."""
    app(prog_name="jaxensemble")  # also for `python -m`, where the shell would complete `python` itself


def _report_errors(as_json: bool, debug: bool) -> contextlib.AbstractContextManager[None]:
    return terminal.report_errors("jaxensemble", as_json, debug)


def _interpret_outputs(task: str | None, returned: Any, class_axis: int | None, probabilities: Path | None) -> Any:
    """The joint prediction of the members, for a given task or if the outputs look like logits; else None."""
    import jax
    import jax.numpy as jnp

    from jaxensemble.errors import InputError
    from jaxensemble.uncertainty import ClassPrediction
    from jaxensemble.uncertainty.checks import check_options
    from jaxensemble.uncertainty.predictions import read_outputs

    outputs = getattr(returned, "logits", returned)
    logits = isinstance(outputs, jax.Array) and outputs.ndim == 3 and outputs.shape[-1] > 1
    if task is None and (class_axis is not None or (logits and jnp.issubdtype(outputs.dtype, jnp.floating))):
        task = "classification"
    if class_axis is not None and task != "classification":
        raise InputError(f"--class-axis needs --task classification; got --task {task}")
    read: Any = None if task == "outputs" else task
    options = {} if class_axis is None else {"class_axis": class_axis}
    if read:
        check_options(read, options)
    prediction = read and read_outputs(outputs, read, **options)
    if probabilities is not None and not isinstance(prediction, ClassPrediction):
        raise InputError("--probabilities needs outputs that are logits [M, N, C], or --task classification")
    return prediction


def _show_result(result: "Result", out: Path | None, as_json: bool) -> None:
    from jaxensemble.array_files import json_values

    figures = result.figures
    if as_json:
        written = {"out": str(out)} if out else {}
        numbers = {} if out else {name: {"values": json_values(array)} for name, array in result.outputs.items()}
        predicted = {"prediction": {name: json_values(array) for name, array in figures.items()}} if figures else {}
        shapes = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in result.shapes.items()}
        arrays = {name: shapes[name] | numbers.get(name, {}) for name in shapes}
        show_result({"outputs": arrays, **predicted, **written}, as_json=True)
        return
    for name, (dtype, shape) in result.shapes.items():
        values = "" if out or figures else f"\n{result.outputs[name]}"
        show_result(f"{name}: {dtype}{shape}{values}", as_json=False)
    if figures:
        show_result(_table_text(figures, result.rows), as_json=False)


def _table_text(figures: dict[str, "np.ndarray"], count: int) -> str:
    """The first rows as text: integers, other numbers with four digits, and the shapes of arrays such as images."""
    lines = ["row".rjust(5) + "".join(name.rjust(14) for name in figures)]
    for row in range(min(SHOWN, count)):
        cells = [array[row] for array in figures.values()]
        texts = [_cell_text(cell) for cell in cells]
        lines.append(str(row).rjust(5) + "".join(f"  {text:>12}" for text in texts))
    if count > SHOWN:
        lines.append(f"... and {count - SHOWN} more rows: --json has them all")
    return "\n".join(lines)


def _cell_text(cell: Any) -> str:
    import numpy as np

    array = np.asarray(cell)
    if array.ndim > 1:  # for example the pixels of an image
        return str(list(array.shape))
    if array.dtype.kind in "OU":  # classes, where some rows are NaN
        return str(array)
    return str(array.round(4)) if array.ndim else f"{cell:.4g}"


if __name__ == "__main__":
    main()
