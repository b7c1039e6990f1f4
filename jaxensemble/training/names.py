"""Names of the numbers that functions hold, for example in the closures of optax's optimizers.

They are written into checkpoints and errors. Strings are left out, since they may be secret: keys, names, addresses.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PLAIN = (bool, int, float, complex, type(None))

_FEW = 8
"""Most numbers of an array that are written out."""

_LONGEST = 80
"""Most characters of a value that are written out."""

_DEEPEST = 12
"""Depth to which functions within functions are searched."""

_WRITTEN = "numbers"
"""Name of the numbers in the code of a function."""

_WRAPPERS = {"chain", "with_extra_args_support", "named_chain"}


def named_parts(function: Any) -> dict[str, str]:
    """Returns the numbers and flags that a Python function holds, and the functions it is made of, by name.

    For an optimizer, these are the parts of its update. A negative scale is called the learning rate, since optax turns
    a learning rate into such a scale.

    >>> import optax
    >>> named_parts(optax.sgd(0.1, momentum=0.9))
    {'made of': 'trace, scale', 'decay of trace': '0.9', 'nesterov of trace': 'False', 'learning rate': '0.1'}
    """
    owners: list[str] = []
    found: dict[str, str] = {}
    with contextlib.suppress(Exception):  # objects may refuse to be read, and the names are for people only
        _collect(getattr(function, "update", function), owners, found)
    return {"made of": ", ".join(owners)} | found


def _collect(function: Any, owners: list[str], found: dict[str, str]) -> None:
    for owner, name, value in _walk(function, set(), 0):
        if name is None:
            owners += [owner] if owner not in (*_WRAPPERS, *owners[-1:]) else []
            continue
        where = "a lambda" if owner == "<lambda>" else owner
        label = f"numbers written in {where}" if name == _WRITTEN else f"{name} of {where}"
        if label == "step_size of scale" and isinstance(value, float | int) and value < 0:
            label, value = "learning rate", -value
        if value is not None and not isinstance(value, type):
            found[_free_name(label, found)] = short_text(value)


def short_text(value: Any) -> str:
    """Returns a value as text; for many numbers, their count.

    >>> [short_text(value) for value in (np.array([0.1, 0.3], "float32"), np.zeros(1000), np.float32(0.3), [1, None])]
    ['[0.1, 0.3]', 'float64[1000]', '0.3', '[1, None]']
    """
    if isinstance(value, jax.Array | np.ndarray):
        if value.size > _FEW:
            return f"{value.dtype}{list(value.shape)}"
        numbers = ", ".join(map(str, np.asarray(value).ravel()))
        return f"[{numbers}]" if value.ndim else numbers
    if isinstance(value, list) and len(value) > _FEW:
        return f"{len(value)} values"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _free_name(name: str, taken: Mapping[str, str]) -> str:
    """Returns the name, with a number where the name is taken."""
    names = (name if k == 1 else f"{name} ({k})" for k in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _walk(value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, str | None, Any]]:
    """Yields (function, None, None) for functions within a function, and (function, name, value) for their values."""
    value = getattr(value, "__wrapped__", value)
    if id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        owner = _owner_name(value.func)
        yield from _walk_values(
            owner, {**{f"argument {k}": x for k, x in enumerate(value.args)}, **value.keywords}, seen, depth
        )
        yield from _walk(value.func, seen, depth + 1)
    elif hasattr(value, "__self__") and not isinstance(
        value.__self__, types.ModuleType
    ):  # a method of an object that is no module
        yield _owner_name(value), None, None
        named = _code_names(getattr(value.__func__, "__code__", None)) if isinstance(value, types.MethodType) else set()
        own = getattr(value.__self__, "__dict__", {})
        yield from _walk_values(_owner_name(value), {name: own[name] for name in own if name in named}, seen, depth)
    elif hasattr(value, "__code__"):
        yield _owner_name(value), None, None
        yield from _walk_values(_owner_name(value), _held_values(value), seen, depth)


def _walk_values(
    owner: str, held: Mapping[str, Any], seen: set[int], depth: int
) -> Iterator[tuple[str, str | None, Any]]:
    for name, value in held.items():
        if _is_plain(value):
            yield owner, name, value
        elif hasattr(value, "update") and hasattr(value, "init"):  # an optax optimizer, which is also a tuple
            yield from _walk(value.update, seen, depth + 1)
        elif isinstance(value, Mapping):  # numbered, since its keys may be secret
            yield from _walk_values(owner, {f"{name} {k}": item for k, item in enumerate(value.values())}, seen, depth)
        elif isinstance(value, tuple | list):
            if all(isinstance(item, _PLAIN) for item in value):
                yield owner, name, list(value)
            else:
                yield from _walk_values(owner, {f"{name} {k}": item for k, item in enumerate(value)}, seen, depth)
        elif callable(value):
            yield from _walk(value, seen, depth + 1)


def _is_plain(value: Any) -> bool:
    """Returns whether a value is a flag, numbers or a dtype of numbers."""
    if isinstance(value, jax.Array | np.ndarray | np.generic | np.dtype):
        dtype = value if isinstance(value, np.dtype) else value.dtype
        return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    return isinstance(value, _PLAIN)


def _code_names(code: Any) -> set[str]:
    """Returns the names in the code of a function, and of functions defined within it."""
    if not isinstance(code, types.CodeType):
        return set()
    return set(code.co_names).union(*map(_code_names, code.co_consts))


def _held_values(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the values that a function holds: defaults, closure variables, and numbers in its code or globals."""
    code, held = function.__code__, {}
    defaults = function.__defaults__ or ()
    held |= dict(zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True))
    held |= function.__kwdefaults__ or {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # the name gets its value later
            continue
    if _is_of_optax(function):
        return held
    numbers = [number for number in code.co_consts if type(number) in (int, float)]
    held |= {_WRITTEN: numbers} if numbers else {}
    around = function.__globals__
    return held | {name: around[name] for name in code.co_names if isinstance(around.get(name), int | float)}


def _owner_name(function: Any) -> str:
    """Returns a function's name; for a lambda or an optimizer's function, the name of the function that made it."""
    name = getattr(function, "__qualname__", type(function).__name__)
    parts = [part for part in name.split(".") if part != "<locals>"]
    return parts[0 if _is_of_optax(function) or parts[-1] in ("<lambda>", "update") else -1]


def _is_of_optax(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "optax"
