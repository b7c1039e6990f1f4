"""Predictions from stacked outputs, against scipy, scikit-learn and numpy in float64, and as properties in float32."""

import functools
import itertools
from typing import Any, cast

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
from jax.test_util import check_grads

from jaxensemble.errors import InputError, NotANumberWarning
from jaxensemble.uncertainty import (
    ClassPrediction,
    GaussianPrediction,
    Prediction,
    RegressionPrediction,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_curve,
)

EXACT = 1e-12  # float64, relative and absolute
CLOSE = 1e-5  # float32

CLASS_FIGURES = (
    "probabilities",
    "mean",
    "log_mean",
    "variance",
    "std",
    "soft_vote",
    "votes",
    "hard_vote",
    "confidence",
    "disagreement",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
)


@jax.jit
def _figures(prediction: ClassPrediction) -> dict[str, jax.Array]:
    return {name: getattr(prediction, name) for name in CLASS_FIGURES}


def _assert_close(actual: Any, expected: Any, tolerance: float, name: str = "") -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=name)


LAYOUTS = {  # shape of the outputs, class axis without the members axis
    "rows": ((5, 7, 3), -1),
    "rows, counted from the front": ((5, 7, 3), 1),
    "segmentation": ((4, 2, 3, 2, 5), 1),
    "segmentation, channels last": ((4, 2, 2, 5, 3), -1),
    "one member": ((1, 7, 3), -1),
    "no rows": ((5, 0, 3), -1),
}


