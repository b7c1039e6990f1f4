"""`train_step`: plans, rows, numbers of each member's own, and wrong arguments."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, Plan, TrainState, train_step
from jaxensemble.programs.forms import use_forms
from jaxensemble.programs.rewrite import primitives
from jaxensemble.training import planning
from jaxensemble.training.data import as_data
from jaxensemble.training.losses import check_is_mean
from jaxensemble.training.members import MemberUpdate
from tests.helpers.training import MLP, close, cross_entropy, data, mean_square, state_of

# Compared with PyTorch.


class Weight(nnx.Module):
    """A module with parameters of any dtype, whatever the inputs' dtype."""

    def __init__(self, dtype: Any):
        self.weight = nnx.Param(jnp.ones(3, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.weight[...]


def test_integers_are_not_trained() -> None:
    with pytest.raises(InputError, match="only real and complex numbers can be trained; freeze weight"):
        state_of(Ensemble.from_modules([Weight(jnp.int32)]))


@pytest.mark.parametrize("optimizer", [optax.sgd(0.2), optax.contrib.split_real_and_imaginary(optax.adam(0.2))])
@pytest.mark.parametrize("plan", [None, Plan(rows=2)], ids=str)
def test_complex_parameters_descend(optimizer: Any, plan: Plan | None) -> None:
    state, x = state_of(Ensemble.from_modules([Weight(jnp.complex64)]), optimizer), np.ones((4, 3), "float32")

    def distance(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(jnp.abs(outputs - targets) ** 2, 1))

    for _ in range(40):
        state, _ = train_step(state, x, (2 - 3j) * x, loss=distance, plan=plan)
    np.testing.assert_allclose(state.ensemble.params["weight"][0], np.full(3, 2 - 3j), atol=0.5)


def test_the_optimizer_of_complex_parameters_leaves_idle_ones_alone() -> None:
    class Idle(Weight):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * jax.lax.stop_gradient(self.weight[...])

    class Both(nnx.Module):
        def __init__(self) -> None:
            self.used, self.idle = Weight(jnp.complex64), Idle(jnp.complex64)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.abs(self.idle(self.used(x)))

    optimizer = optax.contrib.split_real_and_imaginary(optax.adamw(0.1, weight_decay=0.1))
    state, x = state_of(Ensemble.from_modules([Both()]), optimizer), np.ones((4, 3), "float32")
    state, _ = train_step(state, x, x, loss=lambda outputs, targets: jnp.mean(outputs))
    np.testing.assert_array_equal(state.ensemble.params["idle"]["weight"], np.ones((1, 3)))
    (moments, *_), *_ = state.opt_state
    assert moments.nu["used"]["weight"].real.any() and not moments.nu["idle"]["weight"].real.any()


# Compared with a loop over members.


def alone(ensemble: Ensemble, k: int, optimizer: Any, x: Any, y: Any, count: int) -> Any:
    module = ensemble[k]
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    state = optimizer.init(params)
    for _ in range(count):

        def loss(params: Any) -> jax.Array:
            return mean_square(nnx.merge(graphdef, params, rest)(x), y)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params: Any = optax.apply_updates(params, updates)
    return nnx.to_pure_dict(params)


def test_members_train_as_they_would_alone(mlp: Ensemble) -> None:
    x, y = data()
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))  # a norm of each member's own
    state, losses = state_of(mlp, optimizer), np.zeros(0)
    for _ in range(5):
        state, losses = train_step(state, x, y, loss=mean_square)
    assert losses.shape == (3,) and int(state.steps) == 5
    for k in range(3):
        expected = alone(mlp, k, optimizer, x, y, 5)
        close(jax.tree.map(lambda leaf, k=k: leaf[k], state.ensemble.params), expected)


@pytest.mark.thinned
@pytest.mark.parametrize(
    "plan",
    [
        Plan(members=1),
        Plan(members=2),
        Plan(members=2, unroll=True),
        Plan(rows=4),
        Plan(rows=5),
        Plan(members=1, rows=3, remat=True),
        Plan(rows=20),
    ],
)
def test_every_plan_gives_the_same(mlp: Ensemble, plan: Plan) -> None:
    x, y = data()
    expected, losses = train_step(state_of(mlp), x, y, loss=mean_square)
    got, same = train_step(state_of(mlp), x, y, loss=mean_square, plan=plan)
    close((got.ensemble.params, got.opt_state, same), (expected.ensemble.params, expected.opt_state, losses))


