"""Dropout: identity in evaluation; in training the share that is dropped, and the scale of the rest."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from jaxensemble import layers
from jaxensemble.errors import InputError
from tests.helpers.porting import assert_ports, assert_trains
from torch_bridge.graph.capture import capture
from torch_bridge.lowering import OPERATIONS, lower
from torch_bridge.porting.port import to_flax


def ported(model: nn.Module, *shape: int) -> Any:
    """The model in training mode, whatever mode it was ported in."""
    module = to_flax(model.eval(), (torch.ones(shape),))
    module.train()
    return module


KINDS = {
    "Dropout": (nn.Dropout(0.3), (2, 3)),
    "Dropout1d": (nn.Dropout1d(0.3), (2, 3, 4)),
    "Dropout2d": (nn.Dropout2d(0.3), (2, 3, 4, 5)),
    "Dropout3d": (nn.Dropout3d(0.3), (2, 3, 4, 5, 2)),
    "AlphaDropout": (nn.AlphaDropout(0.3), (2, 3)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.3), (2, 3, 4)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", KINDS)
def test_evaluation_passes_through(name: str) -> None:
    model, shape = KINDS[name]
    assert_ports(model, torch.randn(shape), batches=())


def test_dropout_drops_elements() -> None:
    """A share of `1 - p` is kept, scaled by exactly `1 / (1 - p)`; each call draws again."""
    module = ported(nn.Dropout(0.3), 2, 5)
    x = np.ones((200, 500), "float32")
    y = np.asarray(module(x))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    assert abs((y != 0).mean() - 0.7) < 5 * math.sqrt(0.21 / y.size)
    assert not np.array_equal(y, np.asarray(module(x)))
    module.eval()
    assert np.array_equal(module(x), x)


CHANNELS = {
    "Dropout1d": (nn.Dropout1d(0.4), (40, 60, 4), (2,)),
    "Dropout2d": (nn.Dropout2d(0.4), (40, 60, 3, 4), (2, 3)),
    "Dropout3d": (nn.Dropout3d(0.4), (40, 60, 2, 3, 2), (2, 3, 4)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.4), (40, 60, 3), (2,)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("within", [False, True], ids=["as it comes", "channels-last"])
def test_channels_are_dropped_whole(name: str, within: bool) -> None:
    """Also behind a convolution, where channels are stored last."""
    model, shape, spatial = CHANNELS[name]
    if within:
        conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](shape[1], shape[1], 1)
        with torch.no_grad():
            conv.weight.zero_()
            assert conv.bias is not None
            conv.bias.fill_(1.0)
        model = nn.Sequential(conv, model)
    y = np.asarray(ported(model, 2, *shape[1:])(np.ones(shape, "float32")))
    flat = y.reshape(*shape[:2], -1)
    assert y.shape == shape and len(spatial) == len(shape) - 2
    assert np.array_equal(flat, np.broadcast_to(flat[..., :1], flat.shape))
    kept = (flat[..., 0] > 0).mean()
    assert abs(kept - 0.6) < 5 * math.sqrt(0.24 / flat[..., 0].size)


def test_unbatched_channels() -> None:
    """A feature map without a batch: its first dimension is the channels."""
    module = to_flax(nn.Dropout1d(0.5).eval(), (torch.ones(64, 6),), batch_axis=None)
    module.train()
    y = np.asarray(module(np.ones((64, 6), "float32")))
    assert np.array_equal(y, np.broadcast_to(y[:, :1], y.shape)) and 10 < (y[:, 0] > 0).sum() < 54


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_keeps_mean_and_variance(p: float) -> None:
    """The two values that ones become are PyTorch's; the moments of a normal input are kept."""
    module = ported(nn.AlphaDropout(p), 2, 5)
    values = np.unique(np.asarray(module(np.ones((100, 100), "float32"))))
    torch.manual_seed(0)
    expected = torch.unique(nn.AlphaDropout(p).train()(torch.ones(1000))).numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    y = np.asarray(module(np.random.default_rng(0).normal(size=(400, 500)).astype("float32")))
    assert abs(y.mean()) < 0.02 and abs(y.std() - 1) < 0.02


EXTREMES = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]


@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes(kind: type[nn.Module]) -> None:
    """Nothing is dropped with probability 0, everything with 1."""
    x = np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype("float32")
    for p in (0.0, 1.0):
        np.testing.assert_array_equal(ported(kind(p), 2, 4, 2, 5)(x), x * (1 - p))


def test_gradient_passes_what_is_kept() -> None:
    module = ported(nn.Dropout(0.5), 2, 5)
    x = jnp.ones((20, 5))
    grads = np.asarray(nnx.grad(lambda module, x: module(x).sum(), argnums=1)(module, x))
    assert set(np.unique(grads)) == {0.0, 2.0}