def _normal(*shape: int, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng(sum(shape)).normal(size=shape)


def _expected(logits: np.ndarray, class_axis: int) -> dict[str, Any]:
    """Computes `ClassPrediction`'s figures in another way: scipy, loops, classes moved to the end and back."""
    front = np.moveaxis(logits, class_axis if class_axis < 0 else class_axis + 1, -1)
    p = scipy.special.softmax(front, axis=-1)
    mean, chosen = p.mean(axis=0), p.argmax(axis=-1)
    votes = np.zeros(mean.shape, int)
    hard = np.zeros(mean.shape[:-1], int)
    for place in np.ndindex(hard.shape):
        votes[place] = np.bincount(chosen[(slice(None), *place)], minlength=p.shape[-1])
        hard[place] = max(range(p.shape[-1]), key=lambda c, at=place: (votes[at][c], mean[at][c], -c))
    total = scipy.stats.entropy(mean, axis=-1)
    expected = scipy.stats.entropy(p, axis=-1).mean(axis=0)
    back = functools.partial(np.moveaxis, source=-1, destination=class_axis)
    return {
        "probabilities": np.moveaxis(p, -1, class_axis if class_axis < 0 else class_axis + 1),
        "mean": back(mean),
        "log_mean": back(np.log(mean)),
        "variance": back(p.var(axis=0)),
        "std": back(p.std(axis=0)),
        "soft_vote": mean.argmax(axis=-1),
        "votes": back(votes),
        "hard_vote": hard,
        "confidence": mean.max(axis=-1),
        "disagreement": (chosen != hard).mean(axis=0),
        "predictive_entropy": total,
        "expected_entropy": expected,
        "mutual_information": total - expected,
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "class_axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_classification_figures(shape: tuple[int, ...], class_axis: int) -> None:
    logits = _normal(*shape)
    prediction = Prediction.from_outputs(logits, class_axis=class_axis)
    assert prediction.members == shape[0]
    figures = _figures(prediction)
    for name, expected in _expected(logits, class_axis).items():
        assert figures[name].shape == expected.shape, name
        _assert_close(figures[name], expected, EXACT, name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", ["probabilities", "log_probabilities"])
def test_outputs_are(scale: Any) -> None:
    logits = _normal(5, 2, 3, 4)
    read = {"probabilities": scipy.special.softmax, "log_probabilities": scipy.special.log_softmax}[scale]
    prediction = Prediction.classification(read(logits, axis=2), outputs_are=scale, class_axis=1)
    figures = _figures(prediction)
    for name, expected in _expected(logits, 1).items():
        _assert_close(figures[name], expected, EXACT, name)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_computed_in_at_least_float32(dtype: str) -> None:
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        outputs = jax.nn.softmax(jnp.asarray(_normal(3, 4, 5), dtype))
        prediction = Prediction.classification(outputs, outputs_are="probabilities")
        integers = {"soft_vote", "hard_vote", "votes"}
        for name, figure in _figures(prediction).items():
            assert figure.dtype == wide or name in integers, name
        np.testing.assert_array_equal(
            Prediction.from_outputs(outputs).log_probabilities, jax.nn.log_softmax(outputs.astype(wide))
        )
        regression = Prediction.regression(outputs)
        assert regression.variance.dtype == regression.quantile(0.25).dtype == wide
        assert Prediction.gaussian(outputs, outputs).quantile(0.25).dtype == wide
        labels = jnp.zeros(4, jnp.uint8)
        assert brier_score(outputs[0], labels).dtype == expected_calibration_error(outputs[0], labels).dtype == wide


@pytest.mark.parametrize("class_axis", [-1, 1])
def test_classification_under_jit(class_axis: int) -> None:
    logits = jnp.asarray(_normal(4, 6, 3, 3), jnp.float32)
    traces = []

    @jax.jit
    def figures(prediction: ClassPrediction) -> dict[str, jax.Array]:
        traces.append(prediction.class_axis)
        return {name: getattr(prediction, name) for name in CLASS_FIGURES}

    @jax.jit
    def predict(logits: jax.Array) -> ClassPrediction:
        return Prediction.from_outputs(logits, class_axis=class_axis)

    eager = Prediction.from_outputs(logits, class_axis=class_axis)
    for compiled in (figures(eager), figures(predict(logits))):
        for name in CLASS_FIGURES:
            _assert_close(compiled[name], getattr(eager, name), CLOSE, name)
    assert len(traces) == 1
    assert len(jax.tree.leaves(eager)) == 2


def test_known_values_while_tracing_something_else() -> None:
    p, labels, wrong = jnp.array([[0.5, 0.5], [0.25, 0.75]]), jnp.array([0, 1]), jnp.array([1, 2])
    regression = Prediction.regression(p)

    def figures(x: jax.Array) -> jax.Array:
        known = Prediction.classification(p[None], outputs_are="probabilities").confidence.sum()
        return x + known + brier_score(p, labels) + regression.quantile(0.5).sum() + regression.interval(0.5)[0].sum()

    _assert_close(jax.jit(figures)(1.0), figures(jnp.array(1.0)), CLOSE)
    with pytest.raises(InputError, match="from 0 to 1; got 1 to 2"):
        jax.jit(lambda x: x + brier_score(p, wrong))(1.0)


def test_hard_vote_among_equals() -> None:
    p = [  # member, row, class
        [[0.6, 0.4, 0.0], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.4, 0.35, 0.25]],
        [[0.1, 0.9, 0.0], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.4, 0.35, 0.25]],
        [[0.2, 0.2, 0.6], [0.25, 0.25, 0.5], [0.25, 0.5, 0.25], [0.0, 1.0, 0.0]],
    ]
    prediction = Prediction.classification(jnp.array(p), outputs_are="probabilities")
    assert prediction.votes.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [2, 1, 0]]
    # The largest mean, the lowest index, the lowest index, and a majority that the mean probability is against.
    assert prediction.hard_vote.tolist() == [1, 0, 0, 0]
    assert prediction.soft_vote.tolist() == [1, 0, 0, 1]
    _assert_close(prediction.disagreement, [2 / 3, 2 / 3, 2 / 3, 1 / 3], CLOSE)


def test_votes_see_what_log_softmax_rounds_away() -> None:
    prediction = Prediction.from_outputs(jnp.array([[[0.0, 1e-8]]]))
    assert prediction.log_probabilities[0, 0, 0] == prediction.log_probabilities[0, 0, 1]
    assert prediction.votes.tolist() == [[0, 1]]
    assert prediction.hard_vote.tolist() == [1]


@pytest.mark.parametrize("members", [1, 3, 10])
def test_equal_members_have_no_mutual_information_at_all(members: int) -> None:
    logits = np.tile(_normal(1, 50, 10).astype(np.float32), (members, 1, 1))
    figures = _figures(Prediction.from_outputs(logits))
    assert not figures["mutual_information"].any()
    assert not figures["disagreement"].any()
    _assert_close(figures["variance"], 0, EXACT)


