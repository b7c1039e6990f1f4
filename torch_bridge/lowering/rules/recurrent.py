"""Recurrent layers and cells.

PyTorch's weights are `[gates * H, I]`. They are stored transposed: `[I, gates * H]`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from jaxensemble.network.network import Arg, Func, Ref, Var
from torch_bridge.lowering.builder import Builder, Wanted
from torch_bridge.lowering.dims import settled_value
from torch_bridge.lowering.dtypes import param_dtype
from torch_bridge.lowering.layouts.layout import Layout
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value, sizes

Options = dict[str, Arg]
ACTIVATIONS: dict[str, Options] = {"rnn_tanh": {}, "rnn_relu": {"activation_fn": Func("nnx.relu")}}


@register("torch_bridge.lstm.default")
def lstm(b: Builder, x: Operand, hx: Sequence[Operand], params: Sequence[Operand], *options: Any) -> tuple[Value, ...]:
    return _layers(b, "LSTM", {}, x, list(hx), params, *options)


@register("torch_bridge.gru.default")
def gru(b: Builder, x: Operand, hx: Operand, params: Sequence[Operand], *options: Any) -> tuple[Value, ...]:
    return _layers(b, "GRU", {}, x, [hx], params, *options)


def _rnn(kind: str) -> Callable[..., tuple[Value, ...]]:
    """The rule of a plain recurrent layer."""

    def rule(b: Builder, x: Operand, hx: Operand, params: Sequence[Operand], *options: Any) -> tuple[Value, ...]:
        return _layers(b, "RNN", ACTIVATIONS[kind], x, [hx], params, *options)

    return rule


for _kind in ACTIVATIONS:
    register(f"torch_bridge.{_kind}.default")(_rnn(_kind))


class _Settings(NamedTuple):
    """The options of a sequence operation, in PyTorch's order."""

    has_biases: bool
    num_layers: int
    dropout: float
    bidirectional: bool
    batch_first: bool
    mode: str

    @property
    def names(self) -> list[str]:
        """The cells' names in the layer, in the order of PyTorch's weights."""
        ways = ("forward", "backward") if self.bidirectional else ("forward",)
        return [f"{way}_{k}" for k in range(self.num_layers) for way in ways]

    @property
    def rate(self) -> float:
        """The rate of dropout between layers."""
        return self.dropout if self.mode != "never" and self.num_layers > 1 else 0.0

    @property
    def order(self) -> Options:
        """The option for the order of batch and time."""
        return {} if self.batch_first else {"time_major": True}

    @property
    def always(self) -> Options:
        """The options of a call that drops in evaluation too."""
        return {"deterministic": False} if self.rate and self.mode == "always" else {}

    @property
    def options(self) -> Options:
        """The options of the layer."""
        options: Options = {"num_layers": self.num_layers} if self.num_layers > 1 else {}
        options |= {} if self.has_biases else {"use_bias": False}
        options |= {"bidirectional": True} if self.bidirectional else {}
        return options | ({"rate": self.rate} if self.rate else {}) | self.order


class _Sequence(NamedTuple):
    """A sequence operation: its type in Flax, its input and initial states, and the weights of its cells."""

    type: str
    activation: Options
    settings: _Settings
    x: Value
    begin: list[Ref | Var] | None
    parts: int
    cells: list[list[Value]]


def _layers(
    b: Builder,
    type_: str,
    activation: Options,
    x: Operand,
    states: Sequence[Operand],
    params: Sequence[Operand],
    *settings: Any,
) -> tuple[Value, ...]:
    """Layers over a sequence: one layer where a module holds the weights, else calls for each direction."""
    options = _Settings(*settings)
    if options.rate:
        b.refuse_hidden_draws(options.mode)
    weights = [b.value(weight) for weight in params]
    size = len(weights) // len(options.names)
    cells = [weights[k : k + size] for k in range(0, len(weights), size)]
    begin = _initial(b, states)
    sequence = _Sequence(type_, activation, options, b.plain(settled_value(b, x)), begin, len(states), cells)
    path = _claim_layer(b, sequence)
    return _write_out_layers(b, sequence) if path is None else _call_layer(b, path, sequence)


