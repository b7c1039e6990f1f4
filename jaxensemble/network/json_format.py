"""A `Network` as JSON and back, without loss: NaNs, infinities, signs, tuples and complex numbers included."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from jaxensemble.errors import InputError
from jaxensemble.files.schema import parse_json
from jaxensemble.network.network import (
    Call,
    Dtype,
    Fixed,
    Func,
    Layer,
    Network,
    Record,
    Ref,
    Sizes,
    Slice,
    Var,
    Variable,
)
from jaxensemble.network.validation import validate

FORMAT = 3
"""The number of the layout written here."""

READ = (1, 2, FORMAT)
"""The layouts that are read; others are refused.

The first has no `arguments`, nothing fixed, and no records; the second no open sizes but the batch's.
"""

_NAMED: dict[str, Callable[[str], Any]] = {"ref": Ref, "var": Var, "dtype": Dtype, "func": Func}


def to_json(network: Network) -> str:
    """A network as JSON text, which `from_json` reads back as an equal network.

    >>> network = Network("Net", (Ref("x"),), (Ref("x"), None), (), (), (), {"": ("Net", "module")})
    >>> from_json(to_json(network)) == network
    True
    """
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    fields |= {
        "inputs": [_encoded(tree) for tree in network.inputs],
        "outputs": _encoded(network.outputs),
        "layers": [dataclasses.asdict(x) | {"options": _encoded_values(x.options)} for x in network.layers],
        "variables": [dataclasses.asdict(variable) for variable in network.variables],
        "calls": [_encoded_call(call) for call in network.calls],
        "modules": dict(network.modules),
        "input_shapes": dict(network.input_shapes),
        "input_dtypes": dict(network.input_dtypes),
        "sizes": {name: dataclasses.asdict(sizes) for name, sizes in network.sizes.items()},
    }
    return json.dumps({"format": FORMAT} | fields, indent=1, allow_nan=False)


def from_json(text: str) -> Network:
    """The network that `to_json` wrote. What it says is checked by `validate`; nothing in it is run.

    **Raises:** `InputError` for a text that is no JSON or no network of this format, and for a network that does not
    hold together.
    """
    fields = parse_json(text, "the text of a network")
    try:
        network = _network(fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"the text is no network in JSON, as `to_json` writes it: {error!r}") from error
    validate(network)
    return network


def _network(fields: dict[str, Any]) -> Network:
    if fields.pop("format") not in READ:
        raise ValueError(f"expected a format in {READ}")
    fields |= {
        "inputs": tuple(map(_decoded, fields["inputs"])),
        "outputs": _decoded(fields["outputs"]),
        "layers": tuple(Layer(**layer | {"options": _decoded_values(layer["options"])}) for layer in fields["layers"]),
        "variables": tuple(Variable(**x | {"shape": tuple(x["shape"])}) for x in fields["variables"]),
        "calls": tuple(map(_decoded_call, fields["calls"])),
        "modules": {path: _pair(entry) for path, entry in fields["modules"].items()},
        "training": tuple(fields["training"]),
        "input_shapes": {name: tuple(shape) for name, shape in fields["input_shapes"].items()},
        "input_dtypes": dict(fields["input_dtypes"]),
        "arguments": tuple(fields.get("arguments", ())),
        "sizes": {name: Sizes(**sizes) for name, sizes in fields.get("sizes", {}).items()},
    }
    return Network(**fields)


def _pair(entry: list[str]) -> tuple[str, str]:
    class_name, kind = entry
    return class_name, kind


def _encoded_call(call: Call) -> dict[str, Any]:
    encoded = {"out": call.out, "target": call.target, "args": [_encoded(arg) for arg in call.args]}
    return encoded | {"kwargs": _encoded_values(call.kwargs), "scope": list(call.scope)}


def _decoded_call(fields: dict[str, Any]) -> Call:
    args, kwargs = tuple(map(_decoded, fields["args"])), _decoded_values(fields["kwargs"])
    return Call(**fields | {"args": args, "kwargs": kwargs, "scope": tuple(fields["scope"])})


def _encoded_values(values: Any) -> dict[str, Any]:
    return {key: _encoded(value) for key, value in values.items()}


def _decoded_values(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _decoded(value) for key, value in values.items()}


def _encoded(value: Any) -> Any:
    """An argument or tree. What JSON has no word for is an object with one key that says what it is."""
    match value:
        case Ref(text) | Var(text) | Dtype(text) | Func(text):
            return {type(value).__name__.lower(): text}
        case Slice(start, stop, step):
            return {"slice": [_encoded(part) for part in (start, stop, step)]}
        case tuple():
            return {"tuple": [_encoded(item) for item in value]}
        case list():
            return [_encoded(item) for item in value]
        case dict():
            return {"dict": _encoded_values(value)}
        case Fixed(inner):
            return {"fixed": _encoded(inner)}
        case Record(name, kind, fields):
            return {"record": {"name": name, "kind": kind, "fields": _encoded_values(fields)}}
        case complex():
            return {"complex": [_encoded(value.real), _encoded(value.imag)]}
        case float() if not math.isfinite(value):
            return {"float": repr(value)}
    return {"ellipsis": None} if value is ... else value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "ref" | "var" | "dtype" | "func":
            return _NAMED[kind](inner)
        case "slice":
            start, stop, step = map(_decoded, inner)
            return Slice(start, stop, step)
        case "tuple":
            return tuple(map(_decoded, inner))
        case "dict":
            return _decoded_values(inner)
        case "fixed":
            return Fixed(_decoded(inner))
        case "record":
            return Record(**inner | {"fields": _decoded_values(inner["fields"])})
        case "complex":
            real, imaginary = map(_decoded, inner)
            return complex(real, imaginary)
        case "float" if inner in ("inf", "-inf", "nan"):
            return float(inner)
        case "ellipsis":
            return ...
    raise ValueError(f"{kind!r} is no kind of argument")
