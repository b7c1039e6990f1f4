"""Prepared programs and the programs that calls hold: the outputs of the traced call, and nothing silent."""

import concurrent.futures
import copy
import gc
import pickle
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

from jaxensemble import Ensemble, InputError, Plan, StateError
from jaxensemble.running.compiled import compile_call


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.norm.mean[...], self.norm.var[...] = jnp.arange(4) / 8, jnp.arange(1, 5) / 2
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, Any]:
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return {"pair": (x, self.head(x.mean((1, 2)))), "kernel": self.head.kernel[...]}


class Scaled(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array, by: jax.Array) -> jax.Array:
        return nnx.relu(self.linear(x)) * by


class Foreign:
    """An array of a library that JAX does not know."""

    def __init__(self, array: Any) -> None:
        self._array = np.asarray(array)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.array(self._array)


M, N = 3, 5
X = jax.random.normal(jax.random.key(0), (N, 6, 6, 3))
PLANS = [Plan(), Plan(members=1), Plan(members=2, rows=2), Plan(members=1, rows=2, unroll=True)]


def make_ensemble(module: type[nnx.Module] = Net, mode: Any = "eval") -> Ensemble:
    return Ensemble.from_modules([module(nnx.Rngs(seed)) for seed in range(M)], mode=mode)  # type: ignore[call-arg]


def assert_close(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), one, other)


ENSEMBLE = make_ensemble()
SCALED = make_ensemble(Scaled)


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_outputs_are_those_of_the_traced_call(plan: Plan) -> None:
    expected = jax.jit(lambda ensemble, x: ensemble(x, plan=plan))(ENSEMBLE, X)
    assert_close(ENSEMBLE(X, plan=plan), expected)
    assert_close(ENSEMBLE.prepare(X, plan=plan)(X), expected)
    assert_close(ENSEMBLE.prepare(X, plan=plan, fold=False)(X), expected)
    each = jnp.stack([X * k for k in range(M)])
    expected = jax.jit(lambda ensemble, x: ensemble.each(x, plan=plan))(ENSEMBLE, each)
    assert_close(ENSEMBLE.prepare(each, each=True, plan=plan)(each), expected)
    assert_close(ENSEMBLE.each(each, plan=plan), expected)


def test_keys_are_those_of_the_call() -> None:
    training, key = make_ensemble(mode="train"), jax.random.key(7)
    for randomness in ("different", "same"):
        run = training.prepare(X, key=jax.random.key(0), randomness=randomness)
        assert_close(run(X, key=key), training(X, key=key, randomness=randomness))
    for wrong in (None, jax.random.key(7, impl="rbg")):
        with pytest.raises(InputError, match="pass such a key"):
            run(X, key=wrong)
    with pytest.raises(InputError, match="without a key"):
        ENSEMBLE.prepare(X)(X, key=key)


def test_inputs_are_read_as_those_of_the_ensemble() -> None:
    x = np.ones((N, 3), np.float32)
    run = SCALED.prepare(x, jnp.float32(2))
    expected = SCALED(x, 2.0)
    assert_close(run(x, 2.0), expected)
    assert_close(run(Foreign(x), Foreign(np.float32(2))), expected)
    given = x.copy()
    got = run(given, np.float32(2))
    given[:] = 99
    assert_close(got, expected)
    for wrong in (x[:2], x.astype(np.int32), [x]):
        with pytest.raises(InputError, match="prepared for inputs float32"):
            run(wrong, 2.0)
    with pytest.raises(InputError, match="round to 32 bits"):
        run(x.astype(np.float64), 2.0)
    with pytest.raises(InputError, match="by position"):
        run(x, by=2.0)
    with pytest.raises(InputError, match="Python numbers"):
        SCALED.prepare(x, 2.0)
    ids = Ensemble.from_modules([nnx.Embed(4, 2, rngs=nnx.Rngs(seed)) for seed in range(M)])
    with pytest.raises(InputError, match="does not fit int32"):
        ids.prepare(jnp.ones(3, jnp.int32))(np.array([0, 1, 2**40]))