def _claim_layer(b: Builder, sequence: _Sequence) -> str | None:
    """The path of the layer that holds the weights."""
    type_, activation, settings, cells = sequence.type, sequence.activation, sequence.settings, sequence.cells
    leaves = {
        f"{name}.{leaf}": held
        for name, cell in zip(settings.names, cells, strict=True)
        for leaf, held in _leaves(cell, settings.has_biases).items()
    }
    options = _features(cells[0], type_) | activation | settings.options | param_dtype(cells[0][0])
    return b.claim(f"layers.{type_}", options, leaves)


def _call_layer(b: Builder, path: str, sequence: _Sequence) -> tuple[Value, ...]:
    """A call of the layer at a path."""
    result = b.emit(f"layer:{path}", sequence.x.expr, *_state(sequence.begin), **sequence.settings.always)
    y, end = b.emit("[]", result, 0), b.emit("[]", result, 1)
    return _results(b, y, *_parts(b, end, sequence.parts))


def _write_out_layers(b: Builder, sequence: _Sequence) -> tuple[Value, ...]:
    """Calls of functions with bare weights: layer after layer, both directions of each."""
    settings, y = sequence.settings, sequence.x.expr
    ends: list[Ref] = []
    for k in range(settings.num_layers):
        if k and settings.rate:
            path = b.stateless_layer("nnx.Dropout", {"rate": settings.rate}, "dropout")
            y = b.emit(f"layer:{path}", y, **settings.always)
        width = len(sequence.cells) // settings.num_layers
        results = [_call_one_way(b, sequence, y, cell) for cell in range(k * width, (k + 1) * width)]
        outputs = [b.emit("[]", result, 0) for result in results]
        ends += [b.emit("[]", result, 1) for result in results]
        y = outputs[0] if width == 1 else b.emit("jnp.concatenate", outputs, axis=-1)
    parts = zip(*[_parts(b, end, sequence.parts) for end in ends], strict=True)
    return _results(b, y, *[b.emit("jnp.stack", list(part)) for part in parts])


def _call_one_way(b: Builder, sequence: _Sequence, x: Ref | Var, k: int) -> Ref:
    """One layer in one direction."""
    settings, cell = sequence.settings, sequence.cells[k]
    begin = None if sequence.begin is None else [b.emit("[]", part, k) for part in sequence.begin]
    state: Sequence[Arg] = _state(begin) or [None]
    options = sequence.activation | settings.order
    options |= {"reverse": True} if settings.names[k].startswith("backward") else {}
    if len(cell) == (5 if settings.has_biases else 3):
        options |= {"projection": b.array(cell[-1], cell[-1].layout.dims[::-1])}
    arrays = _arrays(b, cell, settings.has_biases)
    return b.emit(f"ops.{sequence.type.lower()}", x, *state, *arrays, **options)


@register("aten.lstm_cell.default")
def lstm_cell(b: Builder, x: Operand, hx: Sequence[Operand], *weights: Operand | None) -> tuple[Value, ...]:
    return _results(b, *_parts(b, _cell(b, "LSTM", {}, x, hx, weights), 2))


@register("aten.gru_cell.default")
def gru_cell(b: Builder, x: Operand, hx: Operand, *weights: Operand | None) -> Value:
    return b.new(_cell(b, "GRU", {}, x, [hx], weights))


@register("aten.rnn_tanh_cell.default")
def rnn_tanh_cell(b: Builder, x: Operand, hx: Operand, *weights: Operand | None) -> Value:
    return b.new(_cell(b, "RNN", ACTIVATIONS["rnn_tanh"], x, [hx], weights))


