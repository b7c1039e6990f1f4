"""Hashes of arrays and of programs, which distinguish one run from another."""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxensemble.compat import Literal, Program, Var, constants, is_program
from jaxensemble.devices.placement import gather
from jaxensemble.dtypes import is_key
from jaxensemble.errors import InputError
from jaxensemble.programs.rewrite import equations


def digest(tree: Any) -> str:
    """Returns a hash of all arrays, with their places, dtypes and shapes."""
    found = hashlib.sha256()
    for place, array in named_arrays(tree).items():
        found.update(f"{place} {array.dtype}{list(array.shape)}".encode())
        found.update(np.asarray(gather(array)).tobytes())
    return found.hexdigest()[:16]


def digest_of_shapes(tree: Any) -> str:
    """Returns a hash of the places, dtypes and shapes of all arrays."""
    shapes = {place: (str(array.dtype), array.shape) for place, array in named_arrays(tree).items()}
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def named_arrays(tree: Any) -> dict[str, Any]:
    """Returns the arrays by their places in the tree; random keys as integers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): _key_numbers(leaf) for path, leaf in leaves}


def _key_numbers(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def digest_of_function(function: Callable[..., Any], *arguments: Any) -> str:
    """Returns a hash of the program of a function for arguments of these shapes and dtypes."""
    return digest_of_program(jax.make_jaxpr(function)(*arguments))


def digest_of_program(program: Program) -> str:
    """Returns a hash of a program's steps, with all numbers and arrays in them, without the names of functions.

    Two processes with the same JAX and the same code get the same hash.

    **Raises:** `InputError` where a program calls Python, whose code the hash would not cover.

    >>> square = lambda x: x * x
    >>> digest_of_function(square, 1.0) == digest_of_function(jax.jit(lambda y: y * y), 1.0)
    False
    >>> digest_of_function(jax.jit(square), 1.0) == digest_of_function(jax.jit(lambda y: y * y), 1.0)
    True
    """
    for step in equations(program):
        if step.primitive.name in ("pure_callback", "io_callback"):
            raise InputError(
                f"`checkpoints` cannot be kept of a run that calls Python from within JAX ({step.primitive.name}): "
                "nothing shows whether the called code is the same as before. Write it in JAX, or leave "
                "`checkpoints` out and save `state.ensemble` in a callback of `fit`"
            )
    found = hashlib.sha256()
    for line in _content_lines(program):
        found.update(f"{line}\n".encode())
    return found.hexdigest()[:16]


def is_same_program(first: Program, second: Program) -> bool:
    """Returns whether two programs have the same steps, with the same numbers and arrays in them."""
    return list(_content_lines(first)) == list(_content_lines(second))


def _content_lines(value: Any) -> Iterator[str]:
    """Yields the content of a program, or of a parameter of one of its steps, line by line."""
    if is_program(value):
        yield from map(digest, constants(value))
        yield from _step_lines(value)
    elif isinstance(value, tuple | list):
        yield f"{len(value)} of"
        for part in value:
            yield from _content_lines(part)
    elif isinstance(value, np.ndarray | jax.Array):
        yield digest(value)
    elif not callable(value):
        yield re.sub(r" at 0x[0-9a-f]+", "", str(value))  # addresses of objects, which change between processes


def _step_lines(program: Program) -> Iterator[str]:
    numbers: dict[Var, int] = {}

    def name(atom: Any) -> str:
        if isinstance(atom, Literal):
            return f"{np.asarray(atom.val).tolist()!r}:{atom.aval}"
        return f"{numbers.setdefault(atom, len(numbers))}:{atom.aval}"

    yield " ".join(map(name, (*program.constvars, *program.invars)))
    for step in program.eqns:
        yield f"{step.primitive.name} {' '.join(map(name, step.invars))}"
        for key, value in sorted(step.params.items()):
            if key != "name":
                yield key
                yield from _content_lines(value)
        yield " ".join(map(name, step.outvars))
    yield " ".join(map(name, program.outvars))
