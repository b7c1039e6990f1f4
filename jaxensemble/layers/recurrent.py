"""Recurrent layers that hold PyTorch's weights: both biases, projections, several layers, both directions.

Flax's cells (`nnx.LSTMCell`, `nnx.GRUCell`, `nnx.SimpleCell`) have one bias where PyTorch has two, so that they cannot
hold PyTorch's weights. `nnx.GRUCell` has no equivalent of PyTorch's equations at all: see `jaxensemble.ops`.
"""

import abc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Inexact

from jaxensemble.errors import InputError
from jaxensemble.ops import recurrent as ops
from jaxensemble.ops.annotations import AnyArray

State = TypeVar("State", AnyArray, tuple[AnyArray, AnyArray])


class _Cell(nnx.Module, Generic[State]):
    """The weights of one layer in one direction, with all gates side by side, drawn as PyTorch draws them."""

    gates: int

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        width = self.gates * hidden_features
        self.kernel = self._draw_weight((in_features, width), param_dtype, rngs)
        self.recurrent_kernel = self._draw_weight((hidden_features, width), param_dtype, rngs)
        self.bias = self._draw_weight((width,), param_dtype, rngs) if use_bias else nnx.data(None)
        self.recurrent_bias = self._draw_weight((width,), param_dtype, rngs) if use_bias else nnx.data(None)

    def _draw_weight(self, shape: tuple[int, ...], dtype: Any, rngs: nnx.Rngs) -> nnx.Param:
        bound = max(self.hidden_features, 1) ** -0.5
        return nnx.Param(jax.random.uniform(rngs.params(), shape, dtype, -bound, bound))

    @property
    def _weights(self) -> tuple[Array | None, ...]:
        held = (self.kernel, self.recurrent_kernel, self.bias, self.recurrent_bias)
        return tuple(None if weight is None else weight[...] for weight in held)

    @abc.abstractmethod
    def scan(
        self, x: Inexact[AnyArray, "... I"], state: State | None, *, time_major: bool = False, reverse: bool = False
    ) -> tuple[Inexact[Array, "... P"], State]:
        """Steps through a sequence `[..., T, in_features]` (`[T, ..., in_features]` if `time_major`).

        Gives the hidden state after each step and the state after the last one.
        """

    def _check(self, x: Inexact[AnyArray, "..."]) -> None:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise InputError(f"`x` must have {self.in_features} features along its last axis; got shape {x.shape}")


class RNNCell(_Cell[Array]):
    """One step of an Elman network, `torch.nn.RNNCell`: see `jaxensemble.ops.rnn_cell`.

    `activation_fn` is `jnp.tanh` or `nnx.relu` in PyTorch.

    >>> cell = RNNCell(2, 3, rngs=nnx.Rngs(0))
    >>> cell(jnp.ones((5, 2))).shape
    (5, 3)
    """

    gates = 1

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation_fn: Callable[[Array], Array] = jnp.tanh,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, hidden_features, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self.activation_fn = activation_fn

    def __call__(
        self, x: Inexact[AnyArray, "*batch I"], h: Inexact[AnyArray, "*batch H"] | None = None
    ) -> Inexact[Array, "*batch H"]:
        """`x` is `[..., in_features]`, `h` `[..., hidden_features]` (zeros unless given); gives the next `h`."""
        self._check(x)
        h = jnp.zeros((*x.shape[:-1], self.hidden_features), x.dtype) if h is None else h
        return ops.rnn_cell(x, h, *self._weights, activation_fn=self.activation_fn)  # type: ignore[arg-type]

    def scan(
        self,
        x: Inexact[AnyArray, "... I"],
        state: Inexact[AnyArray, "*batch H"] | None,
        *,
        time_major: bool = False,
        reverse: bool = False,
    ) -> tuple[Inexact[Array, "... H"], Inexact[Array, "*batch H"]]:
        self._check(x)
        return ops.rnn(
            x,
            state,
            *self._weights,  # type: ignore[arg-type]
            activation_fn=self.activation_fn,
            time_major=time_major,
            reverse=reverse,
        )


