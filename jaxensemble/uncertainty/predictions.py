"""Predictions of an ensemble: mean, votes, entropies, variances, quantiles."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast, overload

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxensemble.arrays import is_traced
from jaxensemble.devices.placement import wait_on_cpus
from jaxensemble.errors import InputError
from jaxensemble.uncertainty.checks import (
    as_floating,
    check_options,
    find_class_axis,
    quantile_levels,
    require_distribution,
    require_rank,
    warn_of_nan,
)

Task = Literal["classification", "regression", "gaussian"]
Scale = Literal["logits", "probabilities", "log_probabilities"]
Method = TypeVar("Method", bound=Callable[..., Any])


def _compiled(method: Method) -> Method:
    """Makes a method of a prediction, which is a pytree, one program instead of one for each operation."""
    run = jax.jit(method)
    return cast(Method, functools.wraps(method)(lambda *given: wait_on_cpus(run(*given))))


class Prediction:
    """The prediction of an ensemble: a `ClassPrediction`, `RegressionPrediction` or `GaussianPrediction`.

    Its constructors warn with a `NotANumberWarning` of members and rows that are NaN, except while tracing. Its `repr`
    shows shapes and dtypes.

    >>> Prediction.regression(jnp.zeros((5, 8)))
    RegressionPrediction(outputs=float32[5, 8])
    """

    def __repr__(self) -> str:
        names = [field.name for field in dataclasses.fields(cast(Any, self))]
        return f"{type(self).__name__}({', '.join(f'{name}={_short_repr(getattr(self, name))}' for name in names)})"

    @overload
    @staticmethod
    def from_outputs(
        outputs: ArrayLike,
        task: Literal["classification"] = "classification",
        *,
        outputs_are: Scale = "logits",
        class_axis: int | None = None,
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
    def from_outputs(outputs: Any, task: str = "classification", **options: Any) -> "Prediction":
        """The prediction for a task: `classification`, `regression`, or `gaussian` for (mean, log-variance) pairs.

        Takes the options of the constructor of that name, and raises its errors.

        **Raises:** `InputError` for other tasks and options.
        """
        check_options(task, options)
        prediction = read_outputs(outputs, task, **options)
        warn_of_nan(find_nan(prediction))
        return prediction

    @staticmethod
    def classification(
        outputs: ArrayLike, *, outputs_are: Scale = "logits", class_axis: int | None = None
    ) -> "ClassPrediction":
        """Reads floating-point `outputs` `[M, N, C]`, or classes at any other axis after the rows N.

        `class_axis` counts without the members axis, as in one PyTorch output: 1 for `[N, C, H, W]`, which is
        `[M, N, C, H, W]` here; 0 would be the rows. It is required for outputs with more axes than `[M, N, C]`.
        `outputs_are` says what the values are: logits (softmax is applied), probabilities or their logarithms (taken as
        they are).

        **Raises:** `InputError` for another dtype or rank, a class axis that is absent or has one class, and
        probabilities that do not sum to 1 (not checked while tracing).

        >>> Prediction.classification(jnp.zeros((5, 8, 3, 4, 4)), class_axis=1).predictive_entropy.shape
        (8, 4, 4)
        """
        prediction = _read_classes(outputs, outputs_are, class_axis)
        warn_of_nan(find_nan(prediction))
        return prediction

    @staticmethod
    def regression(outputs: ArrayLike) -> "RegressionPrediction":
        """Reads floating-point `outputs` `[M, N, ...]`.

        **Raises:** `InputError` for another dtype or rank.

        >>> print(Prediction.regression(jnp.array([[1.0], [3.0]])).std)
        [1.]
        """
        prediction = _read_quantity(outputs)
        warn_of_nan(find_nan(prediction))
        return prediction

    @staticmethod
    def gaussian(means: ArrayLike, log_variances: ArrayLike) -> "GaussianPrediction":
        """Reads members that each predict a normal distribution: `means` and `log_variances`, both `[M, N, ...]`.

        (PyTorch's `GaussianNLLLoss` takes variances: give their logarithms here.)

        **Raises:** `InputError` for other dtypes or ranks, or shapes that differ.

        >>> print(Prediction.gaussian(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))).variance)
        [2.]
        """
        prediction = _read_distributions(means, log_variances)
        warn_of_nan(find_nan(prediction))
        return prediction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ClassPrediction(Prediction):
    """Predictions of C classes by M members. Shapes below are for the usual `[M, N, C]`; classes keep their axis."""

    log_probabilities: Float[Array, "M N ..."]
    """Each member's log-probabilities `[M, N, C]`."""
    member_classes: Int[Array, "M N ..."]
    """Each member's class `[M, N]`: the largest output, the lowest index of equal outputs."""
    class_axis: int = dataclasses.field(metadata={"static": True})
    """The axis of the classes, counted from the end, with or without the members axis."""

    @property
    def members(self) -> int:
        """M."""
        return self.log_probabilities.shape[0]

    @property
    @_compiled
    def probabilities(self) -> Float[Array, "M N ..."]:
        """Each member's probabilities `[M, N, C]`."""
        return jnp.exp(self.log_probabilities)

    @property
    @_compiled
    def mean(self) -> Float[Array, "N ..."]:
        """The ensemble's probabilities `[N, C]`: the mean over members."""
        return jnp.mean(self.probabilities, axis=0)

    @property
    @_compiled
    def log_mean(self) -> Float[Array, "N ..."]:
        """The logarithm of `mean` `[N, C]`, finite where `mean` underflows; for `negative_log_likelihood`."""
        top = jnp.max(self.log_probabilities, axis=0)
        shift = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        # Dividing by M before the logarithm, not after it, makes equal members give their own value exactly.
        scaled = jnp.mean(jnp.exp(self.log_probabilities - shift), axis=0)
        impossible = scaled == 0
        return jnp.where(impossible, -jnp.inf, shift + jnp.log(jnp.where(impossible, 1, scaled)))

    @property
    @_compiled
    def variance(self) -> Float[Array, "N ..."]:
        """The variance of each probability over members `[N, C]`, divided by M."""
        return jnp.var(self.probabilities, axis=0)

    @property
    @_compiled
    def std(self) -> Float[Array, "N ..."]:
        """The square root of `variance` `[N, C]`."""
        return jnp.sqrt(self.variance)

    @property
    @_compiled
    def soft_vote(self) -> Int[Array, "N ..."]:
        """The class of largest mean probability `[N]`, the lowest index of equal classes."""
        return jnp.argmax(self.mean, self.class_axis)

    @property
    @_compiled
    def votes(self) -> Int[Array, "N ..."]:
        """The number of members that choose each class: int32 `[N, C]`, summing to M."""
        classes = self.log_probabilities.shape[self.class_axis]
        chosen = jax.nn.one_hot(self.member_classes, classes, dtype=jnp.int32, axis=self.class_axis)
        return jnp.sum(chosen, axis=0, dtype=jnp.int32)

    @property
    @_compiled
    def hard_vote(self) -> Int[Array, "N ..."]:
        """The class that most members choose `[N]`; of several, the one of largest mean probability, then the first."""
        votes = self.votes
        elected = votes == jnp.max(votes, self.class_axis, keepdims=True)
        return jnp.argmax(jnp.where(elected, self.mean, -1), self.class_axis)

    @property
    @_compiled
    def confidence(self) -> Float[Array, "N ..."]:
        """The mean probability of the class of `soft_vote` `[N]`."""
        return jnp.max(self.mean, self.class_axis)

    @property
    @_compiled
    def disagreement(self) -> Float[Array, "N ..."]:
        """The fraction of members that do not choose the hard vote `[N]`: Freeman's variation ratio (1965).

        0 when all agree, at most `1 - 1/min(M, C)`.
        """
        against = self.members - jnp.max(self.votes, self.class_axis)
        return against.astype(self.log_probabilities.dtype) / self.members

    @property
    @_compiled
    def predictive_entropy(self) -> Float[Array, "N ..."]:
        """The entropy of `mean` `[N]`, from 0 to log C: all uncertainty about the class."""
        return _entropy(self.log_mean, self.class_axis)

    @property
    @_compiled
    def expected_entropy(self) -> Float[Array, "N ..."]:
        """The mean over members of their entropies `[N]`: the part that remains when members agree."""
        return jnp.mean(_entropy(self.log_probabilities, self.class_axis), axis=0)

    @property
    @_compiled
    def mutual_information(self) -> Float[Array, "N ..."]:
        """`predictive_entropy - expected_entropy` `[N]`, from 0 to log min(M, C): the part due to members differing.

        The mutual information between class and member, called BALD in Houlsby, Huszár, Ghahramani and Lengyel
        (2011), "Bayesian active learning for classification and preference learning",
        https://arxiv.org/abs/1112.5745. Computed as the mean divergence of the members from `mean`, which is the same
        number without the cancellation that drowns small values in rounding.
        """
        divergence = jnp.sum(_divergence(self.log_probabilities, self.log_mean), self.class_axis)
        return jnp.maximum(jnp.mean(divergence, axis=0), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RegressionPrediction(Prediction):
    """Predictions of a quantity by M members."""

    outputs: Float[Array, "M N ..."]
    """Each member's value, or mean, `[M, N, ...]`."""

    @property
    def members(self) -> int:
        """M."""
        return self.outputs.shape[0]

    @property
    @_compiled
    def mean(self) -> Float[Array, "N ..."]:
        """The mean over members `[N, ...]`."""
        return jnp.mean(self.outputs, axis=0)

    @property
    @_compiled
    def variance(self) -> Float[Array, "N ..."]:
        """The variance over members `[N, ...]`, divided by M."""
        return jnp.var(self.outputs, axis=0)

    @property
    @_compiled
    def std(self) -> Float[Array, "N ..."]:
        """The square root of `variance` `[N, ...]`."""
        return jnp.sqrt(self.variance)

    def quantile(self, q: ArrayLike | Sequence[ArrayLike]) -> Float[Array, "..."]:
        """The `q` quantile over members `[N, ...]`, or `[Q, N, ...]` for `q` `[Q]`.

        Linear between the two members on either side, as `numpy.quantile` and `torch.quantile` are by default.

        **Raises:** `InputError` for `q` of another rank or, outside tracing, outside 0 to 1.

        >>> print(Prediction.regression(jnp.array([[1.0], [2.0], [4.0]])).quantile(jnp.array([0.5, 0.75])))
        [[2.]
         [3.]]
        """
        return jnp.quantile(self.outputs, quantile_levels(q, "q", self.outputs.dtype), axis=0)

    def interval(self, level: float) -> tuple[Float[Array, "N ..."], Float[Array, "N ..."]]:
        """The central interval of probability `level`: quantiles `(1 - level) / 2` and `(1 + level) / 2`.

        Point predictions of M members give an interval within their extremes: it shows how far they spread, not how
        far the truth may lie.

        >>> lower, upper = Prediction.regression(jnp.arange(5.0)[:, None]).interval(0.5)
        >>> print(lower, upper)
        [1.] [3.]
        """
        chosen = quantile_levels(level, "level", self.outputs.dtype)
        return self.quantile((1 - chosen) / 2), self.quantile((1 + chosen) / 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class GaussianPrediction(RegressionPrediction):
    """Predictions of a quantity by M members, each a normal distribution; the ensemble is their mixture."""

    log_variances: Float[Array, "M N ..."]
    """The logarithm of each member's variance `[M, N, ...]`."""

    @property
    @_compiled
    def aleatoric_variance(self) -> Float[Array, "N ..."]:
        """The mean of the members' variances `[N, ...]`: the noise that the members see in the data."""
        return jnp.mean(jnp.exp(self.log_variances), axis=0)

    @property
    @_compiled
    def epistemic_variance(self) -> Float[Array, "N ..."]:
        """The variance of the members' means `[N, ...]`, divided by M."""
        return jnp.var(self.outputs, axis=0)

    @property
    @_compiled
    def variance(self) -> Float[Array, "N ..."]:
        """The variance of the mixture `[N, ...]`: aleatoric plus epistemic, the law of total variance."""
        return self.aleatoric_variance + self.epistemic_variance

    def quantile(self, q: ArrayLike | Sequence[ArrayLike]) -> Float[Array, "..."]:
        """The `q` quantile of the mixture `[N, ...]`, or `[Q, N, ...]` for `q` `[Q]`.

        Found by bisection of the mixture's distribution function. Differentiable in means and variances, a constant
        in `q`.

        **Raises:** `InputError` for `q` of another rank or, outside tracing, outside 0 to 1.

        >>> print(Prediction.gaussian(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))).quantile(0.5).round(3))
        [2.]
        """
        levels = quantile_levels(q, "q", self.outputs.dtype)
        return _mixture_quantiles(self.outputs, jnp.exp(self.log_variances / 2), levels)


def read_outputs(outputs: Any, task: str = "classification", **options: Any) -> Prediction:
    """Returns the prediction for a task and its options, which are checked, without a warning of NaN."""
    match task:
        case "classification":
            return _read_classes(outputs, **options)
        case "regression":
            return _read_quantity(outputs)
    if isinstance(outputs, tuple | list) and len(outputs) == 2:
        return _read_distributions(*outputs)
    found = "one array" if isinstance(outputs, jax.Array) else type(outputs).__name__
    raise InputError(f"`outputs` must be a pair (means, log_variances); got {found}")


def _read_classes(outputs: ArrayLike, outputs_are: Scale = "logits", class_axis: int | None = None) -> ClassPrediction:
    values = as_floating(outputs, "outputs")
    axis = find_class_axis(values, class_axis, "outputs", "MNC")
    # The votes are read off the outputs themselves: log_softmax can round two classes to one value.
    classes = jnp.argmax(values, axis)
    match outputs_are:
        case "logits":
            log_probabilities = jax.nn.log_softmax(values, axis)
        case "probabilities":
            require_distribution(values, axis, "outputs")
            log_probabilities = jnp.log(values)
        case "log_probabilities":
            require_distribution(jnp.exp(values), axis, "exp(outputs)")
            log_probabilities = values
        case _:
            raise InputError(
                f"`outputs_are` must be 'logits', 'probabilities' or 'log_probabilities'; got {outputs_are!r}"
            )
    return ClassPrediction(log_probabilities, classes, axis)


def _read_quantity(outputs: ArrayLike) -> RegressionPrediction:
    values = as_floating(outputs, "outputs")
    require_rank(values, "outputs", "MN")
    return RegressionPrediction(values)


def _read_distributions(means: ArrayLike, log_variances: ArrayLike) -> GaussianPrediction:
    values, logs = as_floating(means, "means"), as_floating(log_variances, "log_variances")
    require_rank(values, "means", "MN")
    if values.shape != logs.shape:
        raise InputError(f"`log_variances` must have the shape of `means`; expected {values.shape}, got {logs.shape}")
    return GaussianPrediction(values, logs)


def figures_of(task: str) -> list[str]:
    """Returns the names of the arrays that the prediction of a task has, and whose rows come first.

    >>> figures_of("regression")
    ['mean', 'std', 'variance']
    """
    kinds = {"classification": ClassPrediction, "regression": RegressionPrediction, "gaussian": GaussianPrediction}
    of_members = {"members", "probabilities"}
    return sorted(
        name
        for name in dir(kinds[task])
        if isinstance(getattr(kinds[task], name, None), property) and name not in of_members
    )


def find_nan(prediction: Prediction) -> Bool[Array, "M N"]:
    """Returns the members and rows that have a NaN."""
    # Known values can also be met while tracing something else.
    known = not is_traced(prediction)
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        match prediction:
            case ClassPrediction(log_probabilities, _, class_axis):
                lost = jnp.isnan(log_probabilities).any(class_axis)
            case GaussianPrediction(outputs, log_variances):
                lost = jnp.isnan(outputs) | jnp.isnan(log_variances)
            case _:
                lost = jnp.isnan(cast(RegressionPrediction, prediction).outputs)
        return lost.any(tuple(range(2, lost.ndim)))


def _short_repr(value: Any) -> str:
    """The dtype and shape of an array."""
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)


def _entropy(log_probabilities: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    # 0 log 0 is 0, in the gradient too; NaN stays NaN, and rounding in `log_mean` cannot make entropy negative.
    finite = jnp.where(jnp.isneginf(log_probabilities), 0, log_probabilities)
    return jnp.maximum(-jnp.sum(jnp.exp(log_probabilities) * finite, axis), 0)


def _divergence(log_p: Float[Array, " M *shape"], log_m: Float[Array, "*shape"]) -> Float[Array, " M *shape"]:
    """`p log(p/m) - p + m`, which is never negative; summed over all members and classes, the last two terms cancel."""
    impossible = jnp.isneginf(log_p)
    ratio = jnp.where(impossible, 0, log_p - log_m)
    p = jnp.exp(log_p)
    near = (ratio > -1) & ~impossible
    # Of the order of the ratio's square, and exact to that order only when the first order is taken out by expm1.
    if_near = p * (ratio + jnp.expm1(-jnp.where(near, ratio, 0)))
    return jnp.where(near, if_near, p * ratio + (jnp.exp(log_m) - p))


@jax.jit
def _mixture_quantiles(
    means: Float[Array, " M *shape"], stds: Float[Array, " M *shape"], levels: Float[Array, "*Q"]
) -> Float[Array, "..."]:
    find = functools.partial(_mixture_quantile, means, stds)
    return jax.vmap(find)(levels) if levels.ndim else find(levels)


@jax.custom_jvp
def _mixture_quantile(
    means: Float[Array, " M *shape"], stds: Float[Array, " M *shape"], q: Float[Array, ""]
) -> Float[Array, "*shape"]:
    # The mixture's quantile lies between the least and the greatest of its members' own.
    own = means + stds * ndtri(q)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = bracket
        middle = (lower + upper) / 2
        below = jnp.mean(ndtr((middle - means) / stds), axis=0) < q
        return jnp.where(below, middle, lower), jnp.where(below, upper, middle)

    steps = int(jnp.finfo(means.dtype).nmant) + 8
    return jax.lax.fori_loop(0, steps, halve, (jnp.min(own, axis=0), jnp.max(own, axis=0)))[1]


@_mixture_quantile.defjvp
def _mixture_quantile_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # Implicit differentiation of mean(cdf(x)) = q: members move x in proportion to their density there.
    means, stds, q = primals
    found = _mixture_quantile(means, stds, q)
    z = (found - means) / stds
    weights = jax.nn.softmax(-(z**2) / 2 - jnp.log(stds), axis=0)
    return found, jnp.sum(weights * (tangents[0] + z * tangents[1]), axis=0)
