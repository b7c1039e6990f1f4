"""Recurrent layers and cells: gates, biases, directions, layers, states, in every arrangement that PyTorch has."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble import layers, ops
from jaxensemble.errors import InputError, UnsupportedError
from tests.helpers.porting import TOLERANCE, assert_close, assert_ports, randomised
from torch_bridge.graph.capture import capture
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering import OPERATIONS
from torch_bridge.lowering.convert import convert
from torch_bridge.porting.port import to_flax


class Held(nn.Module):
    """A layer within a module; torch's own layer at the root has no module to be a layer of."""

    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, *state: Any) -> Any:
        return self.rnn(x, *state)


def layer_of(module: Any) -> str:
    return type(module.rnn).__name__


N, T, I = 2, 4, 3  # noqa: E741

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(I, 5),
    "rnn-relu": lambda: nn.RNN(I, I, 2, nonlinearity="relu"),
    "rnn-no-bias": lambda: nn.RNN(I, I, bias=False, bidirectional=True),
    "gru": lambda: nn.GRU(I, 5),
    "gru-square": lambda: nn.GRU(I, I),
    "gru-no-bias": lambda: nn.GRU(I, I, 2, bias=False),
    "gru-both-ways": lambda: nn.GRU(I, I, 2, bidirectional=True),
    "lstm": lambda: nn.LSTM(I, 5),
    "lstm-square": lambda: nn.LSTM(I, I),
    "lstm-no-bias": lambda: nn.LSTM(I, 4, 2, bias=False),
    "lstm-both-ways": lambda: nn.LSTM(I, I, 2, bidirectional=True),
    "lstm-dropout": lambda: nn.LSTM(I, I, 2, dropout=0.5),
    "lstm-projected": lambda: nn.LSTM(I, 4, proj_size=I),
    "lstm-projected-both-ways": lambda: nn.LSTM(I, 4, 2, proj_size=2, bidirectional=True, bias=False),
    "one-feature": lambda: nn.LSTM(I, 1),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", LAYERS)
def test_layer(case: str) -> None:
    """Outputs and final states, as a layer within a module."""
    rnn = LAYERS[case]()
    module = assert_ports(Held(rnn), torch.randn(T, N, I), batch_axis=1)
    assert layer_of(module) == type(rnn).__name__


@pytest.mark.thinned
@pytest.mark.parametrize("case", ["rnn-relu", "gru-both-ways", "lstm-dropout", "lstm-projected-both-ways"])
def test_batch_first(case: str) -> None:
    rnn: Any = LAYERS[case]()
    rnn.batch_first = True
    module = assert_ports(Held(rnn), torch.randn(N, T, I))
    assert not module.rnn.time_major


BARE = ["rnn-relu", "rnn-no-bias", "gru-no-bias", "lstm-both-ways", "lstm-projected", "lstm-projected-both-ways"]


@pytest.mark.thinned
@pytest.mark.parametrize("case", BARE)
def test_without_a_layer(case: str) -> None:
    """At the root there is no module to hold the layer: functions of bare weights give the same."""
    assert_ports(LAYERS[case](), torch.randn(T, N, I), batch_axis=1)


@pytest.mark.thinned
@pytest.mark.parametrize("held", [True, False], ids=["layer", "bare"])
def test_initial_states(held: bool) -> None:
    """The states of forward and backward, of lower and upper layers, stay apart; `h` and `c` too."""
    gru, lstm = nn.GRU(I, I, 2, bidirectional=True), nn.LSTM(I, 5, 2, proj_size=2, bidirectional=True)
    wrapped: Any = Held if held else lambda rnn: rnn
    x, h = torch.randn(T, N, I), torch.randn(4, N, I)
    assert_ports(wrapped(gru), x, h, batch_axis=(1, 1), batches=())
    with jax.enable_x64(True):
        model = randomised(wrapped(lstm)).eval()
        state = (torch.randn(4, N, 2).double(), torch.randn(4, N, 5).double())
        module: Any = to_flax(model, (x.double(), state), batch_axis=1)
        for size in (1, N):
            now = (x.double()[:, :size], tuple(part[:, :size] for part in state))
            with torch.no_grad():
                expected = model(*now)
            assert_close(module(now[0].numpy(), tuple(part.numpy() for part in now[1])), expected)


