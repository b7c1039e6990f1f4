"""`Network` to JSON and back, without loss: NaNs, infinities, signs, tuples and complex numbers included."""

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
from jaxensemble.network.validation import validate_network

NETWORK_FORMAT = 3
"""The number of the format that is written."""

READABLE_FORMATS = (1, 2, NETWORK_FORMAT)
"""The formats that are read; all others are refused.

Format 1 has no `arguments`, no fixed inputs and no records. Format 2 has no open sizes except the size of the batch.
"""

_NAME_TYPES: dict[str, Callable[[str], Any]] = {"ref": Ref, "var": Var, "dtype": Dtype, "func": Func}


def to_json(network: Network) -> str:
    """Returns a network as JSON text, which `from_json` reads back as an equal network.

    >>> network = Network("Net", (Ref("x"),), (Ref("x"), None), (), (), (), {"": ("Net", "module")})
    >>> from_json(to_json(network)) == network
    True
    """
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    fields |= {
        "inputs": [_encode(tree) for tree in network.inputs],
        "outputs": _encode(network.outputs),
        "layers": [dataclasses.asdict(x) | {"options": _encode_values(x.options)} for x in network.layers],
        "variables": [dataclasses.asdict(variable) for variable in network.variables],
        "calls": [_encode_call(call) for call in network.calls],
        "modules": dict(network.modules),
        "input_shapes": dict(network.input_shapes),
        "input_dtypes": dict(network.input_dtypes),
        "sizes": {name: dataclasses.asdict(sizes) for name, sizes in network.sizes.items()},
    }
    return json.dumps({"format": NETWORK_FORMAT} | fields, indent=1, allow_nan=False)


def from_json(text: str) -> Network:
    """Reads the network that `to_json` wrote. `validate_network` checks its content; nothing in the text is run.

    **Raises:** `InputError` for a text that is no JSON or no network of this format, and for a network that does not
    hold together.
    """
    fields = parse_json(text, "the text of a network")
    try:
        network = _network(fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"the text is no network in JSON, as `to_json` writes it: {error!r}") from error
    validate_network(network)
    return network


def _network(fields: dict[str, Any]) -> Network:
    if fields.pop("format") not in READABLE_FORMATS:
        raise ValueError(f"expected a format in {READABLE_FORMATS}")
    fields |= {
        "inputs": tuple(map(_decode, fields["inputs"])),
        "outputs": _decode(fields["outputs"]),
        "layers": tuple(Layer(**layer | {"options": _decode_values(layer["options"])}) for layer in fields["layers"]),
        "variables": tuple(Variable(**x | {"shape": tuple(x["shape"])}) for x in fields["variables"]),
        "calls": tuple(map(_decode_call, fields["calls"])),
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


def _encode_call(call: Call) -> dict[str, Any]:
    encoded = {"out": call.out, "target": call.target, "args": [_encode(arg) for arg in call.args]}
    return encoded | {"kwargs": _encode_values(call.kwargs), "scope": list(call.scope)}


def _decode_call(fields: dict[str, Any]) -> Call:
    args, kwargs = tuple(map(_decode, fields["args"])), _decode_values(fields["kwargs"])
    return Call(**fields | {"args": args, "kwargs": kwargs, "scope": tuple(fields["scope"])})


def _encode_values(values: Any) -> dict[str, Any]:
    return {key: _encode(value) for key, value in values.items()}


def _decode_values(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _decode(value) for key, value in values.items()}


def _encode(value: Any) -> Any:
    """Returns an argument or tree as JSON data. A value that JSON lacks is an object with one key, its kind."""
    match value:
        case Ref(text) | Var(text) | Dtype(text) | Func(text):
            return {type(value).__name__.lower(): text}
        case Slice(start, stop, step):
            return {"slice": [_encode(part) for part in (start, stop, step)]}
        case tuple():
            return {"tuple": [_encode(item) for item in value]}
        case list():
            return [_encode(item) for item in value]
        case dict():
            return {"dict": _encode_values(value)}
        case Fixed(inner):
            return {"fixed": _encode(inner)}
        case Record(name, kind, fields):
            return {"record": {"name": name, "kind": kind, "fields": _encode_values(fields)}}
        case complex():
            return {"complex": [_encode(value.real), _encode(value.imag)]}
        case float() if not math.isfinite(value):
            return {"float": repr(value)}
    return {"ellipsis": None} if value is ... else value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "ref" | "var" | "dtype" | "func":
            return _NAME_TYPES[kind](inner)
        case "slice":
            start, stop, step = map(_decode, inner)
            return Slice(start, stop, step)
        case "tuple":
            return tuple(map(_decode, inner))
        case "dict":
            return _decode_values(inner)
        case "fixed":
            return Fixed(_decode(inner))
        case "record":
            return Record(**inner | {"fields": _decode_values(inner["fields"])})
        case "complex":
            real, imaginary = map(_decode, inner)
            return complex(real, imaginary)
        case "float" if inner in ("inf", "-inf", "nan"):
            return float(inner)
        case "ellipsis":
            return ...
    raise ValueError(f"{kind!r} is no kind of argument")