def test_members_certain_of_different_classes() -> None:
    figures = _figures(Prediction.from_outputs(1e4 * jnp.eye(4)[:, None]))
    _assert_close(figures["predictive_entropy"], np.log(4), CLOSE)
    _assert_close(figures["mutual_information"], np.log(4), CLOSE)
    assert figures["expected_entropy"].tolist() == [0]
    assert figures["disagreement"].tolist() == [0.75]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_mutual_information_of_any_size_is_accurate_in_float32(scale: float) -> None:
    logits = jnp.asarray(3 * _normal(1, 40, 6) + _normal(5, 40, 6, scale=scale), jnp.float32)
    single = _figures(Prediction.from_outputs(logits))["mutual_information"]
    with jax.enable_x64(True):
        double = _figures(Prediction.from_outputs(np.asarray(logits, np.float64)))["mutual_information"]
    np.testing.assert_allclose(single, double, rtol=1e-3)


LOST = jnp.zeros((3, 6, 4)).at[1, 5, 2].set(jnp.nan).at[2, (0, 2, 3), 1].set(jnp.inf)
TOLD = r"members 1, 2 give NaN for 4 of 6 rows \(0, 2, 3 and 1 more\)"


@pytest.mark.parametrize(
    ("read", "shown"),
    [
        (lambda: Prediction.classification(LOST), TOLD),
        (lambda: Prediction.classification(jnp.stack([LOST] * 2, -1), class_axis=1), TOLD),
        (lambda: Prediction.regression(LOST), r"member 1 gives NaN for 1 of 6 rows \(5\)"),
        (lambda: Prediction.gaussian(LOST[..., 0], LOST[..., 2]), r"member 1 gives NaN for 1 of 6 rows \(5\)"),
    ],
)
def test_members_and_rows_that_are_nan_are_told(read: Any, shown: str) -> None:
    with pytest.warns(NotANumberWarning, match=shown):
        read()
    jax.jit(Prediction.classification)(LOST)  # values are unknown during tracing


def test_masked_classes_have_no_entropy_and_no_nan_in_the_gradient() -> None:
    logits = jnp.array([[[0.0, 0.0, -jnp.inf]], [[0.0, -jnp.inf, -jnp.inf]]])

    @jax.jit
    @jax.value_and_grad
    def information(logits: jax.Array) -> jax.Array:
        return Prediction.from_outputs(logits).mutual_information.sum()

    value, gradient = information(logits)
    _assert_close(value, scipy.stats.entropy([0.75, 0.25]) - np.log(2) / 2, CLOSE)
    assert jnp.isfinite(gradient).all()
    assert Prediction.from_outputs(logits).log_mean[0, 2] == -jnp.inf


@pytest.mark.usefixtures("x64")
def test_gradient_of_entropies() -> None:
    def figures(logits: jax.Array) -> list[jax.Array]:
        prediction = Prediction.from_outputs(logits)
        return [prediction.predictive_entropy, prediction.mutual_information, prediction.variance, prediction.log_mean]

    check_grads(jax.jit(figures), (_normal(3, 2, 4),), order=1)


def test_probabilities_rounded_to_bfloat16_are_still_probabilities() -> None:
    for classes in (3, 10, 1000):
        p = jax.nn.log_softmax(jnp.asarray(_normal(2, 3, classes, scale=0.1), jnp.float32)).astype(jnp.bfloat16)
        rounded = Prediction.classification(p.astype(jnp.float32), outputs_are="log_probabilities")
        np.testing.assert_array_equal(rounded.log_probabilities, p)


def test_nan_stays_visible() -> None:
    with pytest.warns(NotANumberWarning):
        prediction = Prediction.from_outputs(jnp.zeros((3, 2, 4)).at[1, 0, 2].set(jnp.nan))
    figures = _figures(prediction)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information", "confidence"):
        assert jnp.isnan(figures[name]).tolist() == [True, False], name


def test_log_mean_where_the_mean_underflows() -> None:
    prediction = Prediction.from_outputs(jnp.array([[[0.0, 200.0]], [[0.0, 300.0]]]))
    assert prediction.mean[0, 0] == 0
    _assert_close(prediction.log_mean[0, 0], -200 - np.log(2), CLOSE)
    _assert_close(negative_log_likelihood(prediction.log_mean, [0]), 200 + np.log(2), CLOSE)