def test_rows_may_be_taken_by_index_and_members_have_their_own(mlp: Ensemble) -> None:
    x, y = data()
    rows = np.array([[0, 1, 2, 3], [3, 3, 5, 6], [8, 9, 10, 11]])
    shared, _ = train_step(state_of(mlp), x, y, loss=mean_square, rows=rows[0])
    expected, _ = train_step(state_of(mlp), x[:4], y[:4], loss=mean_square)
    close(shared.ensemble.params, expected.ensemble.params)
    own, losses = train_step(state_of(mlp), x, y, loss=mean_square, rows=rows, plan=Plan(members=2, rows=2))
    each, same = train_step(state_of(mlp), x[rows], y[rows], loss=mean_square, each=True)
    close((own.ensemble.params, losses), (each.ensemble.params, same))
    both, _ = train_step(
        state_of(mlp),
        np.stack([x] * 3),
        np.stack([y] * 3),
        loss=mean_square,
        each=True,
        rows=rows,
        plan=Plan(members=1),
    )
    close(both.ensemble.params, each.ensemble.params)


def test_members_may_have_rates_of_their_own(mlp: Ensemble) -> None:
    x, y = data()
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0)
    rates, decays = [0.01, 0.1, 0.0], [0.0, 0.1, 0.0]
    state = state_of(mlp, optimizer, hyperparams={"learning_rate": rates, "weight_decay": decays})
    for _ in range(3):
        state, _ = train_step(state, x, y, loss=mean_square, plan=Plan(members=2))
    for k in range(3):
        expected = alone(mlp, k, optax.adamw(rates[k], weight_decay=decays[k]), x, y, 3)
        close(jax.tree.map(lambda leaf, k=k: leaf[k], state.ensemble.params), expected, 1e-5)
    close(jax.tree.map(lambda leaf: leaf[2], state.ensemble.params), jax.tree.map(lambda leaf: leaf[2], mlp.params))


def test_dropout_has_the_rate_of_its_member() -> None:
    class Dropping(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Dropout(0.5, rngs=rngs)])
            self.same = self.layers[0]  # held twice
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.scale * self.same(x)

    ensemble = Ensemble.from_modules([Dropping(nnx.Rngs(seed)) for seed in range(4)], mode="as_is")
    x = np.ones((4000, 1), "float32")
    rates = [0.0, 0.25, 0.9, 1.0]

    def kept(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean(outputs != 0) + 0 * outputs.sum()

    def total(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return outputs.mean()

    state = state_of(ensemble, dropout=rates)
    _, shares = train_step(state, x, x, loss=kept)
    np.testing.assert_allclose(shares, 1 - np.array(rates), atol=0.03)
    after, means = train_step(state, x, x, loss=total)
    np.testing.assert_allclose(means, [1, 1, 1, 0], atol=0.15)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after.ensemble.params))
    assert jax.tree.structure(after.ensemble) == jax.tree.structure(ensemble)
    _, again = train_step(after, x, x, loss=kept)
    assert (again != shares)[1:3].all()  # other numbers at every step


def test_members_draw_different_numbers_or_the_same() -> None:
    ensemble = Ensemble.from_modules([MLP(0.5, rngs=nnx.Rngs(0)) for _ in range(3)], mode="as_is")
    x, y = data()
    for randomness, alike in (("different", False), ("same", True)):
        state = TrainState.create(ensemble, optax.sgd(0.1), jax.random.key(0), randomness=randomness)  # type: ignore[arg-type]
        _, losses = train_step(state, x, y, loss=mean_square)
        assert (len(set(losses.tolist())) == 1) == alike
    keys = jax.random.split(jax.random.key(1), 3)
    state = TrainState.create(ensemble, optax.sgd(0.1), keys)
    _, all_three = train_step(state, x, y, loss=mean_square)
    _, last = train_step(TrainState.create(ensemble[2:], optax.sgd(0.1), keys[2:]), x, y, loss=mean_square)
    close(last[0], all_three[2])


def test_accumulating_gradients_draws_anew_for_every_few_rows() -> None:
    ensemble = Ensemble.from_modules([MLP(0.5, rngs=nnx.Rngs(0)) for _ in range(2)], mode="as_is")
    x, y = np.ones((64, 3), "float32"), np.zeros((64, 2), "float32")
    state = state_of(ensemble)
    _, whole = train_step(state, x, y, loss=mean_square)
    _, parts = train_step(state, x, y, loss=mean_square, plan=Plan(rows=1))
    np.testing.assert_allclose(parts, whole, rtol=0.5)
    _, one = train_step(state, x[:1], y[:1], loss=mean_square)
    assert (abs(parts - one) > 1e-4).all()


