"""Words as a Flax module."""

from flax import nnx
from jaxensemble import layers


class Words(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.block = nnx.Dict(words=nnx.Embed(5, 3, rngs=rngs), padded=layers.Embed(5, 3, padding_idx=0, rngs=rngs))
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, ids):
        ids = self.block.words(ids) + self.block.padded(ids)
        return self.out(ids)
