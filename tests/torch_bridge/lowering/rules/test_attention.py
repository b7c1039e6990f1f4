"""Attention and Transformer layers: masks, options, and dropout of attention's weights in training."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from tests.helpers.porting import assert_ports, randomised
from torch_bridge.graph.capture import capture
from torch_bridge.lowering import OPERATIONS, lower
from torch_bridge.porting.port import to_flax

N, L, S, E = 2, 4, 5, 6
BANNED = torch.ones(L, S).triu(2).bool()  # True: may not be attended to, as nn.MultiheadAttention has it
ADDED = torch.randn(L, S, generator=torch.Generator().manual_seed(0)).double()


class Attention(nn.Module):
    """`nn.MultiheadAttention` with the options of its constructor and of its call."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, **options)
        self.call = call or {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Any:
        padding = None if padding is None else padding > 0
        y, weights = self.attention(query, key, value, key_padding_mask=padding, **self.call)
        return y if weights is None else (y, weights)


FIRST: dict[str, Any] = {"batch_first": True}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights": ({}, FIRST),
    "weights-of-each-head": ({"average_attn_weights": False}, FIRST),
    "no-weights": ({"need_weights": False}, FIRST),
    "no-bias": ({}, FIRST | {"bias": False}),
    "bias-kv": ({}, FIRST | {"add_bias_kv": True}),
    "zero-attention": ({"need_weights": False}, FIRST | {"add_zero_attn": True}),
    "bool-mask": ({"attn_mask": BANNED}, FIRST),
    "bool-mask-no-weights": ({"attn_mask": BANNED, "need_weights": False}, FIRST),
    "float-mask": ({"attn_mask": ADDED}, FIRST),
    "mask-and-bias-kv": ({"attn_mask": BANNED, "need_weights": False}, FIRST | {"add_bias_kv": True}),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", OPTIONS)
def test_multihead_attention(case: str) -> None:
    call, options = OPTIONS[case]
    inputs = torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E)
    assert_ports(Attention(call, **options), *inputs)


def test_time_first() -> None:
    inputs = torch.randn(L, N, E), torch.randn(S, N, E), torch.randn(S, N, E)
    assert_ports(Attention(), *inputs, batch_axis=1)


def test_keys_and_values_of_other_sizes() -> None:
    inputs = torch.randn(N, L, E), torch.randn(N, S, 3), torch.randn(N, S, 7)
    assert_ports(Attention(kdim=3, vdim=7, **FIRST), *inputs)


def test_unbatched() -> None:
    assert_ports(Attention(), torch.randn(L, E), torch.randn(S, E), torch.randn(S, E), batch_axis=None)


@pytest.mark.thinned
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"attn_mask": BANNED}], ids=["", "no-weights", "mask"])
def test_padding(call: dict[str, Any]) -> None:
    """Of keys, with a batch of its own: an input."""
    padding = torch.tensor([[0] * S, [0] * 3 + [1] * 2])
    inputs = torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E), padding
    assert_ports(Attention(call, **FIRST), *inputs)


class SelfAttention(nn.Module):
    def __init__(self, **call: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 3, batch_first=True)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.call)[0]


def test_causal() -> None:
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    assert_ports(SelfAttention(attn_mask=causal.double(), is_causal=True, need_weights=False), torch.randn(N, L, E))


class Masked(nn.Module):
    """A Transformer part with the masks that it is called with."""

    def __init__(self, part: nn.Module, **call: Any):
        super().__init__()
        self.part = part
        self.call = call

    def forward(self, *xs: Tensor) -> Tensor:
        return self.part(*xs, **self.call)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, 2, 8, **FIRST | options)


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(E, 2, 8, **FIRST | options)


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length).double()


PADDED = torch.tensor([[False] * L, [False] * 2 + [True] * 2])
PARTS: dict[str, Callable[[], nn.Module]] = {
    "encoder-layer": lambda: encoder_layer(),
    "encoder-layer-gelu-first-no-bias": lambda: encoder_layer(activation="gelu", norm_first=True, bias=False),
    "encoder-layer-causal": lambda: Masked(encoder_layer(), src_mask=causal(L), is_causal=True),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2, norm=nn.LayerNorm(E), enable_nested_tensor=False),
    "encoder-masked": lambda: Masked(
        nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False), mask=causal(L) < 0
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", PARTS)
def test_encoder(case: str) -> None:
    assert_ports(PARTS[case](), torch.randn(N, L, E))


