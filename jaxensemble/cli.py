"""`jaxensemble`: what a machine without PyTorch needs of a saved ensemble, from the command line."""

import errno
import io
import zipfile
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxensemble import terminal
from jaxensemble.artifact import Artifact, Manifest
from jaxensemble.caches import keep_compiled
from jaxensemble.durable import write_file
from jaxensemble.errors import InputError
from jaxensemble.inputs import shape_text
from jaxensemble.network import Network, Ref, references
from jaxensemble.source import print_source
from jaxensemble.state import flatten
from jaxensemble.terminal import DebugOption, JsonOption, X64Option, show

app = typer.Typer(
    name="jaxensemble",
    help="Look at saved ensembles, check them, and predict with them. PyTorch is not needed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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
        artifact = Artifact.open(folder)
        show(_described(artifact) if as_json else terminal.plain(_text(artifact)), as_json)


@app.command()
def verify(folder: Folder, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Read an artifact whole, compare every file and every array with its hash, and name what is damaged."""
    with _told(as_json, debug):
        artifact = Artifact.open(folder)
        artifact.verify()
        manifest = artifact.manifest
        result = {"intact": True, "arrays": len(manifest.leaves), "verified": manifest.verified}
        text = f"{folder}: intact, {len(manifest.leaves)} arrays of {manifest.members} members; {_proof_text(manifest)}"
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
    with _told(as_json, debug), jax.enable_x64(x64):
        if keep:
            keep_compiled()
        artifact = Artifact.open(folder)
        if out is not None:
            _check_out(out, artifact.network)
        if not artifact.manifest.verified:
            typer.echo(f"jaxensemble: {_proof_text(artifact.manifest)}", err=True)
        arguments = _arguments(artifact.network, _arrays(inputs))
        outputs = _named(artifact.load().eval()(*arguments))
        if out is not None:
            _write(out, outputs)
        _show_outputs(outputs, out, as_json)


@app.command()
def source(folder: Folder, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the Flax source of the network, which is generated from its description and is what runs."""
    with _told(as_json, debug):
        text = print_source(Artifact.open(folder).network)
        show({"source": text} if as_json else text.rstrip("\n"), as_json)


def main() -> None:
    """The entry point of the `jaxensemble` command."""
    app()


def _told(as_json: bool, debug: bool) -> Any:
    return terminal.told("jaxensemble", as_json, debug)


def _described(artifact: Artifact) -> dict[str, Any]:
    manifest, network = artifact.manifest, artifact.network
    return {
        "network": network.name,
        "members": manifest.members,
        "parameters_each": _parameters(manifest),
        "bytes": sum(record.size for record in manifest.files.values()),
        "inputs": {name: list(shape) for name, shape in network.input_shapes.items()},
        "verified": manifest.verified,
        "proof": _proof_text(manifest),
        "versions": dict(manifest.versions),
        "from_pytorch": manifest.origin.name if manifest.origin else None,
        "arrays": {
            name: {"kind": leaf.kind, "dtype": leaf.dtype, "shape": list(leaf.shape)}
            for name, leaf in manifest.leaves.items()
        },
    }


def _text(artifact: Artifact) -> str:
    manifest, network = artifact.manifest, artifact.network
    size = sum(record.size for record in manifest.files.values())
    wide = max((len(name) for name in manifest.leaves), default=0)
    return "\n".join(
        [
            f"{manifest.members} x {network.name}, {_parameters(manifest):,} parameters each, {size:,} bytes",
            f"inputs: {', '.join(f'{name} {shape_text(shape)}' for name, shape in network.input_shapes.items())}",
            _proof_text(manifest),
            f"written by {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
            *(f"  {name:{wide}}  {x.kind:9}  {x.dtype}{list(x.shape)}" for name, x in manifest.leaves.items()),
        ]
    )


def _parameters(manifest: Manifest) -> int:
    """How many parameters a member has."""
    return sum(int(np.prod(leaf.shape[1:])) for leaf in manifest.leaves.values() if leaf.kind == "params")


def _proof_text(manifest: Manifest) -> str:
    proof = manifest.proof
    if proof is None:
        return "NOT verified: this ensemble was never compared with PyTorch, or was changed since"
    versions = ", ".join(f"{name} {version}" for name, version in proof.versions.items())
    return f"verified against PyTorch on {proof.date}, {len(proof.comparisons)} comparisons passed ({versions})"


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; the one of an .npy file is `arr_0`."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"arr_0": loaded}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"`{path}` holds no NumPy arrays that can be read: {error}") from error


def _arguments(network: Network, arrays: dict[str, np.ndarray]) -> list[Any]:
    """The positional arguments of a call, from arrays by the names of the inputs or by position."""
    names = [ref.name for ref in references(network.inputs) if isinstance(ref, Ref)]
    by_position = {f"arr_{k}": name for k, name in enumerate(names)}
    if arrays.keys() == by_position.keys():
        arrays = {by_position[name]: array for name, array in arrays.items()}
    if arrays.keys() != set(names):
        raise InputError(f"expected an array for each input: {', '.join(names)}; got {', '.join(arrays) or 'none'}")
    return [_filled(tree, arrays) for tree in network.inputs]


def _filled(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    match tree:
        case Ref(name):
            return arrays[name]
        case dict():
            return {key: _filled(item, arrays) for key, item in tree.items()}
        case tuple() | list():
            return type(tree)(_filled(item, arrays) for item in tree)
    return tree


def _named(outputs: Any) -> dict[str, np.ndarray]:
    """The arrays of the outputs, each by its path among them; a single one has the name `output`."""
    return {name: _storable(leaf) for name, leaf in flatten(_nested({"output": outputs})).items() if leaf is not None}


def _nested(tree: Any) -> Any:
    match tree:
        case dict():
            return {str(key): _nested(item) for key, item in tree.items()}
        case tuple() | list():
            return {str(k): _nested(item) for k, item in enumerate(tree)}
    return tree


def _storable(leaf: Any) -> np.ndarray:
    """An array of a dtype that NumPy's files know: float32 holds the narrower ones exactly."""
    known = np.dtype(leaf.dtype).isbuiltin == 1
    return np.asarray(leaf if known else leaf.astype(jnp.float32))


def _check_out(path: Path, network: Network) -> None:
    """**Raises:** `InputError`, `FileNotFoundError` for a file that the outputs cannot be written to."""
    count = sum(isinstance(ref, Ref) for ref in references(network.outputs))
    suffixes = (".npz",) if count > 1 else (".npy", ".npz")
    if path.suffix not in suffixes:
        arrays = f"the {count} arrays" if count > 1 else "the one array"
        raise InputError(f"`{path}` must end in {' or '.join(suffixes)}, for {arrays} that the network gives")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such directory", str(path.parent))


def _write(path: Path, outputs: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(content, **outputs)  # pyright: ignore[reportArgumentType]
    else:
        np.save(content, next(iter(outputs.values())))
    write_file(path, content.getvalue())


def _show_outputs(outputs: dict[str, np.ndarray], out: Path | None, as_json: bool) -> None:
    told = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in outputs.items()}
    if as_json:
        written = {"out": str(out)} if out else {}
        values = {} if out else {name: {"values": _values(array)} for name, array in outputs.items()}
        show({"outputs": {name: told[name] | values.get(name, {}) for name in outputs}, **written}, as_json=True)
        return
    for name, array in outputs.items():
        show(f"{name}: {array.dtype}{list(array.shape)}" + ("" if out else f"\n{array}"), as_json=False)


def _values(array: np.ndarray) -> Any:
    """Numbers as JSON has them: what is not finite, or complex, as text."""
    if array.dtype.kind == "c" or not np.isfinite(array).all():
        return np.vectorize(str, otypes=[object])(array).tolist()
    return array.tolist()


if __name__ == "__main__":
    main()
