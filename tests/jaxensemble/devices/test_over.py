"""Ensembles over a mesh: the same numbers as on one device, from members that stay where they are."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxensemble import Ensemble, InputError, MemberError, Plan, StateError
from tests.helpers.training import MLP

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices; the tests' settings make four CPUs")

MEMBERS = (8, 3, 10)
"""Numbers of members that four devices divide, and that they do not."""


class CNN(nnx.Module):
    """A convolution, BatchNorm, dropout and a product."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv, self.norm = nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.fc = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4 * 36, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(self.drop(nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1)))


def ensemble_of(members: int, make: Callable[..., nnx.Module] = MLP) -> Ensemble:
    return Ensemble.from_modules([make(rngs=nnx.Rngs(seed)) for seed in range(members)], mode="eval")


def mesh(*shape: int) -> Any:
    return jax.make_mesh(shape or (4,), ("members", "rows")[: max(1, len(shape))])


def x_of(rows: int = 8, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, *(shape or (3,)))).astype("float32")


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b)


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("make", [MLP, CNN])
def test_calls_are_those_of_one_device(make: Callable[..., nnx.Module], members: int) -> None:
    ensemble, x = ensemble_of(members, make), x_of(8, *((3,) if make is MLP else (6, 6, 1)))
    xs = np.stack([x + k for k in range(members)])
    spread = ensemble.over(mesh())
    assert len(spread) == members
    close(spread(x), ensemble(x))
    close(spread.each(xs), ensemble.each(xs))
    close(spread.prepare(x)(x), ensemble(x))
    close(spread.prepare(xs, each=True)(xs), ensemble.each(xs))
    close(spread.padded()(x[:5]), ensemble(x[:5]))
    close(spread.padded().each(xs[:, :5]), ensemble.each(xs[:, :5]))
    close(spread.prepare(x, pad=True)(x[:5]), ensemble(x[:5]))
    close(jax.jit(spread)(x), ensemble(x))


@pytest.mark.parametrize("plan", [Plan(), Plan(members=1), Plan(members=2, rows=3), Plan(members=1, unroll=True)])
def test_plans_count_per_device(plan: Plan) -> None:
    ensemble, x = ensemble_of(8), x_of()
    close(ensemble.over(mesh())(x, plan=plan), ensemble(x))


def test_outputs_stay_where_their_members_are() -> None:
    spread, x = ensemble_of(8).over(mesh()), x_of()
    for outputs in (spread(x), spread.prepare(x)(x), jax.jit(spread)(x)):
        assert outputs.sharding.spec == PartitionSpec("members")
        assert [shard.data.shape for shard in outputs.addressable_shards] == [(2, 8, 2)] * 4


def test_every_device_has_the_weights_of_its_members_alone() -> None:
    ensemble = ensemble_of(10)
    spread = ensemble.over(mesh())
    for leaf, whole in zip(jax.tree.leaves(spread.params), jax.tree.leaves(ensemble.params), strict=True):
        assert leaf.shape[0] == 12
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {3}
        np.testing.assert_array_equal(leaf[:10], whole)
    assert repr(spread).endswith("; over 4 devices, 3 members on each)")


@pytest.mark.parametrize("members", [4, 3])
def test_rows_over_another_axis(members: int) -> None:
    ensemble, x = ensemble_of(members), x_of(8)
    spread = ensemble.over(mesh(2, 2), rows="rows")
    xs = np.stack([x + k for k in range(members)])
    close(spread(x), ensemble(x))
    close(spread.each(xs), ensemble.each(xs))
    close(spread(x, plan=Plan(rows=2)), ensemble(x))
    close(spread.prepare(x)(x), ensemble(x))
    close(spread.padded()(x[:7]), ensemble(x[:7]))
    if members == 4:
        assert spread(x).sharding.spec == PartitionSpec("members", "rows")


