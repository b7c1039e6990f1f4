"""VisionTransformer as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jaxensemble import ops


class Sequential(nnx.List):
    """Layers that are called one after the other."""

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


def gelu(x):
    return nnx.gelu(x, approximate=False)


class MultiheadAttention(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.out_proj = nnx.Linear(768, 768, rngs=rngs)
        self.in_proj_weight = nnx.Param(jnp.zeros((768, 2304)))
        self.in_proj_bias = nnx.Param(jnp.zeros((2304,)))

    def __call__(self, x):
        x = (x @ self.in_proj_weight + self.in_proj_bias).reshape(-1, 197, 3, 768)
        q, k, v = jnp.unstack(x, axis=2)
        q = q.reshape(-1, 197, 12, 64)
        x = ops.attention(q, k.reshape(-1, 197, 12, 64), v.reshape(-1, 197, 12, 64))
        x = x.reshape(-1, 197, 768)
        return self.out_proj(x)


class EncoderBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.ln_1 = nnx.LayerNorm(768, use_fast_variance=False, rngs=rngs)
        self.self_attention = MultiheadAttention(rngs=rngs)
        self.ln_2 = nnx.LayerNorm(768, use_fast_variance=False, rngs=rngs)
        self.mlp = Sequential(
            [nnx.Linear(768, 3072, rngs=rngs), gelu, nnx.Dropout(0.1, rngs=rngs), nnx.Linear(3072, 768, rngs=rngs)]
        )

    def __call__(self, x):
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Encoder(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.Dict({f"encoder_layer_{i}": EncoderBlock(rngs=rngs) for i in range(12)})
        self.ln = nnx.LayerNorm(768, use_fast_variance=False, rngs=rngs)
        self.pos_embedding = nnx.Param(jnp.zeros((197, 768)))

    def __call__(self, x):
        x = self.dropout(x + self.pos_embedding)
        for i in range(12):
            x = self.layers[f"encoder_layer_{i}"](x)
        return self.ln(x)


class VisionTransformer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv_proj = nnx.Conv(3, 768, (16, 16), strides=16, padding="VALID", rngs=rngs)
        self.encoder = Encoder(rngs=rngs)
        self.heads = nnx.Dict(head=nnx.Linear(768, 1000, rngs=rngs))
        self.class_token = nnx.Param(jnp.zeros((1, 1, 768)))

    def __call__(self, x):
        y = jnp.transpose(x, (0, 2, 3, 1))
        y = self.conv_proj(y)
        x = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, 768))
        x = jnp.concatenate([x, y.reshape(-1, 196, 768)], axis=1)
        x = self.encoder(x)[:, 0]
        return self.heads.head(x)
