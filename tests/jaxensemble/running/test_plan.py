"""Plans: all give the same results; guesses fit memory; measurements are remembered."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, Plan
from jaxensemble.running import compilers, tuning
from jaxensemble.running.compilers import has_compiler
from jaxensemble.running.plan import Demand, candidate_plans, fit_plan, guess_plan
from jaxensemble.running.workload import adapt_plan

TRACES: list[Any] = []


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        TRACES.append(x.shape)
        x = self.dropout(nnx.relu(self.norm(self.conv2(self.conv1(x)))))
        return {
            "features": jnp.moveaxis(x, 0, 1),
            "logits": self.fc(x.mean((1, 2))),
            "scale": jnp.asarray(self.norm.scale),
        }


M, N = 5, 7
ENSEMBLE = Ensemble.from_modules([Net(nnx.Rngs(seed)) for seed in range(M)], mode="eval")
X = np.random.default_rng(0).normal(size=(N, 6, 5, 3)).astype(np.float32)
XS = np.stack([X * (k + 1) for k in range(M)])
PLANS = {
    "one member": Plan(members=1),
    "more than there are": Plan(members=9, rows=99),
    "rows of one": Plan(members=1, rows=2),
    "rows of two": Plan(members=2, rows=4),
    "unrolled": Plan(members=2, rows=4, unroll=True),
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXENSEMBLE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_MEMORY", {})
    return tmp_path / "plans"


def _entry(cache: Path) -> dict[str, Any]:
    (file,) = cache.iterdir()
    return json.loads(file.read_text())


def _close(actual: Any, expected: Any, tolerance: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.thinned
@pytest.mark.parametrize("name", PLANS)
def test_outputs_and_gradients_are_the_same_in_float64(name: str) -> None:
    plan = PLANS[name]
    with jax.enable_x64(True):
        ensemble, x, xs = ENSEMBLE.astype("float64"), X.astype(np.float64), XS.astype(np.float64)
        _close(ensemble(x, plan=plan), ensemble(x, plan=Plan()), 1e-13)
        _close(ensemble.each(xs, plan=plan), ensemble.each(xs, plan=Plan()), 1e-13)

        def loss(ensemble: Ensemble, x: jax.Array, plan: Plan) -> jax.Array:
            outputs = ensemble(x, plan=plan)
            return (outputs["logits"] ** 2).sum() + (outputs["features"] ** 3).sum()

        differentiated = jax.grad(loss, (0, 1), allow_int=True)
        (found, dx), (expected, expected_dx) = (differentiated(ensemble, jnp.asarray(x), p) for p in (plan, Plan()))
        _close((found.params, dx), (expected.params, expected_dx), 1e-11)


@pytest.mark.thinned
@pytest.mark.parametrize("plan", [Plan(members=1), Plan(members=2), Plan(members=3, unroll=True)], ids=repr)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_numbers_do_not_depend_on_the_plan(plan: Plan, randomness: Any) -> None:
    training, key = ENSEMBLE.train(), jax.random.key(0)
    _close(
        training(X, key=key, randomness=randomness, plan=plan),
        training(X, key=key, randomness=randomness, plan=Plan()),
        1e-5,
    )


def test_buffers_after_a_call_are_the_same() -> None:
    key = jax.random.key(0)
    expected = ENSEMBLE.train().update(X, key=key)
    for plan in (Plan(members=2), Plan(members=1)):
        outputs, after = dataclasses.replace(ENSEMBLE.train(), plan=plan).update(X, key=key)
        _close((outputs, after.buffers), (expected[0], expected[1].buffers), 1e-5)


def test_rows_that_a_network_mixes_are_not_taken_apart() -> None:
    with pytest.raises(InputError, match=r"`plan` has rows=2, but the network may mix the rows of a minibatch \("):
        ENSEMBLE.train()(X, key=jax.random.key(0), plan=Plan(rows=2))
    ENSEMBLE.train()(X, key=jax.random.key(0))  # a guess leaves them together
    tuned = ENSEMBLE.train().tune(X, key=jax.random.key(0))
    assert tuned.plan is not None and tuned.plan.rows is None


def test_a_size_that_does_not_divide_compiles_once() -> None:
    ensemble, plan = jax.tree.map(jnp.copy, ENSEMBLE), Plan(members=2, rows=3)
    ensemble(X, plan=plan)
    TRACES.clear()
    for k in range(3):
        ensemble(X + k, plan=plan)
    assert not TRACES
    with pytest.raises(AssertionError):  # another number of rows is another program
        ensemble(X[:5], plan=plan)
        assert not TRACES


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"members": 0, "rows": -1}, "got members=0, rows=-1"),
        ({"rows": 2.0}, "got rows=2.0"),
        ({"members": True}, "got members=True"),
        ({"unroll": 1}, "got unroll=1"),
    ],
)
def test_plans_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        Plan(**options)


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(InputError, match=r"`plan` must be .* got .fast."):
        ENSEMBLE(X, plan="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got \{'members': 1\}"):
        ENSEMBLE(X, plan={"members": 1})  # type: ignore[arg-type]


CNN = Demand("cpu", members=10, rows=64, peak=64 * 300_000, step=64 * 400_000, convolutions=True)
MLP = Demand("cpu", members=10, rows=64, peak=64 * 2_000, step=64 * 2_000, convolutions=False)


def test_guesses_run_one_member_after_another_where_products_of_all_are_slow() -> None:
    eigen = "eigen" if has_compiler("eigen", "cpu") else None
    guess = lambda demand, **changes: guess_plan(dataclasses.replace(demand, **changes), 1e12)  # noqa: E731
    written_out = Plan(members=1, unroll=True, compiler=eigen)
    for few in (CNN, MLP, dataclasses.replace(CNN, grouped=True), dataclasses.replace(CNN, rows=None)):
        assert guess(few) == written_out
    assert guess(CNN, members=11) == Plan(members=1, compiler=eigen)
    assert guess(CNN, members=11, grouped=True) == guess(MLP, members=11) == guess(MLP, rows=8) == Plan(compiler=eigen)
    assert guess(CNN, platform="gpu") == guess(MLP, platform="gpu") == Plan()


@pytest.mark.parametrize("free", [1e12, 1e9, 2e8, 5e7, 1e6])
@pytest.mark.parametrize("members", [1, 3, 1000])
def test_plans_fit_into_memory(free: float, members: int) -> None:
    demand = Demand("gpu", members=members, rows=64, peak=64 * 300_000, step=64 * 400_000, convolutions=True)
    plan = fit_plan(Plan(), demand, free)
    assert demand.held_bytes(plan) <= free / 2 or (plan.members, plan.rows) == (1, 1)
    larger = [Plan(members=(plan.members or members) + 1), Plan(members=1, rows=(plan.rows or 64) + 1)]
    assert plan == Plan() or any(demand.held_bytes(more) > free / 2 for more in larger), "smaller than need be"
    whole = fit_plan(Plan(), dataclasses.replace(demand, rows=None), free)
    assert whole.rows is None
    for candidate in candidate_plans(demand, free):
        assert demand.held_bytes(candidate) <= free / 2 or candidate == guess_plan(demand, free)


def test_an_ensemble_that_does_not_fit_runs_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxensemble.running.workload.free_memory", lambda device: 40_000.0)
    monkeypatch.setattr("jaxensemble.running.workload.SMALL", 0)
    adapt_plan.cache_clear()
    ensemble = jax.tree.map(jnp.copy, ENSEMBLE)
    assert ensemble.explain(X[:6]).startswith("Plan(members=1, rows=")
    _close(ensemble(X[:6]), ENSEMBLE(X[:6], plan=Plan()), 1e-5)
    adapt_plan.cache_clear()


def test_settings_of_a_compiler_that_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ensemble that was tuned on one device may be moved to another."""
    monkeypatch.setattr(compilers, "COMPILERS", {**compilers.COMPILERS, "gpu": {"other": {}}})
    plan = Plan(members=2, compiler="other")
    moved = dataclasses.replace(ENSEMBLE, plan=plan)
    assert moved.explain(X).startswith("Plan(members=2), the ensemble's own plan")
    _close(moved(X), ENSEMBLE(X, plan=Plan(members=2)), 1e-6)
    with pytest.raises(InputError, match="`compiler` of a plan is 'other'"):
        ENSEMBLE(X, plan=plan)