class ZeroState(nn.Module):
    """States that the forward gives: zeros in both, and zeros in one only."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(I, I, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(1, x.shape[0], I, dtype=x.dtype)
        return self.rnn(x, (zeros, torch.ones_like(zeros)))[0] + self.rnn(x, (zeros, zeros))[0]


def test_one_state_of_zeros() -> None:
    assert_ports(ZeroState(), torch.randn(N, T, I))


UNBATCHED = ["rnn-no-bias", "gru-both-ways", "lstm-projected-both-ways"]


@pytest.mark.thinned
@pytest.mark.parametrize("case", UNBATCHED)
def test_unbatched(case: str) -> None:
    module = assert_ports(Held(LAYERS[case]()), torch.randn(T, I), batch_axis=None)
    assert layer_of(module) == type(LAYERS[case]()).__name__


def test_one_step_and_one_sequence() -> None:
    assert_ports(Held(nn.GRU(I, I, batch_first=True)), torch.randn(N, 1, I))
    assert_ports(Held(nn.GRU(I, I)), torch.randn(T, 1, I), batch_axis=None)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNNCell(I, I),
    "rnn-relu": lambda: nn.RNNCell(I, 5, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(I, I),
    "gru-no-bias": lambda: nn.GRUCell(I, 5, bias=False),
    "lstm": lambda: nn.LSTMCell(I, I),
    "lstm-no-bias": lambda: nn.LSTMCell(I, 2, bias=False),
}


class Steps(nn.Module):
    """A cell, called three times: without a state, then with the one it gave."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.rnn = cell

    def forward(self, x: Tensor) -> Any:
        state = self.rnn(x)
        for _ in range(2):
            state = self.rnn(x * 0.5, state)
        return state


@pytest.mark.thinned
@pytest.mark.parametrize("case", CELLS)
def test_cell(case: str) -> None:
    cell = CELLS[case]()
    module = assert_ports(Steps(cell), torch.randn(N, I))
    assert layer_of(module) == type(cell).__name__
    assert_ports(cell, torch.randn(N, I))


@pytest.mark.parametrize("case", ["rnn", "gru", "lstm"])
def test_unbatched_cell(case: str) -> None:
    assert_ports(Steps(CELLS[case]()), torch.randn(I), batch_axis=None)


# Within user modules


class Tagger(nn.Module):
    """An embedding, two directions, the last state and every step, the layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.rnn = nn.LSTM(6, 3, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(6, 4)
        self.sentence = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.rnn(self.embed(tokens))
        y, (h, _) = self.rnn(torch.tanh(y), state)
        return self.tags(y), self.sentence(h.transpose(0, 1).flatten(1))


def test_tagger() -> None:
    assert_ports(Tagger(), torch.randint(7, (N, T)))


class Recogniser(nn.Module):
    """Columns of a feature map as time steps: channels-last behind the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.rnn = nn.GRU(3 * 4, 5, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.conv(x).flatten(1, 2).permute(2, 0, 1))[0]


def test_behind_a_convolution() -> None:
    assert_ports(Recogniser(), torch.randn(2, 1, 4, 6))


class WeightUsedTwice(nn.Module):
    """A weight of the layer that is also in another product."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(I, I, batch_first=True)
        self.cell = nn.RNNCell(I, I)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x[:, 0]) @ self.cell.weight_hh
        return self.rnn(x)[0] @ self.rnn.weight_ih_l0.T @ self.rnn.weight_hh_l0 + y[:, None]


def test_weight_used_twice() -> None:
    assert_ports(WeightUsedTwice(), torch.randn(N, T, I))


class TiedLayers(nn.Module):
    """Two layers with one set of weights: one layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(I, I, batch_first=True)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


def test_tied_layers() -> None:
    assert_ports(TiedLayers(), torch.randn(N, T, I))


class WithMore(nn.GRU):
    """A layer with a parameter of its own besides those of the GRU."""

    def __init__(self) -> None:
        super().__init__(I, I, 2, batch_first=True, dropout=0.5)
        self.gain = nn.Parameter(torch.ones(I))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0] * self.gain


def test_layer_with_more() -> None:
    module: Any = assert_ports(Held(WithMore()), torch.randn(N, T, I))
    x = np.ones((20, T, I))
    with jax.enable_x64(True):
        module.train()
        assert not np.array_equal(module(x), module(x))


def test_parametrised_weight() -> None:
    """A weight that is computed before it is used."""
    model = Steps(nn.utils.parametrizations.weight_norm(nn.GRUCell(I, I), "weight_hh"))
    assert_ports(model, torch.randn(N, I))


