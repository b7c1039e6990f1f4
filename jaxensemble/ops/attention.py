"""Attention with PyTorch's masks: that of Flax, but with zeros where nothing may be attended to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxensemble.ops.annotations import AnyArray

Mask = Bool[AnyArray, "..."] | Float[AnyArray, "..."]


def attention(
    query: Float[AnyArray, "*#batch queries heads features"],
    key: Float[AnyArray, "*#batch keys key_heads features"],
    value: Float[AnyArray, "*#batch keys value_heads values"],
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "... queries _ values"]:
    """`softmax(query @ key * scale + mask) @ value`, head by head.

    Source: `scaled_dot_product_attention` in torch.nn.functional. A query that may attend to nothing gets zeros.

    **Arguments:**

    - `query`, `key`, `value`: `[..., L, H, E]`, `[..., S, K, E]`, `[..., S, K, D]`: heads before features, as Flax has
      them. `K` divides `H`: heads side by side then share a key.
    - `mask`: broadcasts against `[..., H, L, S]`. True where a query may attend to a key; or numbers that are added.
    - `is_causal`: a query attends to keys up to its own place, counted from the first.
    - `scale`: `1 / sqrt(E)` unless given.

    **Returns:** `[..., L, H, D]`.

    >>> x = jnp.array([[[1.0]], [[2.0]]])
    >>> attention(x, x, x, is_causal=True)[:, 0, 0].tolist()
    [1.0, 1.88...]
    """
    return attended(attention_weights(query, key, mask, is_causal=is_causal, scale=scale), value)


def attention_weights(
    query: Float[AnyArray, "*#batch queries heads features"],
    key: Float[AnyArray, "*#batch keys key_heads features"],
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "... _ queries keys"]:
    """`softmax(query @ key * scale + mask)`, head by head: how much each query attends to each key.

    Arguments are those of `attention`. Returns `[..., H, L, S]`.

    >>> x = jnp.array([[[1.0]], [[2.0]]])
    >>> attention_weights(x, x, is_causal=True)[0, 0].tolist()
    [1.0, 0.0]
    """
    key = _repeat_heads(key, query.shape[-2])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("...lhe,...she->...hls", query * factor, key)
    if is_causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf) if mask.dtype == bool else logits + mask
    return jax.nn.softmax(logits, axis=-1) if mask is None else safe_softmax(logits)


def attended(
    weights: Float[AnyArray, "*#batch _ queries keys"], value: Float[AnyArray, "*#batch keys value_heads values"]
) -> Float[Array, "*batch queries _ values"]:
    """The mean of the values by the weights, `weights @ value`, head by head: see `attention`.

    >>> attended(jnp.array([[[1.0, 0.0], [0.5, 0.5]]]), jnp.array([[[1.0]], [[2.0]]]))[:, 0, 0].tolist()
    [1.0, 1.5]
    """
    return jnp.einsum("...hls,...shd->...lhd", weights, _repeat_heads(value, weights.shape[-3]))


def _repeat_heads(
    array: Float[AnyArray, "*batch keys _ features"], heads: int
) -> Float[Array, "*batch keys _ features"]:
    """Heads side by side that share a key, each with its own copy."""
    groups = heads // array.shape[-2]
    return jnp.repeat(array, groups, axis=-2) if groups > 1 else array


def safe_softmax(x: Float[AnyArray, "*shape"], axis: int = -1) -> Float[Array, "*shape"]:
    """The softmax along an axis; zeros where the whole axis is -inf.

    >>> safe_softmax(jnp.array([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf]])).tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """
    empty = jnp.all(jnp.isneginf(x), axis=axis, keepdims=True)
    return jnp.where(empty, 0, jax.nn.softmax(jnp.where(empty, 0, x), axis=axis))
