"""`weights.safetensors`: arrays by path, written one at a time and read one at a time.

The library `safetensors` checks a file, and gives its names, dtypes, shapes and order. But it maps files into memory,
and reads no 8-bit floats into NumPy. So the bytes are read here, in the order of the file, and hashed at once.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jaxensemble.arrays import as_array
from jaxensemble.artifact.manifest import WEIGHTS, LeafRecord
from jaxensemble.devices.placement import gather
from jaxensemble.dtypes import CODES, KEYS, PAIRS, is_key, numpy_dtype
from jaxensemble.errors import InputError, StateError, first_line
from jaxensemble.modules.state import KINDS, State, flatten

_NAMES = {code: name for name, code in CODES.items()}

Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""

ReadBytes = Callable[[str], memoryview]
"""A function that gives the bytes of an array by name."""


def state_leaves(state: State) -> dict[str, tuple[str, Any]]:
    """Every array of a state by name, with its kind.

    **Raises:** `StateError` naming all arrays with a dtype that safetensors lacks.
    """
    leaves = {name: (kind, leaf) for kind in KINDS for name, leaf in flatten(getattr(state, kind)).items()}
    odd = [
        f"{name} ({leaf.dtype})" for name, (_, leaf) in leaves.items() if str(leaf.dtype) not in CODES | KEYS | PAIRS
    ]
    if odd:
        raise StateError(
            f"safetensors has no dtype for these arrays: {', '.join(odd)}. Cast them first: ensemble.astype(dtype)."
        )
    return leaves


class MemberHashes:
    """The hash of each of some members: of its bytes in all arrays that have a member axis, in the order of the file"""

    def __init__(self, members: Iterable[int]):
        self._hashes = {member: hashlib.sha256() for member in members}

    def add(self, member: int, data: Any) -> None:
        """Adds the bytes of a member in one more array."""
        self._hashes[member].update(data)

    def found(self) -> dict[int, str]:
        """The hashes by member."""
        return {member: found.hexdigest() for member, found in self._hashes.items()}


def encode_leaves(
    leaves: Mapping[str, tuple[str, Any]], records: dict[str, LeafRecord], hashes: MemberHashes, read: ReadBytes
) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file with the arrays, which `read` gives by name: one array at a time is on the host.

    The manifest's record of each array is put into `records` at the same time, and the members' bytes into `hashes`.
    """
    found = {name: LeafRecord(kind, str(leaf.dtype), tuple(leaf.shape), "") for name, (kind, leaf) in leaves.items()}
    order = file_order(leaves)
    yield _encode_header({name: found[name].stored for name in order})
    for name in order:
        data = read(name)
        records[name] = dataclasses.replace(found[name], sha256=hashlib.sha256(data).hexdigest())
        if found[name].kind != "constants":
            members = found[name].shape[0]
            size = len(data) // members
            for member in range(members):
                hashes.add(member, data[member * size : (member + 1) * size])
        yield data


def file_order(leaves: Mapping[str, tuple[str, Any]]) -> list[str]:
    """The names of arrays in the order of the file: the widest dtypes first, so that mapped arrays are aligned."""
    records = {name: LeafRecord(kind, str(leaf.dtype), tuple(leaf.shape), "") for name, (kind, leaf) in leaves.items()}
    return sorted(records, key=lambda name: (-numpy_dtype(records[name].stored[0]).itemsize, name))


def bytes_of(leaf: Any) -> memoryview:
    """An array's bytes in C order. All processes that have a part of the array have to call this."""
    array = np.asarray(gather(jax.random.key_data(leaf) if is_key(leaf) else leaf))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _encode_header(stored: Stored) -> bytes:
    """The beginning of a file: the length of the JSON text, and the text, padded to a multiple of 8 bytes.

    https://github.com/huggingface/safetensors#format
    """
    entries, end = {}, 0
    for name, (dtype, shape) in stored.items():
        start, end = end, end + _size(dtype, shape)
        entries[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Reads dtypes and shapes by name, in the order of the data.

    **Raises:** `InputError` for a file that is no valid safetensors file, or that holds an unknown dtype.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            stored = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{WEIGHTS} is no sound safetensors file: {first_line(error)}") from error
    unknown = [f"{name!r} ({code})" for name, (code, _) in stored.items() if code not in _NAMES]
    if unknown:
        raise InputError(f"{WEIGHTS} holds dtypes that no artifact has: {', '.join(unknown)}")
    return {name: (_NAMES[code], shape) for name, (code, shape) in stored.items()}


def read_leaves(path: Path, stored: Stored) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yields the name, values and hash of every array, in the order of `read_header`.

    **Raises:** `InputError` if the file was changed since its header was read.
    """
    with path.open("rb") as file:
        file.seek(path.stat().st_size - sum(_size(*entry) for entry in stored.values()))  # the library checks for gaps
        for name, (dtype, shape) in stored.items():
            data = np.empty(_size(dtype, shape), np.uint8)
            if file.readinto(data.data) != data.size:
                raise InputError(f"{WEIGHTS} was changed while it was read")
            yield name, data.view(numpy_dtype(dtype)).reshape(shape), hashlib.sha256(data.data).hexdigest()


def read_members(
    path: Path, stored: Stored, stacked: Collection[str], members: Sequence[int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and values of every array, in the order of `read_header`: of `stacked` ones these members alone.

    **Raises:** `InputError` if the file was changed since its header was read.
    """
    with path.open("rb", buffering=0) as file:
        start = path.stat().st_size - sum(_size(*entry) for entry in stored.values())
        for name, (dtype, shape) in stored.items():
            size = _size(dtype, shape)
            rows, parts = (shape[0], members) if name in stacked else (1, [0])
            data = np.empty((len(parts), size // rows), np.uint8)
            for part, row in zip(parts, data, strict=True):
                file.seek(start + part * row.size)
                _read_into(file, row)
            start += size
            kept = (len(parts), *shape[1:]) if name in stacked else shape
            yield name, data.reshape(-1).view(numpy_dtype(dtype)).reshape(kept)


def _read_into(file: Any, data: np.ndarray) -> None:
    rest = data.data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise InputError(f"{WEIGHTS} was changed while it was read")
        rest = rest[count:]


def as_leaf(array: np.ndarray, record: LeafRecord, name: str) -> jax.Array:
    """Converts a stored array to the ensemble's. 64-bit integers become 32-bit while JAX has 64-bit types off.

    **Raises:** `InputError` for values that do not fit, and for float64 while JAX has it switched off.
    """
    if record.dtype in PAIRS:
        array = array.view(record.dtype).reshape(record.shape)
    if record.dtype in KEYS:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=KEYS[record.dtype].generator)
    return as_array(array, name)


def header_differences(stored: Stored, leaves: Mapping[str, LeafRecord]) -> list[str]:
    """The differences between the arrays of a file and those that the manifest lists."""
    return list_differences({name: record.stored for name, record in leaves.items()}, stored, _entry_text)


def _entry_text(entry: tuple[str, tuple[int, ...]]) -> str:
    return f"{entry[0]}{list(entry[1])}"


def list_differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], describe_entry: Callable[[Any], str]
) -> list[str]:
    """Lists the entries that are missing, not needed or different, each by name."""
    problems = [f"{name!r} is missing" for name in expected if name not in found]
    problems += [f"{name!r} is not needed" for name in found if name not in expected]
    return problems + [
        f"{name!r}: expected {describe_entry(wanted)}, got {describe_entry(found[name])}"
        for name, wanted in expected.items()
        if name in found and found[name] != wanted
    ]