def test_rows_that_do_not_divide_are_refused() -> None:
    spread = ensemble_of(4).over(mesh(2, 2), rows="rows")
    with pytest.raises(InputError, match="must divide into 2 equal parts; got 7"):
        spread(x_of(7))
    with pytest.raises(InputError, match="must divide into 2 equal parts; got 7"):
        spread.prepare(x_of(7))


def test_rows_that_the_network_mixes_are_refused() -> None:
    training = ensemble_of(4, CNN).over(mesh(2, 2), rows="rows").train()
    with pytest.raises(InputError, match="rows are over the mesh axis 'rows', but the network may mix the rows"):
        training(x_of(8, 6, 6, 1), key=jax.random.key(0))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers_are_those_of_one_device(randomness: Any) -> None:
    ensemble, x, key = ensemble_of(6, CNN).train(), x_of(8, 6, 6, 1), jax.random.key(3)
    spread = ensemble.over(mesh())
    close(spread(x, key=key, randomness=randomness), ensemble(x, key=key, randomness=randomness))
    close(spread.prepare(x, key=key, randomness=randomness)(x, key=key), ensemble(x, key=key, randomness=randomness))


@pytest.mark.parametrize("members", [8, 6])
def test_buffers_after_a_call(members: int) -> None:
    ensemble, x = ensemble_of(members, CNN).train(), x_of(8, 6, 6, 1)
    outputs, after = ensemble.over(mesh()).update(x, key=jax.random.key(0))
    wanted, wanted_after = ensemble.update(x, key=jax.random.key(0))
    close(outputs, wanted)
    close(after.over(None).buffers, wanted_after.buffers)
    close(after.eval()(x), wanted_after.eval()(x))


@pytest.mark.parametrize("members", [8, 6])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_predictions(members: int, task: Any) -> None:
    ensemble, x = ensemble_of(members), x_of()
    found, wanted = ensemble.over(mesh()).predict(x, task=task), ensemble.predict(x, task=task)
    names = ["mean", "variance", "std"]
    names += ["votes", "hard_vote", "disagreement", "mutual_information"] if task == "classification" else []
    for name in names:
        close(getattr(found, name), getattr(wanted, name))


def test_a_prediction_sends_the_sums_over_members_alone() -> None:
    spread, x = ensemble_of(8).over(mesh()), x_of()

    def figures(x: jax.Array) -> Any:
        found = spread.predict(x)
        return found.mean, found.votes, found.predictive_entropy, found.expected_entropy, found.variance

    assert spread.placement is not None
    text = jax.jit(figures).lower(spread.placement.put(jnp.asarray(x), PartitionSpec())).compile().as_text() or ""
    assert re.search(r"all-reduce(-start)?\(", text)
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


def test_a_call_sends_nothing() -> None:
    for make, shape in ((MLP, (3,)), (CNN, (6, 6, 1))):
        ensemble, x = ensemble_of(8, make), x_of(8, *shape)
        text = ensemble.over(mesh()).prepare(x).program.run.as_text() or ""
        assert not re.search(r"all-gather|all-to-all|all-reduce|collective", text)


def test_gradients_are_those_of_one_device() -> None:
    ensemble, x = ensemble_of(6), jnp.asarray(x_of())
    spread = ensemble.over(mesh())

    def loss(ensemble: Ensemble, params: Any, x: jax.Array) -> jax.Array:
        return (ensemble.with_params(params)(x) ** 2).sum()

    wanted, wanted_x = jax.grad(loss, (1, 2))(ensemble, ensemble.params, x)
    found, found_x = jax.grad(loss, (1, 2))(spread, spread.params, x)
    close(found_x, wanted_x)
    close(jax.tree.map(lambda leaf: leaf[:6], found), wanted)
    run = spread.prepare(x)
    close(jax.grad(lambda x: (run(x) ** 2).sum())(x), wanted_x)


