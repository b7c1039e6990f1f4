"""Opaque stand-ins, in a captured graph, for operations that behave differently in training.

The last argument of a stand-in is its mode: `by_mode` (training only in training), `always` or `never`. Torch would
decompose the operations themselves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torch_bridge.compat import has_side_effect, schema_of

_ATEN = torch.ops.aten

FLAGGED = {
    "batch_norm": (_ATEN.batch_norm.default, 5),
    "instance_norm": (_ATEN.instance_norm.default, 5),
    "dropout": (_ATEN.dropout.default, 2),
    "feature_dropout": (_ATEN.feature_dropout.default, 2),
    "alpha_dropout": (_ATEN.alpha_dropout.default, 2),
    "feature_alpha_dropout": (_ATEN.feature_alpha_dropout.default, 2),
    "rrelu": (_ATEN.rrelu.default, 3),
    "lstm": (_ATEN.lstm.input, 6),
    "gru": (_ATEN.gru.input, 6),
    "rnn_tanh": (_ATEN.rnn_tanh.input, 6),
    "rnn_relu": (_ATEN.rnn_relu.input, 6),
    "attention": (_ATEN.scaled_dot_product_attention.default, 4),
}
"""Operations with a training flag: name to (operation, position of the flag). Attention's flag is a rate."""

_STATISTICS = ("batch_norm", "instance_norm")
"""Operations that may write running statistics: they run in training even if nothing uses their results."""

DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")

IN_PLACE = {
    _ATEN.dropout_.default: "dropout",
    _ATEN.feature_dropout_.default: "feature_dropout",
    _ATEN.alpha_dropout_.default: "alpha_dropout",
    _ATEN.feature_alpha_dropout_.default: "feature_alpha_dropout",
    _ATEN.rrelu_.default: "rrelu",
}
NAMES: dict[Any, str] = {op: name for name, (op, _) in FLAGGED.items()} | IN_PLACE

_NORM = "Tensor x, Tensor? w, Tensor? b, Tensor? mean, Tensor? var, float momentum, float eps"
_OPTIONS = "bool has_biases, int num_layers, float dropout, bool bidirectional, bool batch_first"
_SCHEMAS = {
    "batch_norm": f"({_NORM}, str mode) -> Tensor",
    "instance_norm": f"({_NORM}, str mode) -> Tensor",
    **dict.fromkeys(DROPOUTS, "(Tensor x, float p, str mode) -> Tensor"),
    "rrelu": "(Tensor x, Scalar lower, Scalar upper, str mode) -> Tensor",
    "lstm": f"(Tensor x, Tensor[] hx, Tensor[] params, {_OPTIONS}, str mode) -> (Tensor, Tensor, Tensor)",
    **dict.fromkeys(
        ("gru", "rnn_tanh", "rnn_relu"),
        f"(Tensor x, Tensor hx, Tensor[] params, {_OPTIONS}, str mode) -> (Tensor, Tensor)",
    ),
    "linspace": "(Scalar start, Scalar end, SymInt steps, *, ScalarType dtype, Device? device=None) -> Tensor",
    "by_mode": "(Tensor training, Tensor evaluation) -> Tensor",
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, "
    "bool enable_gqa, float dropout_p, str mode) -> Tensor",
}


class Mode(NamedTuple):
    """Mode of an operation: when it behaves as in training, and the rate of attention's dropout then."""

    when: str
    rate: float = 0.0


def _sequence(x: Tensor, hx: Tensor, bidirectional: bool) -> Tensor:
    return x.new_empty((*x.shape[:2], hx.shape[-1] * (2 if bidirectional else 1)))


def _lstm(x: Tensor, hx: list[Tensor], params: Any, *options: Any) -> tuple[Tensor, ...]:
    return _sequence(x, hx[0], options[3]), *map(torch.empty_like, hx)


def _recurrent(x: Tensor, hx: Tensor, params: Any, *options: Any) -> tuple[Tensor, Tensor]:
    return _sequence(x, hx, options[3]), torch.empty_like(hx)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


_RESULTS: dict[str, Callable[..., Any]] = {
    "lstm": _lstm,
    **dict.fromkeys(("gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "attention": _attention,
    "linspace": lambda start, end, steps, *, dtype, device=None: torch.empty(steps, dtype=dtype, device=device),
}
"""Functions that return results of the right shape, if it is not the shape of the first argument."""


@functools.cache
def _library() -> torch.library.Library:
    """Returns the library of stand-ins. Only shapes matter, because PyTorch never runs the graph."""
    library = torch.library.Library("torch_bridge", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(f"{name}{schema}")
        result = _RESULTS.get(name, lambda x, *args: torch.empty_like(x))
        library.impl(name, result, "CompositeExplicitAutograd")
    for name in _STATISTICS:
        has_side_effect(getattr(torch.ops.torch_bridge, name).default)
    return library


def stand_in(name: str) -> Any:
    """Returns the opaque operation for one of `FLAGGED` in a captured graph."""
    _library()
    return getattr(torch.ops.torch_bridge, name).default


def all_args(node: fx.Node) -> list[Any]:
    """Returns a node's arguments in the order of its schema, with defaults for missing ones."""
    schema = schema_of(node.target).arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(argument.name, argument.default_value) for argument in schema]


def training_flag(node: fx.Node) -> Any:
    """Returns the training flag of a node (a rate for attention), or None if the operation has no flag."""
    name = NAMES.get(node.target)
    return None if name is None else all_args(node)[FLAGGED[name][1]]


def insert_stand_ins(graph: fx.Graph, modes: dict[str, Mode] | None) -> None:
    """Puts the stand-ins into a graph. Without `modes`, each flag becomes `always` or `never`."""
    for node in list(graph.nodes):
        name = NAMES.get(node.target)
        if name is None:
            continue
        mode = modes[node.name] if modes is not None else Mode("always" if training_flag(node) else "never")
        if name == "attention" and mode.when != "by_mode":
            continue  # without dropout it needs no stand-in, and its rule refuses dropout in both modes
        with graph.inserting_before(node):
            new = graph.call_function(stand_in(name), stand_in_args(name, all_args(node), mode))
            new.meta = dict(node.meta)
            if node.target in IN_PLACE:
                new = graph.call_function(_ATEN.copy_.default, (node.args[0], new))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def stand_in_args(name: str, given: list[Any], mode: Mode) -> tuple[Any, ...]:
    """Returns the arguments of a stand-in: the operation's arguments, with the mode instead of the flag."""
    args = [arg for k, arg in enumerate(given) if k != FLAGGED[name][1]]
    extra = [mode.rate] if name == "attention" else []
    count = len(schema_of(stand_in(name)).arguments) - 1 - len(extra)
    return (*args[:count], *extra, mode.when)