WEIGHTS = jnp.array([1.0, 3.0])


def weighted(logits: Any, labels: Any) -> Any:
    weights = WEIGHTS[labels]
    return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, labels)).sum() / weights.sum()


def masked(logits: Any, labels: Any) -> Any:
    kept = labels != 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(kept, losses, 0).sum() / jnp.maximum(kept.sum(), 1)


@pytest.mark.thinned
@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_are_not_added_up_of_losses_that_are_no_plain_mean(mlp: Ensemble, rows: int) -> None:
    x, y = data()
    labels, state = (y[:, 0] > 0).astype("int32"), state_of(mlp)
    for loss in (weighted, masked):
        train_step(state, x, labels, loss=loss)
        with pytest.raises(InputError, match=rf"rows={rows}, but {loss.__name__} is not the plain mean over the rows"):
            train_step(state, x, labels, loss=loss, plan=Plan(rows=rows))
    with pytest.raises(InputError, match=r"(?s)is not the plain mean.*leave `rows` out"):
        train_step(state, x, y, loss=lambda a, b: jnp.sum((a - b) ** 2), plan=Plan(rows=rows))
    whole, _ = train_step(state, x, labels, loss=cross_entropy)
    parts, _ = train_step(state, x, labels, loss=cross_entropy, plan=Plan(rows=rows))
    close(parts.ensemble.params, whole.ensemble.params)
    within = jax.jit(lambda state: train_step(state, x, labels, loss=cross_entropy, plan=Plan(rows=rows))[0])(state)
    close(within.ensemble.params, whole.ensemble.params)


def test_a_step_of_known_arrays_within_jit(mlp: Ensemble) -> None:
    """Only a program that is no part of another one can have settings of XLA's compiler."""
    state = state_of(mlp)
    step = lambda: train_step(state, *data(), loss=mean_square, plan=Plan(compiler="eigen"))[1]  # noqa: E731
    np.testing.assert_allclose(jax.jit(lambda by: by * step())(1.0), step(), rtol=1e-5)


CLASSES = jnp.array([1.0, 1.0, 1.0, 5.0])
entropy = optax.softmax_cross_entropy_with_integer_labels
NO_MEANS: dict[str, Any] = {
    "padding of -100": (lambda a, b: (entropy(a, b) * (b != -100)).sum() / jnp.maximum((b != -100).sum(), 1), "int32"),
    "padding of 3": (lambda a, b: (entropy(a, b) * (b != 3)).sum() / jnp.maximum((b != 3).sum(), 1), "int32"),
    "a rare class": (lambda a, b: (CLASSES[b] * entropy(a, b)).sum() / CLASSES[b].sum(), "int32"),
    "a mask": (lambda a, b: (jnp.abs(a[:, 0]) * b).sum() / b.sum(), "float32"),
    "root mean square": (lambda a, b: jnp.sqrt(jnp.mean((a[:, 0] - b) ** 2)), "float32"),
    "small": (lambda a, b: 1e-9 * jnp.sum((a[:, 0] - b) ** 2), "float32"),
    "Dice": (lambda a, b: 1 - 2 * (a[:, 0] * b).sum() / (a[:, 0] + b).sum(), "float32"),
}
MEANS: dict[str, Any] = {
    "cross entropy": (lambda a, b: entropy(a, b).mean(), "int32"),
    "squares": (lambda a, b: jnp.mean((a[:, 0] - b) ** 2), "float32"),
    "a mask of rows": (lambda a, b: jnp.mean((a * (b[:, None] > 0)).sum(1) / (1 + (b > 0))), "int32"),
    "logarithms": (lambda a, b: -jnp.log(a[:, 0]).mean(), "float32"),
    "logarithms of what is negative": (lambda a, b: -jnp.log(-a[:, 0]).mean(), "float32"),
}