def test_transformations_of_a_prepared_program() -> None:
    run = SCALED.prepare(jnp.ones((N, 3)), jnp.float32(2))
    x = jnp.zeros((N, 3))  # where relu has its own rule of differentiation
    arguments = x, jnp.float32(3)
    total = lambda call: lambda *inputs: call(*inputs).sum()  # noqa: E731
    assert_close(jax.jit(run)(*arguments), SCALED(*arguments))
    assert_close(jax.grad(total(run), (0, 1))(*arguments), jax.grad(total(SCALED), (0, 1))(*arguments))
    assert_close(jax.jit(jax.grad(total(run)))(*arguments), jax.grad(total(SCALED))(*arguments))
    stacked = jnp.stack([x, x + 1]), jnp.array([1.0, 2.0])
    assert_close(jax.vmap(run)(*stacked), jax.vmap(SCALED)(*stacked))
    with pytest.raises(InputError, match="within jax"):
        jax.jit(lambda x: SCALED.prepare(x, jnp.float32(2)) and 0)(x)


def test_donated_weights() -> None:
    for module, inputs in ((Net, (X,)), (Scaled, (jnp.ones((N, 3)), jnp.float32(2)))):
        ensemble = make_ensemble(module)
        expected = ensemble(*inputs)
        run = ensemble.prepare(*inputs, donate=True)
        assert_close(run(*inputs), expected)
        for call in (ensemble, ensemble.prepare, ensemble.tune):
            with pytest.raises(StateError, match="donate=True"):
                call(*inputs)
        with pytest.raises(StateError, match="without `donate`"):
            jax.jvp(run, inputs, inputs)
    deleted = [leaf.is_deleted() for leaf in jax.tree.leaves(ensemble.params)]
    assert deleted == [False, False]  # weights that the program reads as they are


def test_weights_that_others_took() -> None:
    inputs = jnp.ones((N, 3)), jnp.float32(2)
    ensemble = make_ensemble(Scaled)
    run = ensemble.prepare(*inputs)
    ensemble(*inputs)
    jax.tree.map(lambda leaf: leaf.delete(), ensemble.params)
    for call in (ensemble, ensemble.padded(), ensemble.explain, ensemble.tune, ensemble.prepare):
        with pytest.raises(StateError, match="arrays of this ensemble are deleted"):
            call(*inputs)
    for call in (run, jax.jit(run)):
        with pytest.raises(StateError, match="Prepare the program again"):
            call(*inputs)
    ensemble = make_ensemble()
    run, expected = ensemble.prepare(X), ensemble(X)
    ensemble.params["conv"]["bias"].delete()  # folded, so that the program reads another array
    assert_close(run(X), expected)
    assert_close(jax.jit(run)(X), expected)
    with pytest.raises(StateError, match="gave its arrays away"):
        jax.jvp(run, (X,), (X,))


def test_prepared_programs_within_jit_are_not_kept() -> None:
    def run() -> int:
        jax.block_until_ready(jax.jit(make_ensemble().prepare(X))(X))
        gc.collect()
        return len(jax.live_arrays())

    assert run() == run() == run()


def test_weights_read_as_they_are_are_kept_once() -> None:
    ensemble = make_ensemble(Scaled)
    inputs = jnp.ones((N, 3)), jnp.float32(2)
    run = ensemble.prepare(*inputs)
    weights = jax.tree.leaves(ensemble.params)
    assert run.weight_bytes == 0 and all(any(array is weight for weight in weights) for array in run.arrays)


def test_programs_for_several_shapes_share_their_arrays() -> None:
    ensemble = make_ensemble()
    ensemble(X)
    ensemble(X[:2])
    first, second = ensemble._runner._held.values()
    common = set(first.program.names) & set(second.program.names)
    assert common
    for name in common:
        one, other = (held.arrays[held.program.names.index(name)] for held in (first, second))
        assert one is other


def test_another_array_in_the_dicts_counts() -> None:
    ensemble = make_ensemble()
    run, before = ensemble.prepare(X), ensemble(X)
    ensemble.params["head"]["bias"] = ensemble.params["head"]["bias"] + 1
    assert_close(ensemble(X)["pair"][1], before["pair"][1] + 1)
    assert_close(run(X), before)
    assert_close(jax.jit(run)(X), before)


def test_new_ensembles_compile_nothing_and_leave_nothing() -> None:
    ensemble = make_ensemble()
    ensemble(X)
    programs = compile_call.cache_info().currsize
    arrays = len(jax.live_arrays())
    for k in range(3):
        ensemble.with_params(jax.tree.map(lambda leaf, k=k: leaf + k, ensemble.params))(X)
    assert compile_call.cache_info().currsize == programs
    assert len(jax.live_arrays()) <= arrays


def test_calls_within_transformations_leave_no_tracers() -> None:
    ensemble = make_ensemble()
    jax.jit(lambda y: ensemble(X)["pair"][1].sum() + y)(1.0)
    jax.vmap(lambda y: ensemble(X)["pair"][1].sum() + y)(jnp.ones(2))
    assert_close(ensemble(X), jax.jit(ensemble)(X))