def _logits(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hypothesis.extra.numpy.arrays(np.float32, shape, elements=st.floats(-60, 60, width=32))


FEW_SHAPES = st.one_of(_logits(5, 3, 3), _logits(2, 3, 4))  # each is compiled once


@hypothesis.given(FEW_SHAPES)
def test_bounds(logits: np.ndarray) -> None:
    members, _, classes = logits.shape
    figures = {name: np.asarray(figure) for name, figure in _figures(Prediction.from_outputs(logits)).items()}
    for name, least, most in (
        ("predictive_entropy", 0, np.log(classes)),
        ("expected_entropy", 0, np.log(classes)),
        ("mutual_information", 0, np.log(min(members, classes))),
        ("disagreement", 0, 1 - 1 / min(members, classes)),
        ("variance", 0, 0.25),
        ("confidence", 1 / classes - CLOSE, 1),
        ("log_mean", -np.inf, 0),
    ):
        assert (figures[name] >= least).all() and (figures[name] <= most + CLOSE).all(), name
    assert (figures["votes"].sum(axis=-1) == members).all()
    _assert_close(figures["mean"].sum(axis=-1), 1, CLOSE)
    _assert_close(np.exp(figures["log_mean"]), figures["mean"], CLOSE)
    most_votes = np.take_along_axis(figures["votes"], figures["hard_vote"][:, None], axis=-1)
    assert (figures["votes"] <= most_votes).all()


@hypothesis.given(FEW_SHAPES, st.randoms(use_true_random=False))
def test_the_order_of_members_is_nothing(logits: np.ndarray, random: Any) -> None:
    order = random.sample(range(len(logits)), len(logits))
    one, other = _figures(Prediction.from_outputs(logits)), _figures(Prediction.from_outputs(logits[order]))
    np.testing.assert_array_equal(one["votes"], other["votes"])
    _assert_close(one["probabilities"][np.array(order)], other["probabilities"], CLOSE)
    # The square root in `std` magnifies rounding next to 0.
    for name in set(CLASS_FIGURES) - {"probabilities", "std", "soft_vote", "hard_vote"}:
        _assert_close(one[name], other[name], CLOSE, name)
    # A vote can change only among classes whose means differ by rounding.
    for vote in ("soft_vote", "hard_vote"):
        means = [np.take_along_axis(np.asarray(one["mean"]), np.asarray(f[vote])[:, None], -1) for f in (one, other)]
        _assert_close(means[0], means[1], CLOSE, vote)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (6, 2, 3, 2)])
def test_regression_figures(shape: tuple[int, ...]) -> None:
    outputs = _normal(*shape)
    prediction = Prediction.from_outputs(outputs, "regression")
    assert prediction.members == shape[0]
    _assert_close(prediction.mean, outputs.mean(axis=0), EXACT)
    _assert_close(prediction.variance, outputs.var(axis=0), EXACT)
    _assert_close(prediction.std, outputs.std(axis=0), EXACT)
    compiled = jax.jit(lambda p, q: p.quantile(q))
    for q in (0.3, 1, [0.1, 0.5], np.linspace(0, 1, 7)):
        expected = np.quantile(outputs, q, axis=0)
        _assert_close(prediction.quantile(q), expected, EXACT)
        _assert_close(compiled(prediction, q), expected, EXACT)
    lower, upper = prediction.interval(0.8)
    _assert_close(lower, np.quantile(outputs, 0.1, axis=0), EXACT)
    _assert_close(upper, np.quantile(outputs, 0.9, axis=0), EXACT)


@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.float32, (4, 3), elements=st.floats(-100, 100, width=32)),
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2),
)
def test_quantiles_are_ordered_and_within_the_members(outputs: np.ndarray, q: list[float]) -> None:
    lower, upper = Prediction.regression(outputs).quantile(sorted(q))
    rounding = 1e-4
    assert (lower <= upper + rounding).all()
    assert (lower >= outputs.min(axis=0) - rounding).all() and (upper <= outputs.max(axis=0) + rounding).all()