@pytest.mark.thinned
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("case", [*NO_MEANS, *MEANS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_is_known_for_a_plain_mean(case: str, rows: int, dtype: str) -> None:
    function, kind = (NO_MEANS | MEANS)[case]
    outputs, targets = jax.ShapeDtypeStruct((rows, 4), dtype), jax.ShapeDtypeStruct((rows,), kind)
    with contextlib.nullcontext() if case in MEANS else pytest.raises(InputError, match="is not the plain mean"):
        check_is_mean(function, outputs, targets, (0, 0), rows, f"`plan` has rows={rows}")


def test_outputs_without_rows_are_known_too() -> None:
    outputs, targets = jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((4,), "float32")
    check_is_mean(lambda norm, targets: norm + targets.mean(), outputs, targets, (None, 0), 4, "`plan` has rows=4")


def test_rematerialising_takes_less_memory() -> None:
    class Deep(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(6)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = jnp.sin(nnx.gelu(nnx.softplus(layer(x))) ** 2) * jnp.cos(x)
            return x

    ensemble = Ensemble.from_modules([Deep(nnx.Rngs(seed)) for seed in range(2)])
    x = np.ones((512, 16), "float32")
    state = state_of(ensemble)

    def kept(plan: Plan) -> int:
        """The bytes that the forward pass leaves for the backward pass."""
        arrays, _ = as_data(ensemble, x, x)
        step = planning.make_step(state, arrays, None, mean_square, each=False, plan=plan)
        members = MemberUpdate(step, state.optimizer, {}, state.steps, (None, None), 2)
        losses = lambda params: members.losses(params, {}, {}, state.keys, arrays)[0]  # noqa: E731
        _, backward = jax.vjp(losses, ensemble.params)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))

    assert kept(Plan(remat=True)) < 0.5 * kept(Plan())


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 6, 3)])  # the second is not split into whole windows
def test_maxima_and_their_gradients_are_xlas(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 3, shape).astype("float32")  # with many equal values
    x[0, 0, 1, 0], x[1, 1, 0, 1], x[1, 0, 0, 2] = np.nan, np.nan, -np.inf
    pooled = lambda x: nnx.max_pool(x, (2, 2), (2, 2))  # noqa: E731
    ours = use_forms(pooled, "cpu", "loss")
    np.testing.assert_array_equal(ours(x), pooled(x))
    x = np.nan_to_num(x)
    weights = np.random.default_rng(1).normal(size=pooled(x).shape)
    gradients = [jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (ours, pooled)]
    np.testing.assert_array_equal(*gradients)
    assert ("reduce_window_max" in primitives(ours, x)) == (shape[1] == 5)


def test_what_does_not_fit_into_memory_trains_in_steps(mlp: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(400)
    arrays, _ = as_data(mlp, x, y)
    roomy = planning.make_step(state_of(mlp), arrays, None, mean_square, each=False, plan=None)
    assert roomy.call.plan == Plan()
    monkeypatch.setattr("jaxensemble.running.workload.free_memory", lambda device: 1e5)
    planning._choose_plan.cache_clear()
    tight = planning.make_step(state_of(mlp), arrays, None, mean_square, each=False, plan=None)
    assert tight.call.plan.members == 1
    planning._choose_plan.cache_clear()


def test_repeated_steps_compile_once(mlp: Ensemble) -> None:
    x, y = data(13)
    state = state_of(mlp)
    traced = []

    def counted(outputs: Any, targets: Any) -> jax.Array:
        traced.append(outputs)
        return mean_square(outputs, targets)

    counts = []
    for _ in range(4):
        state, _ = train_step(state, x, y, loss=counted)
        counts.append(len(traced))
    assert counts[0] > 0 and set(counts) == {counts[0]}


def test_a_state_is_a_pytree_and_says_what_it_is(mlp: Ensemble) -> None:
    state = state_of(mlp, frozen=["fc1"])
    assert repr(state) == "TrainState(3 x MLP, 18 of 50 parameters trained, 0 steps)"
    assert repr(jax.tree.map(lambda leaf: None, state)) == "TrainState(MLP)"
    close(jax.tree.map(lambda leaf: leaf, state).ensemble.params, mlp.params)


WRONG: list[tuple[Any, str]] = [
    ({"frozen": ["fc3"]}, r"`frozen` names 'fc3'; the parameters are fc1.bias"),
    ({"frozen": "fc1"}, r"must hold names; got one"),
    ({"frozen": ["fc1", "fc2"]}, r"there is nothing to train"),
    ({"hyperparams": {"learning_rate": [1, 2, 3]}}, r"no part of the optimizer's state has"),
    ({"dropout": [0.1, 0.2]}, r"`dropout` must be probabilities, one for all or \[3\]"),
    ({"dropout": 1.5}, r"`dropout` must be probabilities"),
    ({"randomness": "none"}, r"`randomness` must be 'different' or 'same'"),
]


@pytest.mark.thinned
@pytest.mark.parametrize(("options", "message"), WRONG)
def test_states_that_cannot_be_are_refused(mlp: Ensemble, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        state_of(mlp, **options)


# fit