def test_settings_of_jax_count_after_a_call() -> None:
    ensemble = make_ensemble()
    run, expected = ensemble.prepare(X), ensemble(X)
    with jax.disable_jit():
        assert_close(ensemble(X), expected)
        assert_close(run(X), expected)
        with pytest.raises(InputError, match="jax_disable_jit"):
            ensemble.prepare(X)
    with jax.debug_nans(True):
        for call in (ensemble, run):
            with pytest.raises(FloatingPointError):
                call(X.at[0].set(jnp.nan))
    with jax.enable_x64(True):
        wide = ensemble.astype("float64")
        precise = X.astype("float64")
        wide_run = wide.prepare(precise)
        exact = wide_run(precise)
        assert exact["pair"][1].dtype == np.float64
        assert_close(exact, expected)
    assert_close(wide_run(precise), exact)
    with pytest.raises(InputError, match=r"inputs float64\[5,6,6,3\]; got float32"):
        wide_run(X)
    held = len(ensemble._runner._held)
    with jax.default_matmul_precision("float32"):
        assert_close(ensemble(X), expected)
    assert len(ensemble._runner._held) == held + 1
    assert_close(ensemble(X), expected)


def test_copies_pickles_and_threads() -> None:
    ensemble = make_ensemble()
    expected = ensemble(X)
    copies = copy.copy(ensemble), copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))
    for other in (*copies, jax.tree.map(lambda leaf: leaf, ensemble), ensemble[:]):
        assert_close(other(X), expected)
    for wrong in (copy.deepcopy, pickle.dumps):
        with pytest.raises(StateError, match=r"copy its ensemble \(run.ensemble\)"):
            wrong(ensemble.prepare(X))
    fresh = make_ensemble()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda k: fresh(X) if k % 2 else fresh(X[:2]), range(16)):
            count = jax.tree.leaves(got)[1].shape[1]
            assert_close(got["pair"][1], expected["pair"][1][:, :count])


def test_prints_of_a_network_are_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Printing(Scaled):
        def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
            jax.debug.print("called")
            return self.linear(x)

    run = make_ensemble(Printing).prepare(jnp.ones((N, 3)))
    jax.block_until_ready(run(jnp.ones((N, 3))))
    jax.effects_barrier()
    assert "called" in capfd.readouterr().out


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxensemble import Ensemble, InputError

first, second = jax.devices()
ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(2)])
x = jnp.ones((4, 3))
expected = ensemble(x)
assert not expected.committed  # free to move, as the ensemble is
run = ensemble.prepare(x)
for other in (second, NamedSharding(Mesh(np.array([first, second]), "n"), PartitionSpec("n"))):
    moved = jax.device_put(x, other)
    got = ensemble(moved)
    assert got.devices() == moved.devices(), got.devices()
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    try:
        run(moved)
    except InputError as error:
        assert "jax.device_put" in str(error)
    else:
        raise AssertionError("an input on another device was taken")
away = jax.device_put(ensemble, second)
for call in (away, away.prepare(jax.device_put(x, second))):
    assert call(jax.device_put(x, second)).devices() == {second}
for free in (x, np.ones((4, 3), np.float32)):  # arrays that were put nowhere go where the weights are
    assert away(free).devices() == away.prepare(free)(free).devices() == {second}
assert len(away._runner._held) == 2
with jax.default_device(second):
    got = ensemble(x)
    assert got.devices() == {second} and not got.committed
    try:
        ensemble.prepare(x)
    except InputError as error:
        assert "jax_default_device" in str(error)
    else:
        raise AssertionError("a program was prepared for a device that is not the default one")
members = jax.device_put(ensemble, NamedSharding(Mesh(np.array([first, second]), "m"), PartitionSpec("m")))
np.testing.assert_allclose(members(x), expected, rtol=1e-6)
try:
    members.prepare(x)
except InputError as error:
    assert "sharding over a mesh" in str(error)
else:
    raise AssertionError("a sharded ensemble was prepared")
"""


def test_arrays_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(DEVICES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tuning_keeps_no_arrays_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXENSEMBLE_CACHE", str(tmp_path))
    ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(3)])
    x = jnp.ones((64, 3))
    ensemble(x)
    before = set(ensemble._runner._made[1])
    ensemble.tune(x)
    assert before and set(ensemble._runner._made[1]) == before