@pytest.mark.usefixtures("x64")
def test_gaussian_figures_are_those_of_the_mixture() -> None:
    means, log_variances = _normal(5, 3, 2), _normal(5, 2, 3, scale=1.0).reshape(5, 3, 2)
    prediction = Prediction.from_outputs((means, log_variances), "gaussian")
    second_moment = (means**2 + np.exp(log_variances)).mean(axis=0)
    _assert_close(prediction.variance, second_moment - means.mean(axis=0) ** 2, EXACT)
    _assert_close(prediction.mean, means.mean(axis=0), EXACT)
    _assert_close(prediction.aleatoric_variance, np.exp(log_variances).mean(axis=0), EXACT)
    _assert_close(prediction.epistemic_variance, means.var(axis=0), EXACT)
    _assert_close(prediction.std**2, prediction.variance, EXACT)
    stds = np.exp(log_variances / 2)
    compiled = jax.jit(lambda p, q: p.quantile(q))
    for q in (0.001, 0.3, 0.5, 0.975):
        quantiles = compiled(prediction, q)
        for place in np.ndindex(3, 2):
            member = scipy.stats.norm(means[(slice(None), *place)], stds[(slice(None), *place)])
            found = scipy.optimize.brentq(lambda x, q=q, m=member: m.cdf(x).mean() - q, -60, 60, xtol=1e-14)
            _assert_close(quantiles[place], found, 10 * EXACT)
    np.testing.assert_array_equal(prediction.interval(0.9)[0], prediction.quantile((1 - 0.9) / 2))
    np.testing.assert_array_equal(prediction.quantile([0.1, 0.9])[1], prediction.quantile(0.9))


@pytest.mark.usefixtures("x64")
def test_gaussian_quantile_of_one_member_and_at_the_ends() -> None:
    one = Prediction.gaussian(np.array([[2.0]]), np.log(np.array([[9.0]])))
    _assert_close(one.quantile([0.05, 0.975]), scipy.stats.norm(2, 3).ppf([[0.05], [0.975]]), EXACT)
    assert one.quantile([0.0, 1.0]).tolist() == [[-np.inf], [np.inf]]


@pytest.mark.usefixtures("x64")
def test_gradient_of_the_mixture_quantile() -> None:
    def quantile(means: jax.Array, log_variances: jax.Array) -> jax.Array:
        return Prediction.gaussian(means, log_variances).quantile([0.1, 0.5, 0.9])

    check_grads(jax.jit(quantile), (_normal(3, 2), _normal(3, 2, scale=0.5)), order=1)
    far_apart = (np.array([[-1e3], [1e3]]), np.zeros((2, 1)))  # nothing but a gap at the median
    gradients = jax.jit(jax.grad(lambda *pair: quantile(*pair)[1].sum(), (0, 1)))(*far_apart)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_outputs_are_not_aliased() -> None:
    outputs = np.zeros((2, 64, 64), np.float32)
    prediction = Prediction.regression(outputs)
    outputs[:] = 1
    assert not prediction.outputs.any()


def test_kinds() -> None:
    outputs = jnp.zeros((2, 3, 4))
    assert type(Prediction.from_outputs(outputs)) is ClassPrediction
    assert type(Prediction.from_outputs(outputs, task="regression")) is RegressionPrediction
    assert type(Prediction.from_outputs((outputs, outputs), task="gaussian")) is GaussianPrediction