def test_encoder_with_padding() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    assert_ports(Masked(encoder, src_key_padding_mask=PADDED), torch.randn(N, L, E), batch_axis=None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # from PyTorch's own fast path
def test_encoder_with_padding_is_ported_without_the_zeros_of_the_fast_path() -> None:
    encoder, x = nn.TransformerEncoder(encoder_layer(), 2), torch.randn(N, L, E)
    port = to_flax(Masked(encoder.eval(), src_key_padding_mask=PADDED), (x,), batch_axis=None)
    slow = encoder(x, src_key_padding_mask=PADDED).detach().numpy()  # parameters want gradients
    np.testing.assert_allclose(port(x.numpy()), slow, rtol=1e-5, atol=1e-5)


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "decoder-layer": lambda: decoder_layer(norm_first=True),
    "decoder": lambda: Masked(
        nn.TransformerDecoder(decoder_layer(), 2, norm=nn.LayerNorm(E)), tgt_mask=causal(L), tgt_is_causal=True
    ),
    "decoder-memory-mask": lambda: Masked(decoder_layer(), memory_mask=BANNED),
    "transformer": lambda: Masked(
        nn.Transformer(E, 2, 1, 1, 8, batch_first=True), src_mask=causal(L), tgt_mask=causal(S), memory_mask=BANNED.T
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", DECODERS)
def test_decoder(case: str) -> None:
    """Of decoders, the first input is the target; of a Transformer, the second."""
    assert_ports(DECODERS[case](), torch.randn(N, L, E), torch.randn(N, S, E))


# Dropout of attention's weights


class Dropped(nn.Module):
    """Attention to values that are the identity: the outputs are the weights after dropout."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        eye = torch.eye(8).expand(x.shape[0], 2, 8, 8)
        return F.scaled_dot_product_attention(x, x, eye, dropout_p=self.p if self.training else 0.0)


def test_weights_are_dropped_in_training() -> None:
    """In evaluation none; in training elements of the softmax, the rest scaled, as PyTorch does."""
    model = Dropped(0.3).eval()
    x = torch.randn(100, 2, 8, 3)
    module = to_flax(model, (x,))
    whole = np.asarray(module(x.numpy()))
    np.testing.assert_allclose(whole, model(x), rtol=1e-5, atol=1e-6)
    module.train()
    y = np.asarray(module(x.numpy()))
    kept = y != 0
    np.testing.assert_allclose(y[kept], whole[kept] / 0.7, rtol=1e-5)
    theirs = (model.train()(x) != 0).double().mean().item()
    spread = 5 * math.sqrt(0.21 / y.size)
    assert abs(kept.mean() - 0.7) < spread and abs(theirs - 0.7) < spread
    assert not np.array_equal(y, module(x.numpy()))


@pytest.mark.thinned
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_by_mode(need_weights: bool) -> None:
    """With the weights returned, PyTorch's training graph has a dropout that its evaluation graph lacks."""
    model = Attention({"need_weights": need_weights}, dropout=0.4, batch_first=True).eval()
    x = torch.randn(50, 8, E)
    module: Any = to_flax(model, (x, x, x))
    given = x.numpy()
    before = module(given, given, given)
    jax.tree.map(lambda y, want: np.testing.assert_allclose(y, want.detach(), atol=1e-5), before, model(x, x, x))
    module.train()
    again = module(given, given, given)
    y, dropped = (jax.tree.leaves(result)[0] for result in (before, again))
    assert not np.allclose(dropped, y, atol=1e-3)
    if need_weights:
        weights = np.asarray(again[1])
        zeros = (weights == 0).mean()  # both heads dropped
        assert abs(zeros - 0.16) < 5 * math.sqrt(0.16 * 0.84 / weights.size)
    module.eval()
    np.testing.assert_array_equal(jax.tree.leaves(module(given, given, given))[0], y)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "encoder-layer": lambda: encoder_layer(dropout=0.2),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(dropout=0.2), 2, enable_nested_tensor=False),
}


@pytest.mark.parametrize("case", TRAINED)
def test_transformers_can_be_trained(case: str) -> None:
    network = lower(capture(TRAINED[case](), (torch.randn(N, L, E),), OPERATIONS)).network
    rates = [layer.options["rate"] for layer in network.layers if layer.type == "nnx.Dropout"]
    assert network.evaluation_only is None
    assert rates == [0.2] * 4 * (2 if case == "encoder" else 1)


def test_no_dropout_no_layer() -> None:
    """Attention without dropout is one function in both modes, and trains as PyTorch's does."""
    model = randomised(encoder_layer(dropout=0.0)).train()
    x = torch.randn(N, L, E).double()
    with jax.enable_x64(True):
        module = to_flax(model, (x,))
        assert not any(path[-1:] == ("attention_dropout",) for path, _ in nnx.iter_modules(module))
        assert np.abs(np.asarray(module(x.numpy())) - model(x).detach().numpy()).max() < 1e-12