@register("aten.rnn_relu_cell.default")
def rnn_relu_cell(b: Builder, x: Operand, hx: Operand, *weights: Operand | None) -> Value:
    return b.new(_cell(b, "RNN", ACTIVATIONS["rnn_relu"], x, [hx], weights))


def _cell(
    b: Builder,
    type_: str,
    activation: Options,
    x: Operand,
    states: Sequence[Operand],
    weights: Sequence[Operand | None],
) -> Ref:
    """One step. Either both biases are given, or neither."""
    array = b.plain(settled_value(b, x)).expr
    cell = [b.value(weight) for weight in weights if weight is not None]
    has_biases = len(cell) > 2
    begin = _initial(b, states)
    options = _features(cell, type_) | activation | ({} if has_biases else {"use_bias": False}) | param_dtype(cell[0])
    path = b.claim(f"layers.{type_}Cell", options, _leaves(cell, has_biases))
    if path is not None:
        return b.emit(f"layer:{path}", array, *_state(begin))
    given = _state([b.plain(state).expr for state in states])
    return b.emit(f"ops.{type_.lower()}_cell", array, *given, *_arrays(b, cell, has_biases), **activation)


def _initial(b: Builder, states: Sequence[Operand]) -> list[Ref | Var] | None:
    """The initial states; None for zeros, which PyTorch's layers make where no states are given."""
    if all(_is_zero(b, state) for state in states):
        return None
    return [b.plain(state).expr for state in states]


def _is_zero(b: Builder, state: Operand) -> bool:
    """Returns whether a state is known to be zero."""
    if isinstance(state, torch.Tensor):
        return not state.any()
    made = {call.out: call.target for call in b.calls}
    return isinstance(state, Value) and isinstance(state.expr, Ref) and made.get(state.expr.name) == "jnp.zeros"


def _state(begin: Sequence[Arg] | None) -> list[Arg]:
    """The initial state as arguments of a call: none, one array, or a pair of arrays."""
    if begin is None:
        return []
    return [tuple(begin) if len(begin) > 1 else begin[0]]


def _features(cell: Sequence[Value], type_: str) -> Options:
    """The sizes of a cell. A projected hidden state has fewer features than a gate."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[type_]
    rows, outputs = (int(size) for size in cell[1].shape)
    options: Options = {"in_features": int(cell[0].shape[1]), "hidden_features": rows // gates}
    return options | ({"proj_size": outputs} if outputs != rows // gates else {})


def _leaves(cell: Sequence[Value], has_biases: bool) -> dict[str, Wanted]:
    """The weights of a cell with their layouts, by the names in the layer."""
    names = ["kernel", "recurrent_kernel", *(["bias", "recurrent_bias"] if has_biases else []), "projection"]
    return {
        name: (weight, _transposed(weight) if weight.ndim == 2 else None)
        for name, weight in zip(names, cell, strict=False)
    }


def _transposed(weight: Value) -> Layout:
    """`[O, I]` stored `[I, O]`."""
    return Layout(weight.layout.dims, weight.layout.dims[::-1])


def _arrays(b: Builder, cell: Sequence[Value], has_biases: bool) -> list[Ref | Var]:
    """The weights of a cell that no layer holds, as arrays in the order of the functions' arguments."""
    kernels = [b.array(weight, weight.layout.dims[::-1]) for weight in cell[:2]]
    return [*kernels, *(b.plain(bias).expr for bias in cell[2:4] if has_biases)]


def _parts(b: Builder, state: Ref, count: int) -> list[Ref]:
    """The arrays that a state consists of."""
    return [state] if count == 1 else [b.emit("[]", state, k) for k in range(count)]


def _results(b: Builder, *exprs: Ref | Var) -> tuple[Value, ...]:
    """The results of the node, with PyTorch's shapes."""
    return tuple(b.new(expr, sizes(val.shape)) for expr, val in zip(exprs, b.node.meta["val"], strict=True))