class GRUCell(_Cell[Array]):
    """One step of a gated recurrent unit, `torch.nn.GRUCell`: see `jaxensemble.ops.gru_cell`.

    >>> cell = GRUCell(2, 3, rngs=nnx.Rngs(0))
    >>> cell(jnp.ones((5, 2)), jnp.ones((5, 3))).shape
    (5, 3)
    """

    gates = 3

    def __call__(
        self, x: Inexact[AnyArray, "*batch I"], h: Inexact[AnyArray, "*batch H"] | None = None
    ) -> Inexact[Array, "*batch H"]:
        """`x` is `[..., in_features]`, `h` `[..., hidden_features]` (zeros unless given); gives the next `h`."""
        self._check(x)
        h = jnp.zeros((*x.shape[:-1], self.hidden_features), x.dtype) if h is None else h
        return ops.gru_cell(x, h, *self._weights)  # type: ignore[arg-type]

    def scan(
        self,
        x: Inexact[AnyArray, "... I"],
        state: Inexact[AnyArray, "*batch H"] | None,
        *,
        time_major: bool = False,
        reverse: bool = False,
    ) -> tuple[Inexact[Array, "... H"], Inexact[Array, "*batch H"]]:
        self._check(x)
        return ops.gru(x, state, *self._weights, time_major=time_major, reverse=reverse)  # type: ignore[arg-type]


class LSTMCell(_Cell[tuple[Array, Array]]):
    """One step of a long short-term memory, `torch.nn.LSTMCell`: see `jaxensemble.ops.lstm_cell`.

    With `proj_size`, the hidden state is projected to that number of features, as in `torch.nn.LSTM`.

    >>> cell = LSTMCell(2, 3, rngs=nnx.Rngs(0))
    >>> h, c = cell(jnp.ones((5, 2)))
    >>> h.shape, c.shape
    ((5, 3), (5, 3))
    """

    gates = 4

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        proj_size: int = 0,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, hidden_features, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self.proj_size = proj_size
        self.projection = nnx.data(None)
        if proj_size:
            self.recurrent_kernel = self._draw_weight((proj_size, 4 * hidden_features), param_dtype, rngs)
            self.projection = self._draw_weight((hidden_features, proj_size), param_dtype, rngs)

    @property
    def _weights(self) -> tuple[Array | None, ...]:
        return (*super()._weights, None if self.projection is None else self.projection[...])

    def __call__(self, x: Inexact[AnyArray, "*batch I"], state: ops.LSTMState | None = None) -> ops.LSTMState:
        """`x` is `[..., in_features]`, `state` is `(h, c)` (zeros unless given); gives the next `(h, c)`."""
        self._check(x)
        if state is None:
            h, c = (self.proj_size or self.hidden_features), self.hidden_features
            state = jnp.zeros((*x.shape[:-1], h), x.dtype), jnp.zeros((*x.shape[:-1], c), x.dtype)
        return ops.lstm_cell(x, state, *self._weights)  # type: ignore[arg-type]

    def scan(
        self,
        x: Inexact[AnyArray, "... I"],
        state: ops.LSTMState | None,
        *,
        time_major: bool = False,
        reverse: bool = False,
    ) -> tuple[Inexact[Array, "... P"], ops.LSTMState]:
        self._check(x)
        return ops.lstm(x, state, *self._weights, time_major=time_major, reverse=reverse)  # type: ignore[arg-type]


class _Recurrent(nnx.Module, Generic[State]):
    """Cells over a sequence, layer upon layer: `forward_0`, `backward_0`, `forward_1` ...

    `make(in_features)` makes a cell, whose hidden state has `width` features.
    """

    def __init__(
        self,
        make: Callable[[int], _Cell[State]],
        in_features: int,
        width: int,
        *,
        num_layers: int,
        bidirectional: bool,
        rate: float,
        time_major: bool,
        rngs: nnx.Rngs,
    ):
        directions = ("forward", "backward") if bidirectional else ("forward",)
        self.names = tuple(tuple(f"{name}_{k}" for name in directions) for k in range(num_layers))
        self.time_major = time_major
        for k, names in enumerate(self.names):
            for name in names:
                setattr(self, name, make(width * len(directions) if k else in_features))
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate and num_layers > 1 else nnx.data(None)

    def __call__(
        self, x: Inexact[AnyArray, "... I"], state: State | None = None, *, deterministic: bool | None = None
    ) -> tuple[Inexact[Array, "... outputs"], State]:
        """The outputs of the last layer at each step, and the states of all layers after the last step.

        **Arguments:**

        - `x`: `[..., T, in_features]`, or `[T, ..., in_features]` if the layer is `time_major`.
        - `state`: the first state of each layer, `[num_layers * directions, ..., hidden_features]`, the forward
          direction before the backward direction; zeros unless given.
        - `deterministic`: whether to leave out the dropout between layers; by default, in evaluation mode.

        **Returns:** `[..., T, directions * hidden_features]` (or time-major) and the final states, stacked as `state`.
        """
        states: list[State] = []
        for k, names in enumerate(self.names):
            if k and self.dropout is not None:
                x = self.dropout(x, deterministic=deterministic)
            outputs = []
            for name in names:
                cell, begin = getattr(self, name), jax.tree.map(lambda part: part[len(states)], state)
                y, end = cell.scan(x, begin, time_major=self.time_major, reverse=name.startswith("backward"))
                outputs.append(y)
                states.append(end)
            x = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *states)


