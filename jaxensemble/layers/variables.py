"""Kinds of variables that Flax has no name for."""

from flax import nnx


class Buffer(nnx.Variable):
    """An array that belongs to a layer's state and is not trained, such as a count of batches."""


class Constant(nnx.Variable):
    """An array that all members share and nothing trains, such as a folded table of positions; never stacked."""