# Functional forms and modes


class Functional(nn.Module):
    def __init__(self, training: bool | None):
        super().__init__()
        self.always = training

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training if self.always is None else self.always)


def test_functional_dropout_by_mode() -> None:
    x = np.ones((50, 40), "float32")
    module = to_flax(Functional(None).eval(), (torch.ones(2, 40),))
    assert np.array_equal(module(x), x)
    module.train()
    assert 0.4 < (np.asarray(module(x)) == 0).mean() < 0.6


def test_functional_dropout_always() -> None:
    """`F.dropout(x)` drops in evaluation too, in PyTorch and here: Monte-Carlo dropout."""
    x = np.ones((50, 40), "float32")
    module = to_flax(Functional(True).eval(), (torch.ones(2, 40),))
    for _ in range(2):
        assert 0.4 < (np.asarray(module(x)) == 0).mean() < 0.6
        module.train()
        module.eval()


def test_functional_dropout_never() -> None:
    network = lower(capture(Functional(False), (torch.ones(2, 4),), OPERATIONS)).network
    assert network.layers == () and network.calls == ()


def test_dropout_methods() -> None:
    """Every functional form, in place too, and one layer for each call within a module."""

    class Forms(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x * 1, 0.1, self.training, inplace=True)
            x = F.dropout2d(F.dropout1d(x, 0.2, self.training).unsqueeze(-1), 0.2, self.training)
            x = F.alpha_dropout(x * 1, 0.3, self.training, inplace=True)
            return F.feature_alpha_dropout(x, 0.4, self.training)

    model = Forms()
    assert_ports(model, torch.randn(2, 3, 4), batches=())
    made = lower(capture(model, (torch.randn(2, 3, 4),), OPERATIONS)).network.layers
    rates = [0.1, 0.2, 0.2, 0.3, 0.4]
    assert [layer.options["rate"] for layer in made] == rates and len({layer.path for layer in made}) == 5


def test_modes_of_submodules() -> None:
    """A submodule in evaluation mode within a model that trains keeps its mode until it is changed."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(30, 30), nn.Dropout(0.5)).train()
    model[0].eval()
    module = to_flax(model, (torch.ones(2, 30),), mode="as_is")
    modes = [layer.deterministic for _, layer in nnx.iter_modules(module) if isinstance(layer, nnx.Dropout)]
    assert {*modes} == {False, True}
    module.eval()
    x = np.ones((2, 30), "float32")
    assert np.array_equal(module(x), module(x))


def test_layers_draw_differently() -> None:
    """Two dropouts of one network do not share a mask."""
    module = ported(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), 2, 5)
    kept = (np.asarray(module(np.ones((100, 100), "float32"))) != 0).mean()
    assert abs(kept - 0.25) < 0.03


def test_rate_is_checked() -> None:
    with pytest.raises(InputError, match=r"expected 0 to 1, got 1\.5"):
        layers.AlphaDropout(1.5)
    with pytest.raises(InputError, match="rngs"):
        layers.AlphaDropout(0.5)(jnp.ones(3))


def test_alpha_dropout_under_jit() -> None:
    module = layers.AlphaDropout(0.5, rngs=nnx.Rngs(0))
    first, second = (nnx.jit(lambda m, x: m(x))(module, jnp.ones(64)) for _ in range(2))
    assert isinstance(first, jax.Array) and not np.array_equal(first, second)


class OnlyInTraining(nn.Module):
    """Dropout that evaluation does not call, twice in a row, with another use of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if self.training:
            z = F.dropout(F.dropout(y, 0.5), 0.5)
        else:
            z = y
        return torch.cat([z, y], 1)


def test_dropout_in_training_alone() -> None:
    x = np.ones((100, 50), "float32")
    module: Any = to_flax(OnlyInTraining().eval(), (torch.ones(2, 50),))
    np.testing.assert_array_equal(module(x), 2 * np.ones((100, 100), "float32"))
    module.train()
    y = np.asarray(module(x))
    assert set(np.unique(y[:, :50])) == {np.float32(0), np.float32(8)} and (y[:, 50:] == 2).all()
    assert abs((y[:, :50] == 0).mean() - 0.75) < 0.05


def test_dropout_in_evaluation_alone() -> None:
    """The reverse of what layers do: in evaluation it drops, in training it does not."""

    class Reverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, not self.training)

    model = Reverse().eval()
    y = np.asarray(to_flax(model, (torch.ones(2, 40),))(np.ones((50, 40), "float32")))
    assert 0.4 < (y == 0).mean() < 0.6
    assert_trains(lambda: nn.Sequential(nn.Linear(4, 4), Reverse()), torch.ones(2, 4))
