"""Consistency of a network: names that are defined before they are used, paths that lead to modules."""

import keyword
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from jaxensemble.dtypes import PORTED
from jaxensemble.errors import InputError
from jaxensemble.network.network import (
    Call,
    Dtype,
    Fixed,
    Func,
    Layer,
    Network,
    Record,
    Ref,
    Slice,
    Var,
    Variable,
    references,
)

MODULE_KINDS = ("module", "sequence", "mapping", "function")
VARIABLE_KINDS = ("param", "buffer", "constant")
RECORD_KINDS = ("dataclass", "namedtuple", "mapping")

ARITY = {
    **dict.fromkeys(("+", "-", "*", "/", "//", "%", "**", "@", "&", "|", "^"), 2),
    **dict.fromkeys(("<", "<=", ">", ">=", "==", "!=", "[]", ".shape"), 2),
    "=": 3,
    **dict.fromkeys(("neg", "~"), 1),
}
"""The operators of `Call.target`, and the number of operands of each."""


def validate_network(network: Network) -> None:
    """Checks everything about a network that can be checked without its arrays.

    `jaxensemble.source` checks which functions and layers a network may name, and which names Flax can hold.

    **Raises:** `InputError` listing all problems.

    >>> validate_network(Network("Net", (Ref("x"),), Ref("y"), (), (), (), {"": ("Net", "module")}))
    Traceback (most recent call last):
    ...
    jaxensemble.errors.InputError: the network 'Net' does not hold together:
      the outputs use 'y' before it is defined
    """
    problems = list(_problems(network))
    if problems:
        listing = "\n  ".join(problems)
        raise InputError(f"the network {network.name!r} does not hold together:\n  {listing}")


def _problems(network: Network) -> Iterator[str]:
    mistyped = list(_type_problems(network))
    yield from mistyped
    if mistyped:  # the other checks rely on types
        return
    yield from _path_problems(network)
    yield from _module_problems(network)
    yield from _name_problems(network)
    for call in network.calls:
        yield from _call_problems(call, network)


def _type_problems(network: Network) -> Iterator[str]:
    """Problems with values that do not have the types stated in `jaxensemble.network.network`."""
    texts = [("name", network.name), *(("training", path) for path in network.training)]
    texts += [("the path of a layer", layer.path) for layer in network.layers]
    texts += [("the type of a layer", layer.type) for layer in network.layers]
    texts += [("the path of a variable", variable.path) for variable in network.variables]
    texts += [("the dtype of a variable", variable.dtype) for variable in network.variables]
    for call in network.calls:
        texts += [("the result of a call", call.out), ("the target of a call", call.target)]
        texts += [("the scope of a call", entry) for entry in call.scope]
    texts += [("modules", text) for path, entry in network.modules.items() for text in (path, *entry)]
    texts += [("evaluation_only", network.evaluation_only or "")]
    texts += [("arguments", argument) for argument in network.arguments]
    yield from (f"`{what}` must be a string; got {text!r}" for what, text in texts if not isinstance(text, str))
    for what, tree in [*(("inputs", tree) for tree in network.inputs), ("outputs", network.outputs)]:
        yield from (
            f"`{what}` must be a tree of references; got {leaf!r}" for leaf in _leaves(tree) if not _is_leaf(leaf)
        )
    yield from _argument_problems(network)
    for layer in network.layers:
        yield from (
            f"layer {layer.path}: {value!r} is no option" for value in _wrong_arguments(list(layer.options.values()))
        )
    for call in network.calls:
        yield from (
            f"call {call.out}: {value!r} is no argument" for value in _wrong_arguments((call.args, dict(call.kwargs)))
        )
    for name, shape in network.input_shapes.items():
        if not _is_shape(tuple(0 if size is None or _is_name(size) else size for size in shape)):
            yield f"input {name}: a shape is a tuple of sizes, None for the batch, and names; got {shape!r}"
        for size in {size for size in shape if isinstance(size, str) and size not in network.sizes}:
            yield f"input {name}: `sizes` does not say what {size!r} may be"
    for name, sizes in network.sizes.items():
        numbers = (sizes.least, sizes.multiple, sizes.least if sizes.most is None else sizes.most)
        if not _is_name(name) or not all(type(number) is int and number > 0 for number in numbers):
            yield f"`sizes`: {name!r} must be a name with numbers above 0; got {sizes!r}"
    for name, dtype in network.input_dtypes.items():
        if dtype not in PORTED.values():
            yield f"input {name}: {dtype!r} is no dtype of an array"
    for variable in network.variables:
        if not _is_shape(variable.shape):
            yield f"variable {variable.path}: a shape is a tuple of sizes; got {variable.shape!r}"