class RNN(_Recurrent[Array]):
    """Elman networks over a sequence, `torch.nn.RNN`: cells are `RNNCell`s.

    **Arguments:**

    - `in_features`, `hidden_features`: features of the input and of the hidden state.
    - `num_layers`, `bidirectional`: each layer takes the outputs of the layer below, both directions side by side.
    - `activation_fn`: `jnp.tanh` or `nnx.relu` in PyTorch.
    - `rate`: share of elements dropped between layers in training.
    - `time_major`: `[T, ..., I]` rather than `[..., T, I]`; the reverse of PyTorch's `batch_first`.

    >>> layer = RNN(2, 3, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
    >>> y, h = layer(jnp.ones((5, 7, 2)))
    >>> y.shape, h.shape
    ((5, 7, 6), (4, 5, 3))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_layers: int = 1,
        activation_fn: Callable[[Array], Array] = jnp.tanh,
        use_bias: bool = True,
        bidirectional: bool = False,
        rate: float = 0.0,
        time_major: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def make(inputs: int) -> RNNCell:
            return RNNCell(
                inputs,
                hidden_features,
                activation_fn=activation_fn,
                use_bias=use_bias,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        super().__init__(
            make,
            in_features,
            hidden_features,
            num_layers=num_layers,
            bidirectional=bidirectional,
            rate=rate,
            time_major=time_major,
            rngs=rngs,
        )


class GRU(_Recurrent[Array]):
    """Gated recurrent units over a sequence, `torch.nn.GRU`: cells are `GRUCell`s, arguments those of `RNN`.

    >>> layer = GRU(2, 3, rngs=nnx.Rngs(0))
    >>> y, h = layer(jnp.ones((5, 7, 2)))
    >>> y.shape, h.shape
    ((5, 7, 3), (1, 5, 3))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_layers: int = 1,
        use_bias: bool = True,
        bidirectional: bool = False,
        rate: float = 0.0,
        time_major: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def make(inputs: int) -> GRUCell:
            return GRUCell(inputs, hidden_features, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

        super().__init__(
            make,
            in_features,
            hidden_features,
            num_layers=num_layers,
            bidirectional=bidirectional,
            rate=rate,
            time_major=time_major,
            rngs=rngs,
        )


class LSTM(_Recurrent[tuple[Array, Array]]):
    """Long short-term memories over a sequence, `torch.nn.LSTM`: cells are `LSTMCell`s, the state is `(h, c)`.

    Arguments are those of `RNN`; with `proj_size`, hidden states and outputs have that number of features.

    >>> layer = LSTM(2, 3, proj_size=1, rngs=nnx.Rngs(0))
    >>> y, (h, c) = layer(jnp.ones((5, 7, 2)))
    >>> y.shape, h.shape, c.shape
    ((5, 7, 1), (1, 5, 1), (1, 5, 3))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_layers: int = 1,
        proj_size: int = 0,
        use_bias: bool = True,
        bidirectional: bool = False,
        rate: float = 0.0,
        time_major: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def make(inputs: int) -> LSTMCell:
            return LSTMCell(
                inputs, hidden_features, proj_size=proj_size, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs
            )

        super().__init__(
            make,
            in_features,
            proj_size or hidden_features,
            num_layers=num_layers,
            bidirectional=bidirectional,
            rate=rate,
            time_major=time_major,
            rngs=rngs,
        )