# Modes


def test_dropout_between_layers() -> None:
    """In training, elements of the lower layer's output are dropped, and none of the upper layer's output."""
    model: Any = Held(nn.RNN(50, 50, 2, nonlinearity="relu", bias=False, dropout=0.4, batch_first=True)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.eye(50))
        model.rnn.get_parameter("weight_hh_l0").zero_()
        model.rnn.get_parameter("weight_hh_l1").zero_()
    module: Any = to_flax(model, (torch.ones(2, 3, 50),))
    x = np.ones((100, 20, 50), "float32")
    np.testing.assert_array_equal(module(x)[0], x)
    module.train()
    y = np.asarray(module(x)[0])
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.6)}
    assert abs((y != 0).mean() - 0.6) < 5 * math.sqrt(0.24 / y.size)
    assert not np.array_equal(y, module(x)[0])


def test_modes() -> None:
    """Ported from training or from evaluation mode, and with no dropout that a mode could change."""
    assert (
        convert(Held(nn.LSTM(I, I, 2, dropout=0.5)), (torch.randn(T, N, I),), OpenAxes(1)).network.evaluation_only
        is None
    )
    module: Any = to_flax(
        Held(nn.LSTM(I, I, 2, dropout=0.5)).train(), (torch.randn(T, N, I),), batch_axis=1, mode="train"
    )
    assert not module.rnn.dropout.deterministic
    model = Held(nn.LSTM(I, I, dropout=0.0)).eval()
    module = to_flax(model, (torch.randn(T, N, I),), batch_axis=1)
    x = torch.randn(T, N, I)
    before = module(x.numpy())[0]
    module.train()
    np.testing.assert_array_equal(module(x.numpy())[0], before)


# Weights


@pytest.mark.thinned
# PyTorch says once in a process that it has no fast kernel for projections in float32.
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("case", ["rnn-no-bias", "gru-both-ways", "lstm-projected-both-ways"])
def test_weights_come_back(case: str) -> None:
    """Bit for bit, under PyTorch's names, and members do not mix."""
    models = [Held(LAYERS[case]()) for _ in range(3)]
    ensemble = torch_bridge.to_ensemble(models, (torch.randn(T, N, I),), batch_axis=1)
    for model, given in zip(models, torch_bridge.to_torch(ensemble), strict=True):
        expected = model.state_dict()
        assert list(given) == list(expected)
        assert all(torch.equal(given[key], expected[key]) for key in expected)


def test_layout_of_weights() -> None:
    """Kernels are transposed, gates in PyTorch's order, biases apart."""
    rnn: Any = nn.LSTM(I, I)
    module: Any = to_flax(Held(rnn), (torch.randn(T, N, I),), batch_axis=1)
    cell = module.rnn.forward_0
    np.testing.assert_array_equal(cell.kernel[...], rnn.weight_ih_l0.detach().numpy().T)
    np.testing.assert_array_equal(cell.recurrent_kernel[...], rnn.weight_hh_l0.detach().numpy().T)
    np.testing.assert_array_equal(cell.bias[...], rnn.bias_ih_l0.detach().numpy())
    np.testing.assert_array_equal(cell.recurrent_bias[...], rnn.bias_hh_l0.detach().numpy())


def test_mistakes_would_show() -> None:
    """Gates in another order, a square weight the wrong way round, GRU's biases added up: each changes the result."""
    x, h = (jax.random.normal(jax.random.key(k), (N, I)) for k in range(2))
    cells: list[Any] = [kind(I, I, rngs=nnx.Rngs(0)) for kind in (layers.LSTMCell, layers.GRUCell)]
    lstm, gru = cells
    weights = [leaf[...] for leaf in (lstm.kernel, lstm.recurrent_kernel, lstm.bias, lstm.recurrent_bias)]
    right = ops.lstm_cell(x, (h, h), *weights)[0]
    swapped = weights[0].reshape(I, 4, I)[:, np.array([0, 2, 1, 3])].reshape(I, 4 * I)
    turned = weights[1].reshape(I, 4, I).transpose(2, 1, 0).reshape(I, 4 * I)
    assert jnp.abs(ops.lstm_cell(x, (h, h), swapped, *weights[1:])[0] - right).max() > 1e-3
    assert jnp.abs(ops.lstm_cell(x, (h, h), weights[0], turned, *weights[2:])[0] - right).max() > 1e-3
    kernels, biases = (gru.kernel[...], gru.recurrent_kernel[...]), (gru.bias[...], gru.recurrent_bias[...])
    one = ops.gru_cell(x, h, *kernels, biases[0] + biases[1], jnp.zeros(3 * I))
    assert jnp.abs(one - ops.gru_cell(x, h, *kernels, *biases)).max() > 1e-3