def test_members_are_chosen_joined_and_brought_back() -> None:
    ensemble, x = ensemble_of(6), x_of()
    spread = ensemble.over(mesh())
    close(spread[1:4](x), ensemble[1:4](x))
    assert repr(spread[1:4]).endswith("; over 4 devices, 1 member on each)")
    close(spread[5](jnp.asarray(x)), ensemble[5](jnp.asarray(x)))
    close(Ensemble.concatenate([spread, spread[:2]])(x), Ensemble.concatenate([ensemble, ensemble[:2]])(x))
    back = spread.over(None)
    assert back.placement is None
    jax.tree.map(np.testing.assert_array_equal, back.params, ensemble.params)
    close(back.prepare(x)(x), ensemble(x))
    again = spread.over(mesh(2))
    assert len(again) == 6
    close(again(x), ensemble(x))
    with pytest.raises(MemberError, match="over the same axes of one mesh"):
        Ensemble.concatenate([spread, ensemble])


def test_pickles_have_no_mesh() -> None:
    ensemble, x = ensemble_of(6), x_of()
    restored = pickle.loads(pickle.dumps(ensemble.over(mesh())))
    assert restored.placement is None
    close(restored(x), ensemble(x))


def test_a_tuned_plan() -> None:
    spread, x = ensemble_of(8).over(mesh()), x_of()
    assert spread.tune(x).plan is not None
    close(spread(x, plan="auto"), spread(x))
    assert "not measured" not in spread.explain(x)


def test_wrong_meshes_are_refused() -> None:
    ensemble = ensemble_of(4)
    with pytest.raises(InputError, match=r"must be a jax\.sharding\.Mesh"):
        ensemble.over(jax.devices())  # type: ignore[arg-type]
    for names in ({"members": "m"}, {"rows": "columns"}, {"rows": "members"}):
        with pytest.raises(InputError, match="different axes of the mesh, which are members"):
            ensemble.over(mesh(), **names)


def test_inputs_of_other_members_are_refused() -> None:
    spread = ensemble_of(6).over(mesh())
    for members in (5, 8):  # eight is the number of slots, which no caller needs to know
        with pytest.raises(InputError, match=r"must be \[6, ...\]"):
            spread.each(np.ones((members, 4, 3), "float32"))


def test_arrays_that_are_elsewhere_are_refused() -> None:
    moved = jax.device_put(ensemble_of(4).over(mesh()), jax.devices()[0])
    for call in (moved, moved.prepare, moved.predict):
        with pytest.raises(StateError, match="not all of its arrays are there: move an ensemble by `over"):
            call(x_of())


def test_weights_that_a_program_has_placed_otherwise_are_put_back() -> None:
    ensemble, x = ensemble_of(8), x_of()
    spread = ensemble.over(mesh())
    assert spread.placement is not None
    shared = spread.with_params(spread.placement.put(spread.params, PartitionSpec()))
    close(shared(x), ensemble(x))
    close(shared.prepare(x)(x), ensemble(x))


def test_inputs_may_be_anywhere() -> None:
    ensemble, x = ensemble_of(8), jnp.asarray(x_of())
    spread = ensemble.over(mesh())
    explicit = jax.make_mesh((4,), ("rows",))
    places = [jax.devices()[2], NamedSharding(explicit, PartitionSpec("rows")), NamedSharding(mesh(), PartitionSpec())]
    run = spread.prepare(x)
    for place in places:
        moved = jax.device_put(x, place)
        close(spread(moved), ensemble(x))
        close(run(moved), ensemble(x))


def test_an_ensemble_is_an_argument_of_compiled_functions() -> None:
    ensemble, x = ensemble_of(6), x_of()
    spread = ensemble.over(mesh())
    close(jax.jit(lambda ensemble, x: ensemble(x))(spread, x), ensemble(x))
    copied = jax.tree.map(lambda leaf: leaf.copy(), spread)
    close(copied(x), ensemble(x))
    close(copy.deepcopy(spread)(x), ensemble(x))
    close([module(jnp.asarray(x)) for module in spread], list(ensemble(x)))


def test_a_mesh_that_is_set_is_told_of() -> None:
    spread, x = ensemble_of(6).over(mesh()), x_of()
    with jax.set_mesh(mesh()), pytest.raises(InputError, match="call the ensemble outside that block"):
        spread(x)
