"""Recurrent cells, alone and over a sequence, with PyTorch's gates and both of its biases.

Flax's cells add one bias where PyTorch adds two, and `nnx.GRUCell` has no bias within the reset gate's product, where
PyTorch has one: no Flax cell can hold PyTorch's weights. The order of the gates is PyTorch's.

`kernel` is `[I, G * H]` and `recurrent_kernel` `[H, G * H]` for `G` gates, `bias` and `recurrent_bias` `[G * H]`: the
transpose of PyTorch's weights. Equations: the pages of `torch.nn.RNNCell`, `LSTMCell` and `GRUCell`; for projections
`torch.nn.LSTM`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from jaxensemble.ops.annotations import AnyArray

State = TypeVar("State")
LSTMState = tuple[Inexact[AnyArray, "... P"], Inexact[AnyArray, "... H"]]
"""Hidden state `[..., H]` and cell state `[..., H]`, in PyTorch's order."""


def rnn_cell(
    x: Inexact[AnyArray, "*batch I"],
    h: Inexact[AnyArray, "*batch H"],
    kernel: Inexact[AnyArray, "I gates"],
    recurrent_kernel: Inexact[AnyArray, "H gates"],
    bias: Inexact[AnyArray, " gates"] | None = None,
    recurrent_bias: Inexact[AnyArray, " gates"] | None = None,
    *,
    activation_fn: Callable[[Array], Array] = jnp.tanh,
) -> Inexact[Array, "*batch H"]:
    """One step of an Elman network: `activation_fn(x @ kernel + bias + h @ recurrent_kernel + recurrent_bias)`.

    `x` is `[..., I]`, `h` and the result `[..., H]`.

    >>> rnn_cell(jnp.ones(2), jnp.ones(1), jnp.ones((2, 1)), jnp.ones((1, 1)), activation_fn=jax.nn.relu).tolist()
    [3.0]
    """
    return activation_fn(_affine(x, kernel, bias) + _affine(h, recurrent_kernel, recurrent_bias))


def gru_cell(
    x: Inexact[AnyArray, "*batch I"],
    h: Inexact[AnyArray, "*batch H"],
    kernel: Inexact[AnyArray, "I gates"],
    recurrent_kernel: Inexact[AnyArray, "H gates"],
    bias: Inexact[AnyArray, " gates"] | None = None,
    recurrent_bias: Inexact[AnyArray, " gates"] | None = None,
) -> Inexact[Array, "*batch H"]:
    """One step of a gated recurrent unit. Gates: reset, update, new.

        r, z = sigmoid(those of x @ kernel + bias + h @ recurrent_kernel + recurrent_bias)
        n = tanh(that of x @ kernel + bias + r * (that of h @ recurrent_kernel + recurrent_bias))
        h' = (1 - z) * n + z * h

    `x` is `[..., I]`, `h` and the result `[..., H]`.

    >>> gru_cell(jnp.ones(2), jnp.full(1, 4.0), jnp.zeros((2, 3)), jnp.zeros((1, 3))).tolist()
    [2.0]
    """
    return _gru_step(_affine(x, kernel, bias), h, recurrent_kernel, recurrent_bias)


def lstm_cell(
    x: Inexact[AnyArray, "... I"],
    state: LSTMState,
    kernel: Inexact[AnyArray, "I gates"],
    recurrent_kernel: Inexact[AnyArray, "P gates"],
    bias: Inexact[AnyArray, " gates"] | None = None,
    recurrent_bias: Inexact[AnyArray, " gates"] | None = None,
    projection: Inexact[AnyArray, "H P"] | None = None,
) -> LSTMState:
    """One step of a long short-term memory. Gates: input, forget, cell, output.

        i, f, o = sigmoid(those of x @ kernel + bias + h @ recurrent_kernel + recurrent_bias)
        g = tanh(that of the same sum)
        c' = f * c + i * g
        h' = o * tanh(c') @ projection

    `x` is `[..., I]`, `state` and the result `(h, c)`; with a `projection` `[H, P]`, `h` is `[..., P]`.

    >>> state = jnp.zeros(1), jnp.full(1, 4.0)
    >>> [part.tolist() for part in lstm_cell(jnp.ones(2), state, jnp.zeros((2, 4)), jnp.zeros((1, 4)))]
    [[0.48...], [2.0]]
    """
    return _lstm_step(_affine(x, kernel, bias), state, recurrent_kernel, recurrent_bias, projection)


def rnn(
    x: Inexact[AnyArray, "... I"],
    h: Inexact[AnyArray, "*batch H"] | None,
    kernel: Inexact[AnyArray, "I gates"],
    recurrent_kernel: Inexact[AnyArray, "H gates"],
    bias: Inexact[AnyArray, " gates"] | None = None,
    recurrent_bias: Inexact[AnyArray, " gates"] | None = None,
    *,
    activation_fn: Callable[[Array], Array] = jnp.tanh,
    time_major: bool = False,
    reverse: bool = False,
) -> tuple[Inexact[Array, "... H"], Inexact[Array, "*batch H"]]:
    """`rnn_cell` over a sequence: the hidden state after each step, and the last one.

    **Arguments:**

    - `x`: `[..., T, I]`, or `[T, ..., I]` if `time_major`.
    - `h`: `[..., H]`; None for zeros.
    - `reverse`: from the last step to the first. Each result is at the place of its input.

    **Returns:** `[..., T, H]`, or `[T, ..., H]`, and `[..., H]`.

    >>> y, h = rnn(jnp.ones((2, 3, 1)), None, jnp.ones((1, 1)), jnp.ones((1, 1)), activation_fn=jax.nn.relu)
    >>> y[0, :, 0].tolist(), h.shape
    ([1.0, 2.0, 3.0], (2, 1))
    """

    def step(h: Array, gates: Array) -> tuple[Array, Array]:
        h = activation_fn(gates + _affine(h, recurrent_kernel, recurrent_bias))
        return h, h

    gates = _affine(x, kernel, bias)
    h = _zeros(gates, recurrent_kernel.shape[0], time_major) if h is None else h
    return _scan(step, h, gates, time_major, reverse)


