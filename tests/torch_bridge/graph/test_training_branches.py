"""Forwards that do one thing in training and another one in evaluation: one ported network does both."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import UnsupportedError
from jaxensemble.modules.state import flatten
from jaxensemble.training import TrainState, train_step
from tests.helpers.porting import assert_trains


class DropPath(nn.Module):
    """Stochastic depth, https://arxiv.org/abs/1603.09382: whole samples are dropped."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    def __init__(self, width: int, rate: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2))
        self.drop1, self.drop2 = DropPath(rate), DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.drop1(self.attention(y, y, y, need_weights=False)[0])
        return x + self.drop2(self.mlp(x))


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(Block(4, 0.2 + 0.1 * k) for k in range(3)))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.path = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.path(F.relu(self.norm(self.conv(x))))).mean((2, 3))


class TwicePath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.path = nn.Linear(5, 5), nn.Linear(5, 5), DropPath(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self.b(x + self.path(self.a(x))))


class Gated(nn.Module):
    """A gate of two parts, which PyTorch takes apart once more where it writes a forward without side effects."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.path = nn.Linear(5, 10), DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        return x + self.path(value * gate.sigmoid()).flatten(1)


class Noisy(nn.Module):
    """A layer of a noisy network, https://arxiv.org/abs/1706.10295, with new noise in every training call."""

    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.rand(4, 5))
        self.register_buffer("noise", torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.mu)
        self.noise.normal_()
        return F.linear(x, self.mu + self.sigma * self.noise)