def test_what_is_printed_of_a_prediction_is_short() -> None:
    outputs = jnp.zeros((2, 3, 4))
    shown = "log_probabilities=float32[2, 3, 4], member_classes=int32[2, 3], class_axis=-1"
    assert repr(Prediction.from_outputs(outputs)) == f"ClassPrediction({shown})"
    shown = "outputs=float32[2, 3, 4], log_variances=float32[2, 3, 4]"
    assert repr(Prediction.gaussian(outputs, outputs)) == f"GaussianPrediction({shown})"
    assert "class_axis=-1" in repr(jax.tree.map(lambda leaf: None, Prediction.from_outputs(outputs)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("rows", "classes"), [(50, 3), (200, 10), (1, 2)])
def test_scores_are_those_of_sklearn(rows: int, classes: int) -> None:
    p = scipy.special.softmax(_normal(rows, classes), axis=-1)
    labels = np.random.default_rng(0).integers(classes, size=rows)
    names, whole = list(range(classes)), cast(Any, False)
    expected = sklearn.metrics.brier_score_loss(labels, p, labels=names, scale_by_half=whole)
    _assert_close(brier_score(p, labels), expected, EXACT)
    expected = sklearn.metrics.log_loss(labels, p, labels=names)
    _assert_close(negative_log_likelihood(np.log(p), labels), expected, EXACT)


def _bins_one_by_one(p: np.ndarray, labels: np.ndarray, bins: int) -> tuple[list[int], list[float], list[float]]:
    edges = np.linspace(0, 1, bins + 1)
    top, right = p.max(axis=-1), p.argmax(axis=-1) == labels
    inside = [(top > low) & (top <= high) for low, high in itertools.pairwise(edges)]
    means = [(top[i].mean(), right[i].mean()) if i.any() else (np.nan, np.nan) for i in inside]
    return [i.sum() for i in inside], [m[0] for m in means], [m[1] for m in means]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_reliability_curve(bins: int) -> None:
    p = scipy.special.softmax(_normal(300, 4, scale=1.0), axis=-1)
    p[:4] = [[0.5, 0.5, 0, 0], [0.8, 0.2, 0, 0], [1, 0, 0, 0], [0.6, 0.2, 0.1, 0.1]]  # edges belong to the bin below
    labels = np.random.default_rng(1).integers(4, size=300)
    count, confidence, accuracy = _bins_one_by_one(p, labels, bins)
    curve = reliability_curve(p, labels, bins)
    assert curve.count.tolist() == count and curve.count.dtype == jnp.int32
    _assert_close(curve.confidence, confidence, EXACT)
    _assert_close(curve.accuracy, accuracy, EXACT)
    _assert_close(curve.edges, np.linspace(0, 1, bins + 1), EXACT)
    error = np.nansum(np.abs(np.subtract(confidence, accuracy)) * count) / 300
    _assert_close(expected_calibration_error(p, labels, bins), error, EXACT)
    compiled = jax.jit(expected_calibration_error, static_argnames="bins")(p, labels, bins=bins)
    _assert_close(compiled, error, EXACT)


def test_calibration_of_certain_answers() -> None:
    p = jnp.eye(3)
    assert expected_calibration_error(p, [0, 1, 2]) == 0 == brier_score(p, [0, 1, 2])
    assert expected_calibration_error(p, [1, 2, 0]) == 1
    assert brier_score(p, [1, 2, 0]) == 2
    assert negative_log_likelihood(jnp.log(p), [1, 2, 0]) == jnp.inf


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("score", [expected_calibration_error, brier_score, negative_log_likelihood])
def test_class_axis_of_scores(score: Any) -> None:
    p = scipy.special.softmax(_normal(2, 3, 4, 5), axis=1)
    p = np.log(p) if score is negative_log_likelihood else p
    labels = np.random.default_rng(2).integers(3, size=(2, 4, 5))
    expected = score(np.moveaxis(p, 1, -1).reshape(-1, 3), labels.reshape(-1))
    _assert_close(score(p, labels, class_axis=1), expected, EXACT)
    _assert_close(jax.jit(functools.partial(score, class_axis=-3))(p, labels), expected, EXACT)


def test_full_bins_are_summed_without_loss() -> None:
    rows = 1 << 18  # so many that a float32 running sum of 0.95 is wrong in the third digit
    p = jnp.tile(jnp.array([0.95, 0.05]), (rows, 1))
    curve = reliability_curve(p, jnp.zeros(rows, jnp.int32))
    _assert_close(curve.confidence[-1], 0.95, CLOSE)


LOGITS = jnp.zeros((2, 3, 4))
HALVES = jnp.full((3, 2), 0.5)
REFUSED = {
    "task": (lambda: Prediction.from_outputs(LOGITS, cast(Any, "ranking")), "`task` must be .* got 'ranking'"),
    "option": (
        lambda: Prediction.from_outputs(LOGITS, "classification", axis=1),
        "`axis`: no such argument; with task='classification' there are outputs_are, class_axis",
    ),
    "option of another task": (
        lambda: Prediction.from_outputs(LOGITS, "regression", class_axis=1),
        "`class_axis`: no such argument; with task='regression' there are none",
    ),
    "scale": (lambda: Prediction.from_outputs(LOGITS, outputs_are="odds"), "`outputs_are` must be .* got 'odds'"),
    "integers": (lambda: Prediction.from_outputs(LOGITS.astype(int)), r"floating-point dtype; got int32 \(2, 3, 4\)"),
    "more bits than JAX is set to": (lambda: Prediction.from_outputs(np.zeros((2, 3, 4))), "`outputs` .* float64"),
    "several outputs": (
        lambda: Prediction.from_outputs({"scores": LOGITS}),
        r"one array; got a dict of 1\..*: Prediction\.from_outputs\(ensemble\(x\)\['scores'\]\)",
    ),
    "a tuple of outputs": (
        lambda: Prediction.from_outputs((LOGITS, LOGITS), "regression"),
        r"got a tuple of 2\..*: Prediction\.from_outputs\(ensemble\(x\)\[0\]\)",
    ),
    "no members axis": (lambda: Prediction.from_outputs(LOGITS[0]), r"at least 3 axes, \[M, N, C.*got shape \(3, 4\)"),
    "no members": (lambda: Prediction.from_outputs(LOGITS[:0]), r"along its first axis; got shape \(0, 3, 4\)"),
    "class axis": (lambda: Prediction.from_outputs(LOGITS, class_axis=2), "one of 1, -1 for .* got 2"),
    "class axis that is the rows": (
        lambda: Prediction.from_outputs(LOGITS, class_axis=0),
        r"`class_axis` must be one of 1, -1 for .* without the members axis from the rows, which are axis 0; got 0",
    ),
    "class axis that is the rows, from the end": (
        lambda: brier_score(jnp.full((8, 3, 4), 1 / 3), jnp.zeros((8, 4), int), class_axis=-3),
        "`class_axis` must be one of 1, 2, -2, -1 .* got -3",
    ),
    "class axis unsaid": (
        lambda: Prediction.from_outputs(jnp.zeros((5, 8, 3, 4, 6))),
        r"`class_axis` has to be given:\s1 .* \(3 classes\), -1 .* \(6 classes\)",
    ),
    "class axis of scores unsaid": (
        lambda: brier_score(jnp.full((8, 3, 4), 1 / 3), jnp.zeros((8, 4), int)),
        r"`class_axis` has to be given:\s1 .* \(3 classes\), -1 .* \(4 classes\)",
    ),
    "a quantity": (lambda: Prediction.from_outputs(LOGITS[..., :1]), 'task="regression"'),
    "one class": (lambda: Prediction.from_outputs(LOGITS[..., :1]), "two classes; got 1 along class axis -1"),
    "logits for probabilities": (
        lambda: Prediction.from_outputs(LOGITS, outputs_are="probabilities"),
        "`outputs` must be at least 0 and sum to 1 .* sums from 0 to 0",
    ),
    "logits for their logarithms": (
        lambda: Prediction.from_outputs(LOGITS, outputs_are="log_probabilities"),
        r"`exp\(outputs\)` must .* sums from 4 to 4",
    ),
    "below 0": (
        lambda: Prediction.from_outputs(jnp.array([[[-0.5, 1.5]]]), outputs_are="probabilities"),
        "a least value of -0.5",
    ),
    "regression axes": (lambda: Prediction.regression(jnp.zeros(3)), r"at least 2 axes, \[M, N, \.\.\.\]"),
    "half a pair": (lambda: Prediction.from_outputs(LOGITS, "gaussian"), "pair"),
    "unlike pair": (lambda: Prediction.gaussian(LOGITS, LOGITS[0]), r"expected \(2, 3, 4\), got \(3, 4\)"),
    "q": (lambda: Prediction.regression(LOGITS).quantile([0.5, 95]), r"`q` must be from 0 to 1; got \[0.5, 95.0\]"),
    "q nan": (lambda: Prediction.regression(LOGITS).quantile(np.nan), "`q` must be from 0 to 1; got nan"),
    "q axes": (
        lambda: Prediction.regression(LOGITS).quantile(jnp.array([[0.5]])),
        r"one axis of numbers; got shape \(1, 1\)",
    ),
    "level": (lambda: Prediction.regression(LOGITS).interval(95), "`level` must be from 0 to 1; got 95"),
    "bins": (lambda: reliability_curve(HALVES, [0, 1, 0], 0), "`bins` must be .* got 0"),
    "labels": (lambda: brier_score(HALVES, [0, 1, 2]), "from 0 to 1; got 0 to 2"),
    "labels below 0": (lambda: brier_score(HALVES, [0, 1, -1]), "from 0 to 1; got -1 to 1"),
    "label shape": (lambda: brier_score(HALVES, [0, 1]), r"of shape \(3,\).* got int32 \(2,\)"),
    "label dtype": (lambda: brier_score(HALVES, jnp.zeros(3)), r"class numbers .* got float32 \(3,\)"),
    "no labels": (
        lambda: brier_score(jnp.zeros((1, 2, 0)), jnp.zeros((1, 0), int), class_axis=1),
        "at least one label",
    ),
    "members in a score": (lambda: brier_score(LOGITS, [0, 0, 0]), r"of shape \(2, 3\)"),
    "logits in a score": (lambda: brier_score(3 * HALVES, [0, 1, 0]), "sums from 3 to 3"),
    "probabilities in the likelihood": (lambda: negative_log_likelihood(HALVES, [0, 1, 0]), "exp.log_probabilities"),
}


@pytest.mark.thinned
@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