def test_tuning_measures_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = ENSEMBLE.tune(X)
    assert isinstance(tuned.plan, Plan)
    assert tuned.explain(X).startswith(f"{tuned.plan!r}, the ensemble's own plan\nmeasured: {tuned.plan!r}")
    assert ENSEMBLE.plan is None
    entry = _entry(empty_cache)
    assert Plan(**entry["plan"]) == tuned.plan and len(entry["seconds"]) > 2
    monkeypatch.setattr(tuning, "_measure_plans", lambda *_: pytest.fail("measured again"))
    assert ENSEMBLE.tune(X).plan == tuned.plan
    monkeypatch.setattr(tuning, "_MEMORY", {})  # like another process
    assert ENSEMBLE.tune(X).plan == tuned.plan
    _close(ENSEMBLE(X, plan="auto"), ENSEMBLE(X, plan=Plan()), 1e-5)
    jax.jit(lambda ensemble, x: ensemble(x, plan="auto"))(ENSEMBLE, X[:3])  # where nothing can be measured


def test_tuning_is_remembered_by_other_processes(empty_cache: Path) -> None:
    code = textwrap.dedent("""
        from flax import nnx
        import jax.numpy as jnp
        from jaxensemble import Ensemble
        from jaxensemble.running import compilers, tuning
        def run(*_):
            raise AssertionError("measured")
        if __import__("sys").argv[1] == "again":
            tuning._measure_plans = run
        ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(3)])
        print(ensemble.tune(jnp.ones((4, 3))).plan)
    """)
    plans = [
        subprocess.run(
            [sys.executable, "-c", code, which], capture_output=True, text=True, check=True, env=dict(os.environ)
        ).stdout
        for which in ("first", "again")
    ]
    assert plans[0] == plans[1] and plans[0].startswith("Plan(")


