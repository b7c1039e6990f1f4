"""Reliability curves and proper scores."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxensemble.errors import InputError
from jaxensemble.uncertainty.checks import (
    labelled_rows,
    require_distribution,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReliabilityCurve:
    """The accuracy of predictions by their confidence.

    Bins are of equal width and include their upper edge, as in Guo, Pleiss, Sun and Weinberger (2017), "On calibration
    of modern neural networks", https://arxiv.org/abs/1706.04599.
    """

    edges: Float[Array, " edges"]
    """From 0 to 1 `[bins + 1]`."""
    confidence: Float[Array, " bins"]
    """The mean confidence in each bin `[bins]`; NaN in empty bins."""
    accuracy: Float[Array, " bins"]
    """The fraction of right predictions in each bin `[bins]`; NaN in empty bins."""
    count: Int[Array, " bins"]
    """The number of predictions in each bin: int32 `[bins]`."""

    @property
    def expected_calibration_error(self) -> Float[Array, ""]:
        """The mean distance between confidence and accuracy `[]`, each bin weighed by its count."""
        gap = jnp.where(self.count > 0, jnp.abs(self.accuracy - self.confidence), 0)
        return jnp.sum(gap * (self.count / jnp.sum(self.count)).astype(gap.dtype))


def reliability_curve(
    probabilities: ArrayLike, labels: ArrayLike | Sequence[int], bins: int = 15, *, class_axis: int | None = None
) -> ReliabilityCurve:
    """Confidence (the largest probability) against accuracy, in `bins` bins of confidence.

    `probabilities` is `[N, C]`, or has its classes at any `class_axis`; `labels` is the same without that axis,
    integers from 0 to C - 1.

    **Raises:** `InputError` for other shapes or dtypes, for no rows at all, and, outside tracing, for labels out of
    range and probabilities that do not sum to 1.

    >>> curve = reliability_curve(jnp.array([[0.9, 0.1], [0.4, 0.6]]), jnp.array([0, 0]), bins=2)
    >>> print(curve.count, curve.accuracy)
    [0 2] [nan 0.5]
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InputError(f"`bins` must be a whole number of at least 1; got {bins!r}")
    rows, answers = labelled_rows(probabilities, labels, class_axis, "probabilities")
    require_distribution(rows, -1, "probabilities")
    return _binned(jnp.max(rows, axis=-1), jnp.argmax(rows, axis=-1) == answers, bins)


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike | Sequence[int], bins: int = 15, *, class_axis: int | None = None
) -> Float[Array, ""]:
    """The expected calibration error of Guo et al. (2017) `[]`, from 0 to 1.

    Arguments and errors are those of [`reliability_curve`][].

    >>> print(expected_calibration_error(jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([0, 1])))
    0.25
    """
    return reliability_curve(probabilities, labels, bins, class_axis=class_axis).expected_calibration_error


def negative_log_likelihood(
    log_probabilities: ArrayLike, labels: ArrayLike | Sequence[int], *, class_axis: int | None = None
) -> Float[Array, ""]:
    """The mean of `-log p(label)` `[]` in nats; infinite where a label has probability 0.

    Takes logarithms, because a probability can be too small for its dtype: `prediction.log_mean` for an ensemble.
    Other arguments, and errors, are those of [`reliability_curve`][].

    >>> loss = negative_log_likelihood(jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]])), jnp.array([0, 0]))
    >>> print(f"{loss:.3f}")
    1.040
    """
    rows, answers = labelled_rows(log_probabilities, labels, class_axis, "log_probabilities")
    require_distribution(jnp.exp(rows), -1, "exp(log_probabilities)")
    return -jnp.mean(jnp.take_along_axis(rows, answers[:, None], axis=-1))


def brier_score(
    probabilities: ArrayLike, labels: ArrayLike | Sequence[int], *, class_axis: int | None = None
) -> Float[Array, ""]:
    """The mean of the squared distance between probabilities and the one-hot label `[]`, from 0 to 2.

    Summed over all classes, as in Brier (1950), "Verification of forecasts expressed in terms of probability", Monthly
    Weather Review 78(1). For two classes many halve it (`scale_by_half` of `sklearn.metrics.brier_score_loss`).
    Arguments and errors are those of [`reliability_curve`][].

    >>> print(brier_score(jnp.array([[0.5, 0.5], [0.0, 1.0]]), jnp.array([0, 1])))
    0.25
    """
    rows, answers = labelled_rows(probabilities, labels, class_axis, "probabilities")
    require_distribution(rows, -1, "probabilities")
    truth = jax.nn.one_hot(answers, rows.shape[-1], dtype=rows.dtype)
    return jnp.mean(jnp.sum((rows - truth) ** 2, axis=-1))


@functools.partial(jax.jit, static_argnames="bins")
def _binned(confidence: Float[Array, " N"], correct: Bool[Array, " N"], bins: int) -> ReliabilityCurve:
    edges = jnp.linspace(0, 1, bins + 1, dtype=confidence.dtype)
    place = jnp.clip(jnp.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    # Masked sums, not scatter-adds: those lose whole per cents in float32 once a bin holds millions of pixels.
    inside = place == jnp.arange(bins)[:, None]
    count = jnp.sum(inside, axis=1, dtype=jnp.int32)
    right = jnp.sum(inside & correct, axis=1, dtype=jnp.int32)
    total = jnp.sum(jnp.where(inside, confidence, 0), axis=1)
    filled = jnp.where(count > 0, count, 1).astype(confidence.dtype)
    mean, accuracy = (jnp.where(count > 0, sums / filled, jnp.nan) for sums in (total, right))
    return ReliabilityCurve(edges, mean, accuracy, count)
