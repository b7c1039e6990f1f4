"""What is read off the stacked outputs of an ensemble: mean, spread, votes, entropies, quantiles, calibration.

Outputs are `[M, N, ...]`, members first. A [`Prediction`][] holds them and every figure is a property of it, computed
when it is asked for, eagerly or under `jax.jit`, in float32 or, for float64 outputs, in float64:

>>> logits = jnp.log(jnp.array([[[3.0, 1.0], [3.0, 1.0]], [[3.0, 1.0], [1.0, 3.0]]]))  # [members, batch, classes]
>>> prediction = Prediction.from_outputs(logits)
>>> print(prediction.mean.round(2))
[[0.75 0.25]
 [0.5  0.5 ]]
>>> agreed, disputed = jax.jit(lambda p: p.mutual_information)(prediction)
>>> print(f"{agreed:.3f} {disputed:.3f}")
0.000 0.131

Members count equally: the ensemble is their uniform mixture, as in Lakshminarayanan, Pritzel and Blundell (2017),
"Simple and scalable predictive uncertainty estimation using deep ensembles", https://arxiv.org/abs/1612.01474. Hence
variances divide by M, are 0 for one member, and add up by the law of total variance. (`torch.var` divides by M - 1
unless told `correction=0`.) Entropies are in nats. NaN outputs give NaN figures; votes,
which are whole numbers, go to the first NaN.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike, DTypeLike

from jaxensemble.errors import InputError
from jaxensemble.inputs import as_array

Task = Literal["classification", "regression", "gaussian"]
Scale = Literal["logits", "probabilities", "log_probabilities"]

NOT_ONE = 0.05
"""What tells logits from probabilities: logarithms rounded to bfloat16 move the sum of 1,000 classes by 0.02."""


class Prediction:
    """What an ensemble predicts: `ClassPrediction`, `RegressionPrediction` or `GaussianPrediction`, made here."""

    @overload
    @staticmethod
    def from_outputs(
        outputs: ArrayLike,
        task: Literal["classification"] = "classification",
        *,
        outputs_are: Scale = "logits",
        class_axis: int = -1,
    ) -> "ClassPrediction": ...
    @overload
    @staticmethod
    def from_outputs(outputs: ArrayLike, task: Literal["regression"]) -> "RegressionPrediction": ...
    @overload
    @staticmethod
    def from_outputs(outputs: tuple[ArrayLike, ArrayLike], task: Literal["gaussian"]) -> "GaussianPrediction": ...
    @overload
    @staticmethod
    def from_outputs(outputs: Any, task: Task = "classification", **options: Any) -> "Prediction": ...
    @staticmethod
    def from_outputs(outputs: Any, task: Task = "classification", **options: Any) -> "Prediction":
        """The prediction for a task: `classification`, `regression`, or `gaussian` for (mean, log-variance) pairs.

        Takes the options of the constructor of that name, and raises what it raises.
        """
        match task:
            case "classification":
                return Prediction.classification(outputs, **options)
            case "regression":
                return Prediction.regression(outputs, **options)
            case "gaussian":
                if isinstance(outputs, tuple | list) and len(outputs) == 2:
                    return Prediction.gaussian(*outputs, **options)
                raise InputError(f"`outputs` must be a pair (means, log_variances); got {type(outputs).__name__}")
        raise InputError(f"`task` must be 'classification', 'regression' or 'gaussian'; got {task!r}")

    @staticmethod
    def classification(outputs: ArrayLike, *, outputs_are: Scale = "logits", class_axis: int = -1) -> "ClassPrediction":
        """Reads floating-point `outputs` `[M, N, C]`, or classes at any other axis.

        `class_axis` counts without the members axis, as in one PyTorch output: 1 for `[N, C, H, W]`, which is
        `[M, N, C, H, W]` here. `outputs_are` says what the values are: logits (softmax is applied), probabilities or
        their logarithms (taken as they are). Raises `InputError` for another dtype or rank, a class axis that is
        absent or has one class, and probabilities that do not sum to 1 (not looked at while tracing).

        >>> Prediction.classification(jnp.zeros((5, 8, 3, 4, 4)), class_axis=1).predictive_entropy.shape
        (8, 4, 4)
        """
        values = _floating(outputs, "outputs")
        axis = _class_axis(values, class_axis, "outputs", "MNC")
        # The votes are read off the outputs themselves: log_softmax can round two classes to one value.
        classes = jnp.argmax(values, axis)
        match outputs_are:
            case "logits":
                log_probabilities = jax.nn.log_softmax(values, axis)
            case "probabilities":
                _require_distribution(values, axis, "outputs")
                log_probabilities = jnp.log(values)
            case "log_probabilities":
                _require_distribution(jnp.exp(values), axis, "exp(outputs)")
                log_probabilities = values
            case _:
                raise InputError(
                    f"`outputs_are` must be 'logits', 'probabilities' or 'log_probabilities'; got {outputs_are!r}"
                )
        return ClassPrediction(log_probabilities, classes, axis)

    @staticmethod
    def regression(outputs: ArrayLike) -> "RegressionPrediction":
        """Reads floating-point `outputs` `[M, N, ...]`. Raises `InputError` for another dtype or rank.

        >>> print(Prediction.regression(jnp.array([[1.0], [3.0]])).std)
        [1.]
        """
        values = _floating(outputs, "outputs")
        _require_rank(values, "outputs", "MN")
        return RegressionPrediction(values)

    @staticmethod
    def gaussian(means: ArrayLike, log_variances: ArrayLike) -> "GaussianPrediction":
        """Reads members that each predict a normal distribution: `means` and `log_variances`, both `[M, N, ...]`.

        Raises `InputError` for other dtypes or ranks, or shapes that differ. (PyTorch's `GaussianNLLLoss` takes
        variances: give their logarithms here.)

        >>> print(Prediction.gaussian(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))).variance)
        [2.]
        """
        values, logs = _floating(means, "means"), _floating(log_variances, "log_variances")
        _require_rank(values, "means", "MN")
        if values.shape != logs.shape:
            raise InputError(
                f"`log_variances` must have the shape of `means`; expected {values.shape}, got {logs.shape}"
            )
        return GaussianPrediction(values, logs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassPrediction(Prediction):
    """What M members say of C classes. Shapes below are for the usual `[M, N, C]`; classes stay where they were."""

    log_probabilities: jax.Array
    """Each member's log-probabilities `[M, N, C]`."""
    member_classes: jax.Array
    """Each member's class `[M, N]`: the largest output, the lowest index among equals."""
    class_axis: int = dataclasses.field(metadata={"static": True})
    """Where the classes are, counted from the end, with or without the members axis."""

    @property
    def members(self) -> int:
        """M."""
        return self.log_probabilities.shape[0]

    @property
    def probabilities(self) -> jax.Array:
        """Each member's probabilities `[M, N, C]`."""
        return jnp.exp(self.log_probabilities)

    @property
    def mean(self) -> jax.Array:
        """The ensemble's probabilities `[N, C]`: the mean over members."""
        return jnp.mean(self.probabilities, axis=0)

    @property
    def log_mean(self) -> jax.Array:
        """The logarithm of `mean` `[N, C]`, finite where `mean` underflows; for `negative_log_likelihood`."""
        top = jnp.max(self.log_probabilities, axis=0)
        shift = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        # Dividing by M before the logarithm, not after it, makes equal members give their own value exactly.
        scaled = jnp.mean(jnp.exp(self.log_probabilities - shift), axis=0)
        impossible = scaled == 0
        return jnp.where(impossible, -jnp.inf, shift + jnp.log(jnp.where(impossible, 1, scaled)))

    @property
    def variance(self) -> jax.Array:
        """The variance of each probability over members `[N, C]`, divided by M."""
        return jnp.var(self.probabilities, axis=0)

    @property
    def std(self) -> jax.Array:
        """The square root of `variance` `[N, C]`."""
        return jnp.sqrt(self.variance)

    @property
    def soft_vote(self) -> jax.Array:
        """The class of largest mean probability `[N]`, the lowest index among equals."""
        return jnp.argmax(self.mean, self.class_axis)

    @property
    def votes(self) -> jax.Array:
        """How many members choose each class: int32 `[N, C]`, summing to M."""
        classes = self.log_probabilities.shape[self.class_axis]
        chosen = jax.nn.one_hot(self.member_classes, classes, dtype=jnp.int32, axis=self.class_axis)
        return jnp.sum(chosen, axis=0, dtype=jnp.int32)

    @property
    def hard_vote(self) -> jax.Array:
        """The class most members choose `[N]`; among equals that of larger mean probability, then the lowest index."""
        votes = self.votes
        elected = votes == jnp.max(votes, self.class_axis, keepdims=True)
        return jnp.argmax(jnp.where(elected, self.mean, -1), self.class_axis)

    @property
    def confidence(self) -> jax.Array:
        """The mean probability of the class of `soft_vote` `[N]`."""
        return jnp.max(self.mean, self.class_axis)

    @property
    def disagreement(self) -> jax.Array:
        """The fraction of members that do not choose the hard vote `[N]`: Freeman's variation ratio (1965).

        0 when all agree, at most `1 - 1/min(M, C)`.
        """
        against = self.members - jnp.max(self.votes, self.class_axis)
        return against.astype(self.log_probabilities.dtype) / self.members

    @property
    def predictive_entropy(self) -> jax.Array:
        """The entropy of `mean` `[N]`, from 0 to log C: all uncertainty there is about the class."""
        return _entropy(self.log_mean, self.class_axis)

    @property
    def expected_entropy(self) -> jax.Array:
        """The mean over members of their entropies `[N]`: the part that no agreement among members removes."""
        return jnp.mean(_entropy(self.log_probabilities, self.class_axis), axis=0)

    @property
    def mutual_information(self) -> jax.Array:
        """`predictive_entropy - expected_entropy` `[N]`, from 0 to log min(M, C): the part due to members differing.

        The mutual information between class and member, called BALD in Houlsby, Huszár, Ghahramani and Lengyel
        (2011), "Bayesian active learning for classification and preference learning",
        https://arxiv.org/abs/1112.5745. Computed as the mean divergence of the members from `mean`, which is the same
        number without the cancellation that drowns small values in rounding.
        """
        divergence = jnp.sum(_divergence(self.log_probabilities, self.log_mean), self.class_axis)
        return jnp.maximum(jnp.mean(divergence, axis=0), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegressionPrediction(Prediction):
    """What M members say of a quantity."""

    outputs: jax.Array
    """Each member's value, or mean, `[M, N, ...]`."""

    @property
    def members(self) -> int:
        """M."""
        return self.outputs.shape[0]

    @property
    def mean(self) -> jax.Array:
        """The mean over members `[N, ...]`."""
        return jnp.mean(self.outputs, axis=0)

    @property
    def variance(self) -> jax.Array:
        """The variance over members `[N, ...]`, divided by M."""
        return jnp.var(self.outputs, axis=0)

    @property
    def std(self) -> jax.Array:
        """The square root of `variance` `[N, ...]`."""
        return jnp.sqrt(self.variance)

    def quantile(self, q: ArrayLike | Sequence[float]) -> jax.Array:
        """The `q` quantile over members `[N, ...]`, or `[Q, N, ...]` for `q` `[Q]`.

        Linear between the two members on either side, as `numpy.quantile` and `torch.quantile` are by default. Raises
        `InputError` for `q` of another rank or, outside tracing, outside 0 to 1.

        >>> print(Prediction.regression(jnp.array([[1.0], [2.0], [4.0]])).quantile(jnp.array([0.5, 0.75])))
        [[2.]
         [3.]]
        """
        return jnp.quantile(self.outputs, _levels(q, "q", self.outputs.dtype), axis=0)

    def interval(self, level: float) -> tuple[jax.Array, jax.Array]:
        """The central interval of probability `level`: quantiles `(1 - level) / 2` and `(1 + level) / 2`.

        Point predictions of M members give an interval within their extremes: it tells how far they spread, not how
        far the truth may lie.

        >>> lower, upper = Prediction.regression(jnp.arange(5.0)[:, None]).interval(0.5)
        >>> print(lower, upper)
        [1.] [3.]
        """
        chosen = _levels(level, "level", self.outputs.dtype)
        return self.quantile((1 - chosen) / 2), self.quantile((1 + chosen) / 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianPrediction(RegressionPrediction):
    """What M members say of a quantity, each with a normal distribution; the ensemble is the mixture of these."""

    log_variances: jax.Array
    """The logarithm of each member's variance `[M, N, ...]`."""

    @property
    def aleatoric_variance(self) -> jax.Array:
        """The mean of the members' variances `[N, ...]`: noise that they all see in the data."""
        return jnp.mean(jnp.exp(self.log_variances), axis=0)

    @property
    def epistemic_variance(self) -> jax.Array:
        """The variance of the members' means `[N, ...]`, divided by M."""
        return jnp.var(self.outputs, axis=0)

    @property
    def variance(self) -> jax.Array:
        """The variance of the mixture `[N, ...]`: aleatoric plus epistemic, the law of total variance."""
        return self.aleatoric_variance + self.epistemic_variance

    def quantile(self, q: ArrayLike | Sequence[float]) -> jax.Array:
        """The `q` quantile of the mixture `[N, ...]`, or `[Q, N, ...]` for `q` `[Q]`.

        Found by bisection of the mixture's distribution function. Differentiable in means and variances, a constant
        in `q`. Raises `InputError` for `q` of another rank or, outside tracing, outside 0 to 1.

        >>> print(Prediction.gaussian(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))).quantile(0.5).round(3))
        [2.]
        """
        levels = _levels(q, "q", self.outputs.dtype)
        find = functools.partial(_mixture_quantile, self.outputs, jnp.exp(self.log_variances / 2))
        return jax.vmap(find)(levels) if levels.ndim else find(levels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReliabilityCurve:
    """How often predictions made with a given confidence are right.

    Bins are of equal width and include their upper edge, as in Guo, Pleiss, Sun and Weinberger (2017), "On calibration
    of modern neural networks", https://arxiv.org/abs/1706.04599.
    """

    edges: jax.Array
    """From 0 to 1 `[bins + 1]`."""
    confidence: jax.Array
    """The mean confidence in each bin `[bins]`; NaN where there is none."""
    accuracy: jax.Array
    """The fraction that is right in each bin `[bins]`; NaN where there is none."""
    count: jax.Array
    """How many fall into each bin: int32 `[bins]`."""

    @property
    def expected_calibration_error(self) -> jax.Array:
        """The mean distance between confidence and accuracy `[]`, each bin weighed by its count."""
        gap = jnp.where(self.count > 0, jnp.abs(self.accuracy - self.confidence), 0)
        return jnp.sum(gap * (self.count / jnp.sum(self.count)).astype(gap.dtype))


def reliability_curve(
    probabilities: ArrayLike, labels: ArrayLike | Sequence[int], bins: int = 15, *, class_axis: int = -1
) -> ReliabilityCurve:
    """Confidence (the largest probability) against accuracy, in `bins` bins of confidence.

    `probabilities` is `[N, C]`, or has its classes at any `class_axis`; `labels` is the same without that axis,
    integers from 0 to C - 1. This and the three functions below raise `InputError` for other shapes or dtypes, for no
    rows at all, and, outside tracing, for labels out of range and probabilities that do not sum to 1.

    >>> curve = reliability_curve(jnp.array([[0.9, 0.1], [0.4, 0.6]]), jnp.array([0, 0]), bins=2)
    >>> print(curve.count, curve.accuracy)
    [0 2] [nan 0.5]
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InputError(f"`bins` must be a whole number of at least 1; got {bins!r}")
    rows, answers = _labelled(probabilities, labels, class_axis, "probabilities")
    _require_distribution(rows, -1, "probabilities")
    return _binned(jnp.max(rows, axis=-1), jnp.argmax(rows, axis=-1) == answers, bins)


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike | Sequence[int], bins: int = 15, *, class_axis: int = -1
) -> jax.Array:
    """The expected calibration error of Guo et al. (2017) `[]`, from 0 to 1; see [`reliability_curve`][].

    >>> print(expected_calibration_error(jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([0, 1])))
    0.25
    """
    return reliability_curve(probabilities, labels, bins, class_axis=class_axis).expected_calibration_error


def negative_log_likelihood(
    log_probabilities: ArrayLike, labels: ArrayLike | Sequence[int], *, class_axis: int = -1
) -> jax.Array:
    """The mean of `-log p(label)` `[]` in nats; infinite where a label was held to be impossible.

    Takes logarithms, because a probability can be too small for its dtype: `prediction.log_mean` for an ensemble.
    Arguments and errors are otherwise those of [`reliability_curve`][].

    >>> loss = negative_log_likelihood(jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]])), jnp.array([0, 0]))
    >>> print(f"{loss:.3f}")
    1.040
    """
    rows, answers = _labelled(log_probabilities, labels, class_axis, "log_probabilities")
    _require_distribution(jnp.exp(rows), -1, "exp(log_probabilities)")
    return -jnp.mean(jnp.take_along_axis(rows, answers[:, None], axis=-1))


def brier_score(probabilities: ArrayLike, labels: ArrayLike | Sequence[int], *, class_axis: int = -1) -> jax.Array:
    """The mean of the squared distance between probabilities and the one-hot label `[]`, from 0 to 2.

    Summed over all classes, as in Brier (1950), "Verification of forecasts expressed in terms of probability", Monthly
    Weather Review 78(1). For two classes many halve it (`scale_by_half` of `sklearn.metrics.brier_score_loss`).
    Arguments and errors are those of [`reliability_curve`][].

    >>> print(brier_score(jnp.array([[0.5, 0.5], [0.0, 1.0]]), jnp.array([0, 1])))
    0.25
    """
    rows, answers = _labelled(probabilities, labels, class_axis, "probabilities")
    _require_distribution(rows, -1, "probabilities")
    truth = jax.nn.one_hot(answers, rows.shape[-1], dtype=rows.dtype)
    return jnp.mean(jnp.sum((rows - truth) ** 2, axis=-1))


def _entropy(log_probabilities: jax.Array, axis: int) -> jax.Array:
    # 0 log 0 is 0, in the gradient too; NaN stays NaN, and rounding in `log_mean` cannot make entropy negative.
    finite = jnp.where(jnp.isneginf(log_probabilities), 0, log_probabilities)
    return jnp.maximum(-jnp.sum(jnp.exp(log_probabilities) * finite, axis), 0)


def _divergence(log_p: jax.Array, log_m: jax.Array) -> jax.Array:
    """`p log(p/m) - p + m`, which is never negative; summed over all members and classes, the last two terms cancel."""
    impossible = jnp.isneginf(log_p)
    ratio = jnp.where(impossible, 0, log_p - log_m)
    p = jnp.exp(log_p)
    near = (ratio > -1) & ~impossible
    # Of the order of the ratio's square, and exact to that order only when the first order is taken out by expm1.
    if_near = p * (ratio + jnp.expm1(-jnp.where(near, ratio, 0)))
    return jnp.where(near, if_near, p * ratio + (jnp.exp(log_m) - p))


@jax.custom_jvp
def _mixture_quantile(means: jax.Array, stds: jax.Array, q: jax.Array) -> jax.Array:
    # The mixture's quantile lies between the least and the greatest of its members' own.
    own = means + stds * ndtri(q)

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        lower, upper = bracket
        middle = (lower + upper) / 2
        below = jnp.mean(ndtr((middle - means) / stds), axis=0) < q
        return jnp.where(below, middle, lower), jnp.where(below, upper, middle)

    steps = int(jnp.finfo(means.dtype).nmant) + 8
    return jax.lax.fori_loop(0, steps, halve, (jnp.min(own, axis=0), jnp.max(own, axis=0)))[1]


@_mixture_quantile.defjvp
def _mixture_quantile_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # Implicit differentiation of mean(cdf(x)) = q: members move x in proportion to their density there.
    means, stds, q = primals
    found = _mixture_quantile(means, stds, q)
    z = (found - means) / stds
    weights = jax.nn.softmax(-(z**2) / 2 - jnp.log(stds), axis=0)
    return found, jnp.sum(weights * (tangents[0] + z * tangents[1]), axis=0)


@functools.partial(jax.jit, static_argnames="bins")
def _binned(confidence: jax.Array, correct: jax.Array, bins: int) -> ReliabilityCurve:
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


def _floating(array: ArrayLike, name: str) -> jax.Array:
    """The array in float32 or float64."""
    if isinstance(array, dict | tuple | list):
        raise InputError(
            f"`{name}` must be one array; got a {type(array).__name__} of {len(array)}. Of a network with several "
            "outputs choose the one to read."
        )
    values = jnp.asarray(as_array(array, name))
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise InputError(f"`{name}` must be of a floating-point dtype; got {values.dtype} {values.shape}")
    return values.astype(jnp.float32) if values.dtype.itemsize < 4 else values


def _require_rank(values: jax.Array, name: str, axes: str) -> None:
    layout = f"[{', '.join(axes)}, ...]"
    if values.ndim < len(axes):
        raise InputError(
            f"`{name}` must have at least {len(axes)} axes, {layout}; got shape {values.shape}. "
            "For one member or one example give an axis of length 1."
        )
    if values.shape[0] == 0:
        raise InputError(f"`{name}` must be {layout} with something along its first axis; got shape {values.shape}")


def _class_axis(values: jax.Array, class_axis: int, name: str, axes: str) -> int:
    """`class_axis`, which does not count a members axis M, from the end."""
    _require_rank(values, name, axes)
    rank = values.ndim - axes.count("M")
    if not -rank <= class_axis < rank:
        raise InputError(
            f"`class_axis` must be from {-rank} to {rank - 1} for `{name}` of shape {values.shape}; got {class_axis}"
        )
    axis = class_axis if class_axis < 0 else class_axis - rank
    if values.shape[axis] < 2:
        raise InputError(
            f"`{name}` must have at least two classes; got {values.shape[axis]} along class axis {class_axis} of shape "
            f"{values.shape}. A single sigmoid output x is the two logits 0 and x, the probabilities 1 - p and p."
        )
    return axis


def _require_distribution(values: jax.Array, axis: int, name: str) -> None:
    if isinstance(values, Tracer):
        return
    with jax.ensure_compile_time_eval():  # known values can also be met while tracing something else
        sums = jnp.sum(values, axis)
        if jnp.any(values < 0) or jnp.any(jnp.abs(sums - 1) > NOT_ONE):
            raise InputError(
                f"`{name}` must be at least 0 and sum to 1 over the classes; got a least value of {values.min():g} "
                f"and sums from {sums.min():g} to {sums.max():g}"
            )


def _labelled(
    array: ArrayLike, labels: ArrayLike | Sequence[int], class_axis: int, name: str
) -> tuple[jax.Array, jax.Array]:
    """One row per label: `[R, C]` and `[R]`."""
    values = _floating(array, name)
    answers = jnp.asarray(labels if isinstance(labels, Sequence) else as_array(labels, "labels"))
    axis = _class_axis(values, class_axis, name, "NC")
    rows, classes = jnp.moveaxis(values, axis, -1), values.shape[axis]
    if answers.shape != rows.shape[:-1] or not jnp.issubdtype(answers.dtype, jnp.integer):
        raise InputError(
            f"`labels` must be class numbers of shape {rows.shape[:-1]}, for `{name}` of shape {values.shape}; "
            f"got {answers.dtype} {answers.shape}"
        )
    if answers.size == 0:
        raise InputError(f"`labels` must hold at least one label; got shape {answers.shape}")
    _require_labels(answers, classes)
    return rows.reshape(-1, classes), answers.reshape(-1)


def _require_labels(labels: jax.Array, classes: int) -> None:
    if isinstance(labels, Tracer):
        return
    with jax.ensure_compile_time_eval():
        if labels.min() < 0 or labels.max() >= classes:
            raise InputError(f"`labels` must be from 0 to {classes - 1}; got {labels.min()} to {labels.max()}")


def _levels(q: ArrayLike | Sequence[float], name: str, dtype: DTypeLike) -> jax.Array:
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(q))
    known = None if traced else np.asarray(q, dtype)
    levels = jnp.asarray(q if known is None else known, dtype)
    if levels.ndim > 1:
        raise InputError(f"`{name}` must be a number or one axis of numbers; got shape {levels.shape}")
    if known is not None and not ((known >= 0) & (known <= 1)).all():
        raise InputError(f"`{name}` must be from 0 to 1; got {known.tolist()}")
    return levels