@pytest.mark.thinned
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 200_000,
        '{"a": 1}',
        '{"plan": {"members": 0}, "seconds": []}',
        '{"plan": {}, "seconds": []}',
        '{"plan": {}, "seconds": [[{}, NaN]]}',
        '{"plan": {}, "seconds": [[{}, %s]]}' % (10**400),
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_cache_is_written_anew(content: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ENSEMBLE.tune(X[:2])
    (file,) = empty_cache.iterdir()
    file.write_text(content)
    monkeypatch.setattr(tuning, "_MEMORY", {})
    tuned = ENSEMBLE.tune(X[:2])
    assert Plan(**_entry(empty_cache)["plan"]) == tuned.plan


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXENSEMBLE_CACHE", str(tmp_path / "file" / "folder"))
    plan = ENSEMBLE.tune(X[:2]).plan
    monkeypatch.setattr(tuning, "_measure_plans", lambda *_: pytest.fail("measured again"))
    assert ENSEMBLE.tune(X[:2]).plan == plan
    tuning._MEMORY.clear()


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_machine_without_a_home_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("JAXENSEMBLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    assert "not measured" in ENSEMBLE.explain(X[:2])
    assert ENSEMBLE.tune(X[:2]).plan is not None


class Clips(nnx.Module):
    """Outputs without one row for each input row: frames in, clips out; or pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = self.conv(x)
        return y.mean((1, 2)).reshape(-1, 2, 4).mean(1), y.reshape(-1, 4)


def test_outputs_of_other_sizes_are_not_taken_apart() -> None:
    ensemble = Ensemble.from_modules([Clips(nnx.Rngs(seed)) for seed in range(2)])
    x = np.random.default_rng(0).normal(size=(8, 400, 200, 3)).astype(np.float32)
    assert "rows" not in ensemble.explain(x).splitlines()[0].partition(",")[0]
    _close(ensemble(x), ensemble(x, plan=Plan()), 1e-5)
    with pytest.raises(InputError, match="an output has another number of rows than the minibatch"):
        ensemble(x, plan=Plan(rows=4))


def test_small_inputs_run_without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxensemble.running.workload.guess_plan", lambda *_: Plan(members=1, rows=1))
    assert next(iter(_called(X[:1])._runner.calls.values())).plan == Plan()


def _called(x: np.ndarray) -> Ensemble:
    adapt_plan.cache_clear()
    ensemble = jax.tree.map(jnp.copy, ENSEMBLE)
    ensemble(x)
    return ensemble


def test_guesses_are_taken_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxensemble.running.workload.SMALL", 0)
    monkeypatch.setattr("jaxensemble.running.workload.guess_plan", lambda *_: Plan(members=2, rows=3))
    assert next(iter(_called(X)._runner.calls.values())).plan == Plan(members=2, rows=3)
    adapt_plan.cache_clear()


def test_new_values_are_no_new_case() -> None:
    ensemble = jax.tree.map(jnp.copy, ENSEMBLE)
    ensemble(X[:4])
    TRACES.clear()
    for _ in range(3):
        ensemble = jax.tree.map(lambda leaf: leaf + 0 if leaf.dtype == jnp.float32 else leaf, ensemble)
        ensemble(X[:4])
    assert not TRACES


def test_an_ensembles_own_plan_gives_way_in_training() -> None:
    tuned, key = dataclasses.replace(ENSEMBLE, plan=Plan(members=2, rows=2)), jax.random.key(0)
    _close(tuned.train().update(X, key=key)[0], ENSEMBLE.train().update(X, key=key)[0], 1e-5)


def test_nothing_is_measured_while_tracing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = jax.tree.map(jnp.copy, ENSEMBLE)
    with pytest.raises(InputError, match="nothing can be measured within"):
        jax.jit(lambda x: ensemble.tune(x)(x))(X)
    jax.jit(lambda x: ensemble(x, plan="auto"))(jnp.asarray(X))
    assert not empty_cache.exists()
    ensemble(X, plan="auto")
    assert empty_cache.exists(), "the guess made while tracing is not taken for a measurement"


def test_updates_and_predictions_take_a_plan():
    ensemble = Ensemble.from_modules([nnx.BatchNorm(3, rngs=nnx.Rngs(seed)) for seed in range(3)], mode="train")
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("f")
    (outputs, after), (others, same) = (ensemble.update(x, plan=plan) for plan in (Plan(), Plan(members=1)))
    np.testing.assert_allclose(outputs, others, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.buffers, same.buffers)
    with pytest.raises(InputError, match="may mix the rows"):
        ensemble.update(x, plan=Plan(rows=2))
    trained = after.eval()
    np.testing.assert_allclose(
        trained.predict(x, plan=Plan(members=1, rows=3)).mean, trained.predict(x, plan=Plan()).mean, atol=1e-6
    )
