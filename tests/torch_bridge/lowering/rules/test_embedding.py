"""Embeddings, bags of them, and one-hot vectors, against PyTorch's; gradients of the tables too."""

from collections.abc import Callable
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
from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import assert_close, assert_ports, randomised
from torch_bridge.graph.capture import capture
from torch_bridge.lowering import OPERATIONS, lower
from torch_bridge.porting.port import to_flax

INDICES = torch.tensor([[0, 3, 1, 1], [2, 4, 4, 0], [1, 1, 3, 2]])

LAYERS = {
    "Embedding": lambda: nn.Embedding(5, 3),
    "square table": lambda: nn.Embedding(5, 5),
    "padding_idx": lambda: nn.Embedding(5, 3, padding_idx=1),
    "negative padding_idx": lambda: nn.Embedding(5, 3, padding_idx=-1),
    "scale_grad_by_freq": lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
    "both": lambda: nn.Embedding(5, 3, padding_idx=4, scale_grad_by_freq=True),
    "one feature": lambda: nn.Embedding(5, 1),
    "bag of sums": lambda: nn.EmbeddingBag(5, 3, mode="sum"),
    "bag of means": lambda: nn.EmbeddingBag(5, 3),
    "bag of maxima": lambda: nn.EmbeddingBag(5, 3, mode="max"),
    "bag with padding_idx": lambda: nn.EmbeddingBag(5, 3, padding_idx=1),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, x64: None) -> None:
    """Outputs for several batch sizes, and the gradient of the table."""
    model = LAYERS[name]()
    assert_ports(model, INDICES, batches=(2,))
    model = randomised(nn.Sequential(model))
    module = to_flax(model.eval(), (INDICES,))
    (model(INDICES) ** 3).sum().backward()
    grads = nnx.grad(lambda module: (module(jnp.asarray(INDICES.numpy())) ** 3).sum())(module)
    assert_close(jax.tree.leaves(grads)[0], next(model.parameters()).grad)


def test_flax_layer_where_it_is_exact() -> None:
    (layer,) = lower(capture(nn.Sequential(nn.Embedding(5, 3)), (INDICES,), OPERATIONS)).network.layers
    assert (layer.type, dict(layer.options)) == ("nnx.Embed", {"num_embeddings": 5, "features": 3})


def test_integers_of_32_bits() -> None:
    """Without x64, 64-bit indices arrive as 32-bit ones."""
    model = nn.Embedding(5, 3)
    module = to_flax(model, (INDICES,))
    np.testing.assert_array_equal(module(jnp.asarray(INDICES.numpy())), model(INDICES).detach().numpy())
    np.testing.assert_array_equal(module(INDICES.int().numpy()), model(INDICES).detach().numpy())


def test_max_norm_is_refused() -> None:
    """It rewrites the table at every call."""
    with pytest.raises(UnsupportedError, match="writes into weight"):
        to_flax(nn.Embedding(5, 3, max_norm=1.0), (INDICES,))


class Tied(nn.Module):
    """A table that is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(3, 5)
        self.encoder = nn.Embedding(5, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.decoder(self.encoder(i).tanh())


def test_tied_weights() -> None:
    assert_ports(Tied(), INDICES, batches=(2,))
    lowered = lower(capture(Tied(), (INDICES,), OPERATIONS))
    assert {layer.path: layer.type for layer in lowered.network.layers} == {"encoder": "nnx.Embed"}
    assert [entry.keys for entry in lowered.weights.entries if len(entry.keys) > 1] == [
        ("decoder.weight", "encoder.weight")
    ]


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(5, 3))

    def forward(self, i: Tensor) -> Any:
        return self.function(i, self.table)


FUNCTIONS = {
    "embedding": lambda i, w: F.embedding(i, w.tanh(), padding_idx=0),
    "one_hot": lambda i, w: (F.one_hot(i, 5), F.one_hot(i, 6).double() @ torch.cat([w, w[:1]])),
    "embedding_bag": lambda i, w: F.embedding_bag(i, w * 2, mode="sum"),
    "weights": lambda i, w: F.embedding_bag(i, w * 2, mode="sum", per_sample_weights=(i + 1).double() / 3),
    "indexing": lambda i, w: w[i],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    assert_ports(Call(FUNCTIONS[name]), INDICES, batches=(2,))


class Bags(nn.Module):
    def __init__(self, last: bool = False, mode: str = "sum"):
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3, mode=mode, include_last_offset=last)

    def forward(self, i: Tensor, offsets: Tensor) -> Tensor:
        return self.bag(i, offsets)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_by_offset(mode: str) -> None:
    """Bags of different lengths, an empty one among them."""
    i, offsets = INDICES.reshape(-1), torch.tensor([0, 3, 3, 9])
    assert_ports(Bags(mode=mode), i, offsets, batch_axis=None)


def test_bags_with_a_last_offset() -> None:
    assert_ports(Bags(last=True), INDICES.reshape(-1), torch.tensor([0, 3, 9, 12]), batch_axis=None)


def test_layer_with_gradient_options() -> None:
    """Both options at once: the row of the padding gets nothing, the others their mean."""
    layer = layers.Embed(3, 1, padding_idx=0, scale_grad_by_freq=True, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: (m(jnp.array([0, 1, 1, 2])) * jnp.array([[9.0], [1.0], [3.0], [5.0]])).sum())(layer)
    assert jax.tree.leaves(grads)[0].tolist() == [[0.0], [2.0], [5.0]]


class Positions(nn.Module):
    """Rows that no input chooses, and a layer that no input reaches: their constants stand outside of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.fc = nn.Embedding(5, 3), nn.Embedding(6, 3), nn.Linear(4, 3)

    def forward(self, i: Tensor) -> Tensor:
        places = self.positions(torch.arange(i.shape[1]))
        return self.words(i) + places + self.fc(torch.linspace(-1.0, 1.0, 4, dtype=self.fc.weight.dtype))


def test_layers_called_on_constants(x64: None) -> None:
    assert_ports(Positions(), INDICES, batches=(2,))
