"""Layers that PyTorch has and Flax lacks or defines differently."""

from jaxensemble.layers.activation import PReLU, RReLU
from jaxensemble.layers.dropout import AlphaDropout
from jaxensemble.layers.embedding import Embed
from jaxensemble.layers.keys import Keys
from jaxensemble.layers.linear import Bilinear
from jaxensemble.layers.mode import Training
from jaxensemble.layers.normalization import BatchNorm, InstanceNorm
from jaxensemble.layers.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from jaxensemble.layers.variables import Buffer, Constant

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AlphaDropout",
    "BatchNorm",
    "Bilinear",
    "Buffer",
    "Constant",
    "Embed",
    "GRUCell",
    "InstanceNorm",
    "Keys",
    "LSTMCell",
    "PReLU",
    "RNNCell",
    "RReLU",
    "Training",
]
