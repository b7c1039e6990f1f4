"""Keys for random numbers that a forward draws itself."""

from flax import nnx
from jaxtyping import PRNGKeyArray

from jaxensemble.layers.dropout import draw_key


class Keys(nnx.Module):
    """Another random key at each call, for a forward that draws numbers: `jax.random.normal(self.keys(), x.shape)`.

    The keys come from a stream of their own, as the keys of `nnx.Dropout` do.

    >>> import jax
    >>> keys = Keys(rngs=nnx.Rngs(0))
    >>> bool((jax.random.normal(keys(), (3,)) == jax.random.normal(keys(), (3,))).any())
    False
    """

    def __init__(self, *, rng_collection: str = "keys", rngs: nnx.Rngs | None = None):
        self.rngs = nnx.data(None) if rngs is None else rngs[rng_collection].fork()

    def __call__(self) -> PRNGKeyArray:
        return draw_key(self.rngs)