def _argument_problems(network: Network) -> Iterator[str]:
    """Problems with the names of arguments, with records among the inputs, and with the names in records."""
    names = [name for name in network.arguments if name != ""]
    if network.arguments and len(network.arguments) != len(network.inputs):
        yield f"`arguments` must name each of {len(network.inputs)} inputs; got {network.arguments!r}"
    yield from (f"`arguments` must be names; got {name!r}" for name in names if not _is_name(name))
    yield from (f"`arguments` has {name!r} twice" for name in _duplicates(map(str, names)))
    if any(_records(network.inputs)):
        yield "`inputs` must not hold records"
    for record in _records(network.outputs):
        if record.kind not in RECORD_KINDS:
            yield f"record {record.name!r}: expected a kind in {RECORD_KINDS}; got {record.kind!r}"
        wrong = [name for name in (record.name, *record.fields) if not _is_name(name) or name.startswith("__")]
        wrong += [name for name in record.fields if record.kind == "namedtuple" and str(name).startswith("_")]
        yield from (f"record {record.name!r}: {name!r} cannot be a name in it" for name in wrong)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _records(tree: Any) -> Iterator[Record]:
    match tree:
        case Record():
            yield tree
            yield from _records(list(tree.fields.values()))
        case dict():
            yield from _records(list(tree.values()))
        case tuple() | list():
            for item in tree:
                yield from _records(item)


def _leaves(tree: Any) -> Iterator[Any]:
    match tree:
        case Record():
            yield from _leaves(dict(tree.fields))
        case dict():
            for key, item in tree.items():
                yield from _leaves(item) if isinstance(key, str) else [key]
        case tuple() | list():
            for item in tree:
                yield from _leaves(item)
        case _:
            yield tree


def _is_leaf(leaf: Any) -> bool:
    if isinstance(leaf, Fixed):
        return type(leaf.value) in (bool, int, float, complex, str)
    return leaf is None or (isinstance(leaf, Ref) and isinstance(leaf.name, str))


def _wrong_arguments(arg: Any) -> Iterator[Any]:
    """Yields every value within arguments that is no `Arg`."""
    match arg:
        case None | bool() | int() | float() | complex() | str():
            return
        case Ref(text) | Var(text) | Dtype(text) | Func(text) if isinstance(text, str):
            return
        case Slice(start, stop, step):
            yield from _wrong_arguments((start, stop, step))
        case tuple() | list():
            for item in arg:
                yield from _wrong_arguments(item)
        case dict() if all(isinstance(key, str) for key in arg):
            yield from _wrong_arguments(list(arg.values()))
        case _ if arg is not ...:
            yield arg


def _is_shape(shape: Any) -> bool:
    sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    return sizes and math.prod(shape) < 2**63