class Normaliser(nn.Module):
    """Running statistics that the model computes itself."""

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("square", torch.ones(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean(0))
                self.square.lerp_(x.square().mean(0), 0.1)
        return self.linear((x - self.mean) / (self.square - self.mean**2).clamp(min=1e-3).sqrt())


class Quantiser(nn.Module):
    """A codebook that follows a moving average in training, https://arxiv.org/abs/1711.00937."""

    codes: Tensor
    sizes: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randn(6, 3)
        self.encoder = nn.Linear(5, 3)
        self.register_buffer("codes", codes)
        self.register_buffer("sizes", torch.ones(6))
        self.register_buffer("sums", codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        distance = z.square().sum(1, keepdim=True) - 2 * z @ self.codes.T + self.codes.square().sum(1)
        place = distance.argmin(1)
        if self.training:
            with torch.no_grad():
                assigned = F.one_hot(place, 6).to(z.dtype)
                self.sizes.mul_(0.9).add_(assigned.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(assigned.T @ z, alpha=0.1)
                self.codes.copy_(self.sums / self.sizes.unsqueeze(1))
        quantised = F.embedding(place, self.codes)
        return z + (quantised - z).detach(), place


class Auxiliary(nn.Module):
    """A part that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra = nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.training:
            y = y + self.extra(y)
        return y.softmax(-1)


class Gumbel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        if self.training:
            return F.gumbel_softmax(logits, tau=0.7)
        return F.one_hot(logits.argmax(-1), 4).to(logits.dtype)


class Mixed(nn.Module):
    """Manifold mixup: random shares of rows are mixed in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        if self.training:
            part = torch.rand(x.shape[0], 1).to(y)
            y = part * y + (1 - part) * y.flip(0)
        return self.second(y)


class Jittered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(5, 3), nn.AlphaDropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.drop(F.selu(self.linear(x)))


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 2))


class NoisySequence(nn.Module):
    """Gives the first of two results of one operation, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.rnn(x.unsqueeze(-1))[0]


class Force(nn.Module):
    """Below autograd normalisation is written out: nothing but the forward's own operations counts the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.potential, self.norm, self.path = nn.Linear(5, 4), nn.BatchNorm1d(5), DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.path(torch.func.grad(lambda x: self.potential(x).tanh().sum())(x)))


class Flat(nn.Sequential):
    """Dropout of a flattened feature map, whose kernel is stored channels-last."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.25), nn.Linear(24, 3))


ROWS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "twice": (TwicePath, ROWS),
    "stochastic-depth": (Deep, torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2))),
    "auxiliary": (Auxiliary, ROWS),
    "mixed": (Mixed, ROWS),
    "normaliser": (Normaliser, ROWS),
    "noisy": (Noisy, ROWS),
    "convolutions": (ConvNet, torch.randn(4, 3, 5, 4, generator=torch.Generator().manual_seed(3))),
    "gated": (Gated, ROWS),
    "flat": (Flat, torch.randn(4, 3, 5, 4, generator=torch.Generator().manual_seed(4))),
    "gumbel": (Gumbel, ROWS),
    "quantiser": (Quantiser, ROWS),
    "spectral-norm": (spectral, ROWS),
    "jittered": (Jittered, ROWS),
    "noisy-sequence": (NoisySequence, ROWS),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_both_modes_are_those_of_pytorch(case: str) -> None:
    make, x = CASES[case]
    ensemble = assert_trains(make, x)
    assert case == "flat" or "training:" in ensemble.source()


@pytest.mark.further
def test_batches_are_counted_where_normalisation_is_written_out() -> None:
    models = [Force().eval() for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(models, (ROWS,), batch_axis=None)
    report = torch_bridge.check(models, ensemble, (ROWS,))
    assert report.passed, report
    assert "buffers after a call" in {row.case for row in report.rows}


def test_batches_are_counted_of_a_normalisation_under_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.net = nn.Sequential(nn.Linear(5, 5), self.norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Twice().eval()
    ensemble = torch_bridge.to_ensemble([model], (ROWS,))
    assert torch_bridge.check([model], ensemble, (ROWS,)).passed  # PyTorch's own functional_call spoils such a model
    _, after = ensemble.train().update(ROWS)
    model.train()(ROWS)
    (state,) = torch_bridge.to_torch(after)
    assert state["norm.num_batches_tracked"] == state["net.1.num_batches_tracked"] == 1
    torch.testing.assert_close(state["norm.running_mean"], model.norm.running_mean)


def test_evaluation_needs_no_key_and_training_draws_of_one() -> None:
    ensemble = torch_bridge.to_ensemble([TwicePath().eval() for _ in range(2)], (ROWS,))
    plain = ensemble(ROWS)
    np.testing.assert_array_equal(plain, ensemble(ROWS, key=jax.random.key(0)))
    first, second = (ensemble.train()(ROWS, key=jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    dropped = (np.asarray(first) == 0).all(-1)
    assert dropped.any() and not dropped.all()
    assert not np.array_equal(dropped[0], dropped[1])  # every member draws of its own


class Causal(nn.Module):
    """A table of positions and a mask, which weight decay would move if they counted as parameters."""

    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("position", torch.arange(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.position) @ torch.ones(5, 5).tril()


@pytest.mark.thinned
@pytest.mark.parametrize("make", [Normaliser, Causal, Noisy, Quantiser, ConvNet], ids=lambda make: make.__name__)
def test_training_moves_nothing_but_parameters_and_what_a_forward_writes(make: Callable[[], nn.Module]) -> None:
    x = CASES["convolutions"][1] if make is ConvNet else ROWS
    ensemble = torch_bridge.to_ensemble([make().eval() for _ in range(2)], (x,), check=False)
    state = TrainState.create(ensemble, optax.adamw(1e-2, weight_decay=0.1), jax.random.key(0))
    for _ in range(10):
        state, _ = train_step(state, x, np.zeros(len(x), "float32"), loss=squares)
    written = {use.path for call in ensemble.network.calls if call.target == "=" for use in call.args[:1]}
    written |= {f"{layer.path}." for layer in ensemble.network.layers if layer.type == "layers.BatchNorm"}
    for tree in ("params", "buffers", "constants"):
        before, after = (flatten(getattr(one, tree)) for one in (ensemble, state.ensemble))
        for name, array in before.items():
            moves = tree == "params" or name.startswith(tuple(written))
            assert np.array_equal(array, after[name]) != moves, name


def squares(outputs: Any, targets: jax.Array) -> Any:
    return sum((leaf.astype("float32") ** 2).mean() for leaf in jax.tree.leaves(outputs))


def test_a_model_in_training_mode_in_part_is_refused() -> None:
    model = TwicePath().train()
    model.path.eval()
    with pytest.raises(UnsupportedError, match="in training mode in part"):
        torch_bridge.to_ensemble([model], (ROWS,))
    torch_bridge.to_ensemble([model.train()], (ROWS,), mode="train", check=False)


class Reaching(nn.Module):
    """Takes the mode of itself for a submodule's normalisation, or of a submodule for dropout of its own."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.norm, self.drop, self.what = nn.BatchNorm1d(5), nn.Dropout(0.5), what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "dropout":
            return F.dropout(x, 0.5, self.drop.training)
        if self.what == "own":
            return self.drop(self.norm(x))
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.1, 1e-5)


@pytest.mark.thinned
@pytest.mark.parametrize("what", ["dropout", "normalisation", "own"])
def test_a_mode_of_another_module_is_refused_where_modes_differ(what: str) -> None:
    models = [Reaching(what) for _ in range(2)]
    for model in models:
        model.norm.eval()
        model.drop.eval()
    if what == "own":
        ensemble = torch_bridge.to_ensemble(models, (ROWS,), mode="as_is")
        np.testing.assert_allclose(ensemble(ROWS)[0], models[0](ROWS).detach(), rtol=1e-5, atol=1e-6)
        return
    with pytest.raises(UnsupportedError, match=r"(?s)takes the mode of other modules .* does not take that of"):
        torch_bridge.to_ensemble(models, (ROWS,), mode="as_is")
    for mode in ("eval", "train"):
        assert torch_bridge.to_ensemble(models, (ROWS,), mode=mode).network.evaluation_only is None