def gru(
    x: Inexact[AnyArray, "... I"],
    h: Inexact[AnyArray, "*batch H"] | None,
    kernel: Inexact[AnyArray, "I gates"],
    recurrent_kernel: Inexact[AnyArray, "H gates"],
    bias: Inexact[AnyArray, " gates"] | None = None,
    recurrent_bias: Inexact[AnyArray, " gates"] | None = None,
    *,
    time_major: bool = False,
    reverse: bool = False,
) -> tuple[Inexact[Array, "... H"], Inexact[Array, "*batch H"]]:
    """`gru_cell` over a sequence: arguments and results are those of `rnn`.

    >>> y, h = gru(jnp.ones((2, 3, 1)), jnp.full((2, 1), 8.0), jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    >>> y[0, :, 0].tolist(), h[1].tolist()
    ([4.0, 2.0, 1.0], [1.0])
    """

    def step(h: Array, gates: Array) -> tuple[Array, Array]:
        h = _gru_step(gates, h, recurrent_kernel, recurrent_bias)
        return h, h

    gates = _affine(x, kernel, bias)
    h = _zeros(gates, recurrent_kernel.shape[0], time_major) if h is None else h
    return _scan(step, h, gates, time_major, reverse)


def lstm(
    x: Inexact[AnyArray, "... I"],
    state: LSTMState | None,
    kernel: Inexact[AnyArray, "I gates"],
    recurrent_kernel: Inexact[AnyArray, "P gates"],
    bias: Inexact[AnyArray, " gates"] | None = None,
    recurrent_bias: Inexact[AnyArray, " gates"] | None = None,
    projection: Inexact[AnyArray, "H P"] | None = None,
    *,
    time_major: bool = False,
    reverse: bool = False,
) -> tuple[Inexact[Array, "... P"], LSTMState]:
    """`lstm_cell` over a sequence: arguments and results are those of `rnn`, the state is `(h, c)`.

    >>> state = jnp.zeros((2, 1)), jnp.full((2, 1), 8.0)
    >>> y, (h, c) = lstm(jnp.ones((2, 3, 1)), state, jnp.zeros((1, 4)), jnp.zeros((1, 4)))
    >>> y.shape, h.shape, c[0].tolist()
    ((2, 3, 1), (2, 1), [1.0])
    """

    def step(state: LSTMState, gates: Array) -> tuple[LSTMState, Array]:
        state = _lstm_step(gates, state, recurrent_kernel, recurrent_bias, projection)
        return state, state[0]

    gates = _affine(x, kernel, bias)
    if state is None:
        outputs, features = recurrent_kernel.shape[0], recurrent_kernel.shape[1] // 4
        state = _zeros(gates, outputs, time_major), _zeros(gates, features, time_major)
    return _scan(step, state, gates, time_major, reverse)


def _affine(
    x: Inexact[AnyArray, "*batch inputs"],
    kernel: Inexact[AnyArray, "inputs outputs"],
    bias: Inexact[AnyArray, " outputs"] | None,
) -> Inexact[Array, "*batch outputs"]:
    return x @ kernel if bias is None else x @ kernel + bias


def _gru_step(gates: Array, h: Array, recurrent_kernel: Array, recurrent_bias: Array | None) -> Array:
    reset, update, new = jnp.split(gates, 3, axis=-1)
    h_reset, h_update, h_new = jnp.split(_affine(h, recurrent_kernel, recurrent_bias), 3, axis=-1)
    r, z = jax.nn.sigmoid(reset + h_reset), jax.nn.sigmoid(update + h_update)
    return (1 - z) * jnp.tanh(new + r * h_new) + z * h


def _lstm_step(
    gates: Array,
    state: LSTMState,
    recurrent_kernel: Array,
    recurrent_bias: Array | None,
    projection: Array | None,
) -> LSTMState:
    h, c = state
    i, f, g, o = jnp.split(gates + _affine(h, recurrent_kernel, recurrent_bias), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h if projection is None else h @ projection), c


def _zeros(gates: Array, features: int, time_major: bool) -> Array:
    """The state that a sequence begins with, if none is given."""
    batch = gates.shape[1:-1] if time_major else gates.shape[:-2]
    return jnp.zeros((*batch, features), gates.dtype)


def _scan(
    step: Callable[[Any, Array], tuple[Any, Array]], state: State, gates: Array, time_major: bool, reverse: bool
) -> tuple[Array, State]:
    """Steps through time. The input's share of the gates is computed before, as one product."""
    gates = gates if time_major else jnp.moveaxis(gates, -2, 0)
    state, outputs = lax.scan(step, state, gates, reverse=reverse)
    return (outputs if time_major else jnp.moveaxis(outputs, 0, -2)), state