def _duplicates(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _path_problems(network: Network) -> Iterator[str]:
    held: list[Layer | Variable] = [*network.layers, *network.variables]
    layers = {layer.path for layer in network.layers}
    for path in _duplicates(item.path for item in held):
        yield f"two layers or variables have the path {path!r}"
    for item in held:
        if not all(item.path.split(".")):
            yield f"a path must be names joined by dots; got {item.path!r}"
        if item.path in network.modules:
            yield f"{item.path!r} is in `modules`, so it cannot be a layer or variable"
        for parent in _parents(item.path):
            if parent in layers:
                yield f"{item.path!r} is inside the layer {parent!r}"
    for variable in network.variables:
        if variable.kind not in VARIABLE_KINDS:
            yield f"variable {variable.path}: expected a kind in {VARIABLE_KINDS}; got {variable.kind!r}"
    yield from (f"`training` names {path!r}, which is no layer" for path in network.training if path not in layers)


def _parents(path: str) -> list[str]:
    """Returns the paths of the modules that contain a path, outermost first, without the root.

    >>> _parents("a.b.c")
    ['a', 'a.b']
    """
    parts = path.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _module_problems(network: Network) -> Iterator[str]:
    layers = {layer.path for layer in network.layers}
    needed = {"", *(parent for path in network.modules for parent in _parents(path))}
    needed |= {parent for item in (*network.layers, *network.variables) for parent in _parents(item.path)}
    for entry in {entry for call in network.calls for entry in call.scope}:
        path = entry.partition("@")[0]
        if path not in layers and not any(parent in layers for parent in _parents(path)):
            needed |= {path, *_parents(path)}
    for path in sorted(needed - set(network.modules)):
        yield f"`modules` must name every module on the way; {path!r} is missing"
    for path, (_, kind) in network.modules.items():
        if kind not in MODULE_KINDS:
            yield f"module {path!r}: expected a kind in {MODULE_KINDS}; got {kind!r}"
        if path and not all(path.split(".")):
            yield f"a path must be names joined by dots; got {path!r}"


def _name_problems(network: Network) -> Iterator[str]:
    inputs = [ref.name for ref in references(network.inputs) if isinstance(ref, Ref)]
    for name in _duplicates([*inputs, *(call.out for call in network.calls)]):
        yield f"{name!r} is defined twice"
    defined = set(inputs)
    for call in network.calls:
        for name in _undefined_names((call.args, call.kwargs), defined):
            yield f"call {call.out} ({call.target}) uses {name!r} before it is defined"
        defined.add(call.out)
    yield from (f"the outputs use {name!r} before it is defined" for name in _undefined_names(network.outputs, defined))


def _undefined_names(arg: Any, defined: set[str]) -> list[str]:
    names = [ref.name for ref in references(arg) if isinstance(ref, Ref)]
    return [name for name in dict.fromkeys(names) if name not in defined]


def _call_problems(call: Call, network: Network) -> Iterator[str]:
    layers = {layer.path for layer in network.layers}
    variables = {variable.path for variable in network.variables}
    where = f"call {call.out} ({call.target})"
    if call.target.startswith("layer:") and call.target.removeprefix("layer:") not in layers:
        yield f"{where}: there is no layer at this path"
    if call.target in ARITY and (len(call.args) != ARITY[call.target] or call.kwargs):
        yield f"{where}: expected {ARITY[call.target]} operands; got {len(call.args)} and {len(call.kwargs)} by name"
    elif call.target == ".shape" and not (isinstance(call.args[0], Ref | Var) and type(call.args[1]) is int):
        yield f"{where}: expected a value and the number of an axis; got {call.args!r}"
    elif call.target.startswith(".") and not (call.args and isinstance(call.args[0], Ref | Var)):
        yield f"{where}: expected a value as the first argument of a method"
    flags = {layer.path for layer in network.layers if layer.type == "layers.Training"}
    if call.target == "=":
        variable, value, flag = call.args if len(call.args) == 3 else (None, None, None)
        if not (isinstance(variable, Var) and isinstance(value, Ref) and isinstance(flag, Var) and flag.path in flags):
            yield f"{where}: expected a variable, a value and a layers.Training; got {call.args!r}"
            return
    for ref in references((call.args[:2] if call.target == "=" else call.args, call.kwargs)):
        if isinstance(ref, Var) and ref.path not in variables and layers.isdisjoint(_parents(ref.path)):
            yield f"{where}: there is no variable {ref.path!r}"
