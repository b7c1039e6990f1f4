"""Arrays in files: the inputs of a network, and its outputs."""

import dataclasses
import errno
import io
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.arrays import is_too_wide
from jaxensemble.devices.placement import gather
from jaxensemble.errors import InputError
from jaxensemble.files.durable import write_file
from jaxensemble.modules.state import flatten
from jaxensemble.network.arguments import insert_fixed
from jaxensemble.network.network import Network, Ref, references


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file by name; the array of an .npy file has the name `arr_0`."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"arr_0": loaded}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        advice = "give an .npy or .npz file, without arrays of objects"
        raise InputError(f"`{path}` holds no NumPy arrays that can be read: {advice}") from error


def arguments_from_arrays(network: Network, arrays: dict[str, np.ndarray], *, cast: bool = False) -> list[Any]:
    """The positional arguments of a call, from arrays by the names of the inputs or by position.

    With `cast`, floating-point and complex arrays are rounded to the dtype that their input had when the network was
    ported.

    **Raises:** `InputError` for missing or unknown arrays, and for arrays that JAX would round.
    """
    names = [ref.name for ref in references(network.inputs) if isinstance(ref, Ref)]
    by_position = {f"arr_{k}": name for k, name in enumerate(names)}
    if arrays.keys() == by_position.keys():
        arrays = {by_position[name]: array for name, array in arrays.items()}
    if arrays.keys() != set(names):
        raise InputError(f"expected an array for each input: {', '.join(names)}; got {', '.join(arrays) or 'none'}")
    if cast:
        arrays = {name: _cast_to_input(array, network.input_dtypes.get(name)) for name, array in arrays.items()}
    wide = [
        f"`{name}` is {array.dtype}, and was {network.input_dtypes.get(name)} when the network was ported"
        for name, array in arrays.items()
        if is_too_wide(array.dtype) and array.dtype.kind in "fc" and not is_too_wide(network.input_dtypes.get(name))
    ]
    if wide:
        rounds = any(
            _is_of_same_kind(array, network.input_dtypes.get(name)) for name, array in arrays.items() if not cast
        )
        raise InputError(f"{'; '.join(wide)}: {'--cast rounds the array, ' if rounds else ''}--x64 computes in 64 bits")
    return insert_fixed(network, [_fill_inputs(tree, arrays) for tree in network.open_inputs.values()])


def _cast_to_input(array: np.ndarray, dtype: str | None) -> np.ndarray:
    return array.astype(jnp.dtype(dtype)) if _is_of_same_kind(array, dtype) else array


def _is_of_same_kind(array: np.ndarray, dtype: str | None) -> bool:
    """Returns whether an array and a dtype are both floating-point, or both complex."""
    kinds = (jnp.floating, jnp.complexfloating)
    return any(jnp.issubdtype(array.dtype, kind) and jnp.issubdtype(dtype, kind) for kind in kinds if dtype)


def _fill_inputs(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    match tree:
        case Ref(name):
            return arrays[name]
        case dict():
            return {key: _fill_inputs(item, arrays) for key, item in tree.items()}
        case tuple() | list():
            return type(tree)(_fill_inputs(item, arrays) for item in tree)
    return tree


def output_leaves(outputs: Any) -> dict[str, jax.Array]:
    """The arrays of the outputs, by their paths in the outputs; a single array has the name `output`."""
    leaves = flatten(_nest_outputs({"output": outputs})).items()
    return {name: leaf for name, leaf in leaves if isinstance(leaf, jax.Array)}


def _nest_outputs(tree: Any) -> Any:
    match tree:
        case dict():
            return {str(key): _nest_outputs(item) for key, item in tree.items()}
        case tuple() | list():
            names = getattr(tree, "_fields", range(len(tree)))
            return {str(name): _nest_outputs(item) for name, item in zip(names, tree, strict=True)}
    return _nest_outputs(vars(tree)) if dataclasses.is_dataclass(tree) else tree


def storable_dtype(leaf: Any) -> np.dtype:
    """The dtype of an array in a file: float32, which holds narrower ones exactly, for one that NumPy's files lack."""
    return np.dtype(leaf.dtype if np.dtype(leaf.dtype).isbuiltin == 1 else np.float32)


def storable_array(leaf: Any) -> np.ndarray:
    """An array of JAX as it is stored in a file."""
    return np.asarray(gather(leaf.astype(storable_dtype(leaf))))


def check_output_path(path: Path, network: Network) -> None:
    """Checks that the outputs of a network can be written to a file.

    **Raises:** `InputError` for another ending, `FileNotFoundError` for a directory that does not exist.
    """
    count = sum(isinstance(ref, Ref) for ref in references(network.outputs))
    suffixes = (".npz",) if count > 1 else (".npy", ".npz")
    _check_path(path, suffixes, f"{f'the {count} arrays' if count > 1 else 'the one array'} that the network gives")


def check_array_path(path: Path) -> None:
    """Checks that one array can be written to a file.

    **Raises:** `InputError` for another ending, `FileNotFoundError` for a directory that does not exist.
    """
    _check_path(path, (".npy",), "one array")


def _check_path(path: Path, suffixes: tuple[str, ...], content: str) -> None:
    if path.suffix not in suffixes:
        raise InputError(f"`{path}` must end in {' or '.join(suffixes)}, for {content}")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such directory", str(path.parent))


def write_arrays(path: Path, outputs: dict[str, np.ndarray]) -> None:
    """Writes the outputs: one array as .npy, several as .npz."""
    content = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(content, **outputs)  # pyright: ignore[reportArgumentType]
    else:
        np.save(content, next(iter(outputs.values())))
    write_file(path, content.getvalue())


def json_values(array: np.ndarray) -> Any:
    """Converts an array to nested lists for JSON, which takes numbers that are not finite or complex as text."""
    if array.dtype != object and (array.dtype.kind == "c" or not np.isfinite(array).all()):
        return np.vectorize(str, otypes=[object])(array).tolist()
    return array.tolist()
