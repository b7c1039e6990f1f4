"""Arguments of a call as a network's module takes them, and outputs as the forward returns them.

Arguments that were no arrays when the network was ported are fixed: a call may leave them out, or repeat them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxensemble.errors import InputError
from jaxensemble.network.network import Fixed, Network, Record, Ref, ReferenceTree
from jaxensemble.records import KINDS, items_of

ENSEMBLE_ARGUMENTS = frozenset({"key", "randomness", "plan", "each", "task"})
"""Names that have a meaning of their own in a call of an ensemble."""


def bind_arguments(
    network: Network | None, positional: Sequence[Any], named: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Returns the arguments that hold arrays, in the order of the network, without the fixed arguments.

    **Raises:** `InputError` with every argument that is missing, unknown or given twice, and with every fixed argument
    that has another value.

    >>> names = {"arguments": ("x", "by")}
    >>> network = Network("Net", (Ref("x"), Fixed(2.0)), Ref("x"), (), (), (), {"": ("Net", "module")}, **names)
    >>> bind_arguments(network, (1,)), bind_arguments(network, (), {"by": 2.0, "x": 1})
    ((1,), (1,))
    >>> bind_arguments(network, (1, 3.0))
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: the arguments are not those of the network Net:
      `by` was fixed to 2.0 when the network was ported; got 3.0: port it again for that
    """
    named = named or {}
    if network is None:
        if named:
            raise InputError(
                f"a network that was not ported takes its inputs by position; got {', '.join(named)} by name"
            )
        return tuple(positional)
    if (
        not named
        and len(network.open_inputs) == len(network.inputs)
        and all(isinstance(t, Ref) for t in network.inputs)
    ):
        return tuple(positional)  # the most frequent case; `check_inputs` counts them
    problems: list[str] = []
    given = _by_position(network, positional, named, problems)
    names = network.arguments or ("",) * len(network.inputs)
    kept = {}
    for k, tree in enumerate(network.inputs):
        place = names[k] or f"inputs[{k}]"
        if k in given:
            kept[k] = _drop_fixed_values(tree, given[k], place, problems)
        elif k in network.open_inputs:
            problems.append(f"`{place}` is missing")
    if problems:
        raise InputError(f"the arguments are not those of the network {network.name}:\n  " + "\n  ".join(problems))
    return tuple(kept[k] for k in network.open_inputs)


def _by_position(
    network: Network, positional: Sequence[Any], named: Mapping[str, Any], problems: list[str]
) -> dict[int, Any]:
    """Returns the arguments by their position among the network's inputs."""
    if len(positional) > len(network.inputs):
        problems.append(f"expected at most {len(network.inputs)} arguments, got {len(positional)} by position")
    given = dict(enumerate(positional[: len(network.inputs)]))
    positions = {name: k for k, name in enumerate(network.arguments) if name}
    for name, value in named.items():
        if name not in positions:
            known = ", ".join(positions) or "none by name"
            problems.append(
                f"`{name}` is no argument of the network; its arguments are {known}. If the forward has `{name}`, the "
                "example inputs left it out, so its default is fixed: port the network again with it in the example"
            )
        elif positions[name] in given:
            problems.append(f"`{name}` is given by position and by name")
        else:
            given[positions[name]] = value
    return given


def _drop_fixed_values(tree: ReferenceTree, value: Any, place: str, problems: list[str]) -> Any:
    """Returns a value with None for its fixed parts. A value of another structure is returned unchanged."""
    match tree:
        case None if value is not None:
            problems.append(_change_problem(place, None, value))
        case Fixed(fixed) if not _is_same(value, fixed):
            problems.append(_change_problem(place, fixed, value))
        case Ref():
            return value
        case dict() if isinstance(value, dict) and value.keys() == tree.keys():
            return {
                key: _drop_fixed_values(item, value[key], f"{place}[{key!r}]", problems) for key, item in tree.items()
            }
        case tuple() | list() if isinstance(value, tuple | list) and len(value) == len(tree):
            pairs = enumerate(zip(tree, value, strict=True))
            return [_drop_fixed_values(item, part, f"{place}[{k}]", problems) for k, (item, part) in pairs]
        case dict() | tuple() | list():
            return value  # `check_inputs` refuses it
    return None


def _change_problem(place: str, fixed: Any, value: Any) -> str:
    got = (
        repr(value) if value is None or isinstance(value, bool | int | float | complex | str) else type(value).__name__
    )
    return f"`{place}` was fixed to {fixed!r} when the network was ported; got {got}: port it again for that"


def _is_same(value: Any, fixed: Any) -> bool:
    """Returns whether two values are equal and of one type.

    PyTorch computes with 2 and 2.0, and with 1 and True, in different dtypes.
    """
    value = value.item() if isinstance(value, np.generic) else value
    return type(value) is type(fixed) and (value == fixed or (value != value and fixed != fixed))


def insert_fixed(network: Network, inputs: Sequence[Any]) -> list[Any]:
    """Returns all arguments by position: the inverse of `bind_arguments`.

    >>> network = Network("Net", (Fixed(2.0), Ref("x")), Ref("x"), (), (), (), {"": ("Net", "module")})
    >>> insert_fixed(network, (1,))
    [2.0, 1]
    """
    held = dict(zip(network.open_inputs, inputs, strict=True))
    return [_insert_fixed(tree, held.get(k)) for k, tree in enumerate(network.inputs)]


def _insert_fixed(tree: ReferenceTree, value: Any) -> Any:
    match tree:
        case Fixed(fixed):
            return fixed
        case dict():
            return {key: _insert_fixed(item, None if value is None else value[key]) for key, item in tree.items()}
        case tuple() | list():
            return [_insert_fixed(item, None if value is None else value[k]) for k, item in enumerate(tree)]
    return value


def restore_outputs(tree: ReferenceTree, outputs: Any) -> Any:
    """Returns the outputs of a JAX program in the form that the forward returns.

    JAX sorts the keys of dicts, and its programs return only arrays. Numbers and strings come from the network.

    >>> restore_outputs({"b": Ref("x"), "a": Fixed("text")}, {"a": None, "b": 1})
    {'b': 1, 'a': 'text'}
    """
    match tree:
        case Fixed(value):
            return value
        case Record(name, kind, fields):
            held = dict(items_of(outputs, tuple(fields)))
            made = KINDS[kind](name, *fields)
            return made(**{field: restore_outputs(item, held[field]) for field, item in fields.items()})
        case dict():
            return {key: restore_outputs(item, outputs[key]) for key, item in tree.items()}
        case tuple():
            return tuple(restore_outputs(item, outputs[k]) for k, item in enumerate(tree))
        case list():
            return [restore_outputs(item, outputs[k]) for k, item in enumerate(tree)]
    return outputs


def keep_arrays(outputs: Any) -> Any:
    """Returns outputs with None for numbers and strings, which `restore_outputs` puts back: no call changes them.

    >>> keep_arrays({"name": "text", "x": np.ones(2)})
    {'name': None, 'x': array([1., 1.])}
    """
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else None, outputs)