# Ensembles


@pytest.mark.thinned
@pytest.mark.parametrize("case", ["rnn-relu", "gru-both-ways", "lstm-projected"])
def test_gradients_of_members(case: str) -> None:
    """float64 gradients with respect to every weight, all members at once under `jax.vmap`."""
    models = [randomised(Held(LAYERS[case]()), seed) for seed in range(2)]
    x = torch.randn(T, N, I).double()
    with jax.enable_x64(True):
        ensemble = torch_bridge.to_ensemble(models, (x,), batch_axis=1, check=False)

        def objective(params: Any) -> jax.Array:
            return (jnp.sin(dataclasses.replace(ensemble, params=params)(x.numpy())[0])).sum()

        gradients = torch_bridge.to_torch(dataclasses.replace(ensemble, params=jax.grad(objective)(ensemble.params)))
    for model, given in zip(models, gradients, strict=True):
        torch.sin(model(x)[0]).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            scale = parameter.grad.abs().max()
            assert (given[key] - parameter.grad).abs().max() <= TOLERANCE * scale, key


# The layers themselves


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match=r"`x` must have 3 features along its last axis; got shape \(2, 4\)"):
        layers.GRUCell(3, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))
    with pytest.raises(InputError, match="3 features"):
        layers.LSTM(3, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 5)))


KINDS: dict[str, tuple[Any, Any]] = {
    "RNN": (layers.RNN, nn.RNN),
    "GRU": (layers.GRU, nn.GRU),
    "LSTM": (layers.LSTM, nn.LSTM),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_are_drawn_as_pytorch_draws_them(kind: str) -> None:
    ours, theirs = KINDS[kind]
    drawn = list(jax.tree.leaves(nnx.state(ours(16, 25, rngs=nnx.Rngs(0)), nnx.Param)))
    expected = [parameter.detach() for parameter in theirs(16, 25).parameters()]
    assert sorted(leaf.size for leaf in drawn) == sorted(leaf.numel() for leaf in expected)
    assert all(abs(np.abs(leaf).max() - 0.2) < 0.02 and abs(np.mean(leaf)) < 0.06 for leaf in drawn)


def test_more_batch_axes() -> None:
    """Any number of axes before time, or none."""
    layer = layers.LSTM(I, I, bidirectional=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, T, I))
    y, (h, _) = layer(x)
    assert y.shape == (2, 5, T, 2 * I) and h.shape == (2, 2, 5, I)
    np.testing.assert_allclose(layer(x[1, 2])[0], y[1, 2], atol=1e-6)
    time_major = layers.LSTM(I, I, bidirectional=True, time_major=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(time_major(jnp.moveaxis(x, 2, 0))[0], jnp.moveaxis(y, 2, 0), atol=1e-6)


# What is refused


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(I, I, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


def test_packed_sequences_are_refused() -> None:
    """The number of sequences at each step depends on values, which `torch.export` cannot follow."""
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot follow Packed\.forward"):
        capture(Packed(), (torch.randn(N, T, I), torch.tensor([4, 2])), OPERATIONS)


def shapes_of(network: Any) -> Sequence[str]:
    return [call.target for call in network.calls]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_long_sequences_are_not_written_out_step_by_step(kind: Any) -> None:
    """However long the sequence, the network is one call: of 3,000 steps, the exporter would make many minutes."""
    short, long = (convert(Held(kind(I, I, 2)), (torch.randn(n, N, I),), OpenAxes(1)).network for n in (2, 3000))
    assert short.calls == long.calls
    assert short.calls[0].target == "layer:rnn"


@pytest.mark.further
def test_dropout_after_a_layer() -> None:
    """`nn.Dropout` on the last layer's output, which PyTorch's own option leaves alone."""

    class Dropped(Held):
        def forward(self, x: Tensor, *state: Any) -> Tensor:
            return F.dropout(self.rnn(x)[0], 0.5, self.training)

    module: Any = to_flax(Dropped(nn.GRU(I, 40, batch_first=True)).eval(), (torch.randn(N, T, I),))
    module.train()
    assert 0.3 < (np.asarray(module(np.ones((20, T, I), "float32"))) == 0).mean() < 0.7
