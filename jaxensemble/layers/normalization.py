"""Normalisation with running statistics as PyTorch keeps them.

Flax's `nnx.BatchNorm` keeps a running average of the biased variance; PyTorch keeps the average of the unbiased
variance (`n / (n - 1)`), and counts batches. Constructors are named as Flax's: `momentum` is the share of the old
average, 0.9 where PyTorch says 0.1.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxensemble.errors import InputError
from jaxensemble.layers.variables import Buffer
from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.normalization import batch_norm


class _RunningNorm(nnx.Module):
    """The parts that both norms share: scale, bias, and running statistics of each feature."""

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        axis: int = -1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        track_running_stats: bool = True,
        count_batches: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        shape = (num_features,)
        self.scale = nnx.Param(jnp.ones(shape, param_dtype)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype)) if use_bias else nnx.data(None)
        self.mean = nnx.BatchStat(jnp.zeros(shape, param_dtype)) if track_running_stats else nnx.data(None)
        self.var = nnx.BatchStat(jnp.ones(shape, param_dtype)) if track_running_stats else nnx.data(None)
        counted = track_running_stats and count_batches
        self.num_batches_tracked = Buffer(jnp.zeros((), jnp.int32)) if counted else nnx.data(None)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.track_running_stats = track_running_stats

    def _check(self, x: Float[AnyArray, "..."]) -> None:
        if x.ndim == 0 or x.shape[self.axis] != self.num_features:
            raise InputError(f"`x` must have {self.num_features} features along axis {self.axis}; got shape {x.shape}")

    def _normalized(
        self, x: Float[AnyArray, "*shape"], mean: Float[AnyArray, "..."], var: Float[AnyArray, "..."]
    ) -> Float[Array, "*shape"]:
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return batch_norm(x, mean, var, scale, bias, axis=self.axis, epsilon=self.epsilon)

    def _update(
        self, mean: Float[AnyArray, " features"], var: Float[AnyArray, " features"], count: int, keep: Any
    ) -> None:
        """Moves the running statistics towards those of a batch of `count` values, given its biased variance."""
        if self.mean is None or self.var is None:
            return
        unbiased = var * (count / (count - 1))
        for old, new in ((self.mean, mean), (self.var, unbiased)):
            old[...] = lax.stop_gradient(keep * old[...] + (1 - keep) * new).astype(old[...].dtype)


class BatchNorm(_RunningNorm):
    """Batch normalisation, `torch.nn.BatchNorm1d`, `2d` and `3d` alike: `(x - mean) / sqrt(var + epsilon)`, scaled.

    In training, with the mean and biased variance of the batch; in evaluation (`use_running_average`, which
    `nnx.Module.eval` sets), with the running statistics. Input `[..., num_features]`, output of the same
    shape and dtype. Statistics are computed in two passes, in float32 at least.

    **Arguments:**

    - `num_features`: features along `axis`.
    - `momentum`: the share of the old running average that is kept; None for the average over all batches.
    - `track_running_stats`: False for a layer that uses the batch's statistics in evaluation too.
    - `count_batches`: whether batches are counted, as the average over all batches needs.

    **Raises:** `InputError` for another number of features, and in training for a single value per feature.

    >>> layer = BatchNorm(2)
    >>> layer(jnp.array([[1.0, 2.0], [3.0, 6.0]])).round(3).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> layer.var[...].round(3).tolist(), layer.num_batches_tracked[...].item()
    ([1.100000023841858, 1.7000000476837158], 1)
    """

    def __call__(self, x: Float[AnyArray, "*shape"], use_running_average: bool | None = None) -> Float[Array, "*shape"]:
        self._check(x)
        running = self.use_running_average if use_running_average is None else use_running_average
        if running and self.mean is not None and self.var is not None:
            return self._normalized(x, self.mean[...], self.var[...])
        axes = tuple(k for k in range(x.ndim) if k != self.axis % x.ndim)
        count = math.prod(x.shape[k] for k in axes)
        if not running and count < 2:
            raise InputError(
                f"`x` must hold more than one value per feature in training; got shape {x.shape}. Use a larger batch, "
                "or call .eval()."
            )
        mean, var = _statistics(x, axes)
        if not running:
            self._update(mean, var, count, self._keep())
        return self._normalized(x, mean, var)

    def _keep(self) -> Any:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            raise InputError("`momentum=None` averages over all batches, which needs count_batches=True")
        # In the precision of the statistics: an integer would give float32.
        dtype = jnp.float32 if self.mean is None else jnp.promote_types(self.mean[...].dtype, jnp.float32)
        return 1 - 1 / self.num_batches_tracked[...].astype(dtype)


class InstanceNorm(_RunningNorm):
    """Instance normalisation that keeps running statistics (`track_running_stats=True` in PyTorch).

    In training every instance and feature is normalised by itself, over all axes except the first and the
    features' axis, and the running statistics move towards the mean over the batch; in evaluation the running
    statistics are used. Batches are not counted: PyTorch leaves its counter at zero. Input `[N, ..., num_features]`.

    Without running statistics, this is `nnx.InstanceNorm(use_fast_variance=False)`.

    **Raises:** `InputError` for another number of features, and in training for a single value per feature.

    >>> layer = InstanceNorm(1)
    >>> layer(jnp.array([[[1.0], [3.0]], [[0.0], [8.0]]]))[..., 0].round(3).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    >>> layer.mean[...].round(3).tolist()
    [0.30000001192092896]
    """

    def __call__(self, x: Float[AnyArray, "*shape"], use_running_average: bool | None = None) -> Float[Array, "*shape"]:
        self._check(x)
        running = self.use_running_average if use_running_average is None else use_running_average
        if running and self.mean is not None and self.var is not None:
            return self._normalized(x, self.mean[...], self.var[...])
        axes = tuple(k for k in range(1, x.ndim) if k != self.axis % x.ndim)
        count = math.prod(x.shape[k] for k in axes)
        if count < 2:
            raise InputError(f"`x` must hold more than one value per instance and feature; got shape {x.shape}")
        mean, var = _statistics(x, axes)
        if not running and self.momentum is not None:
            self._update(mean.mean(0), var.mean(0), count, self.momentum)
        shape = [1 if k in axes else n for k, n in enumerate(x.shape)]
        return self._normalized(x, mean.reshape(shape), var.reshape(shape))


def _statistics(x: Float[AnyArray, "..."], axes: Sequence[int]) -> tuple[Float[Array, "*kept"], Float[Array, "*kept"]]:
    """Mean and biased variance, in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(axes, keepdims=True)
    var = jnp.square(x - mean).mean(axes)
    return mean.reshape(var.shape), var
