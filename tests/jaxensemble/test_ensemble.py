"""M networks as one value: calls, members, slices, modes, and its use as a tree in JAX."""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxensemble import Constant, Ensemble, functional_call, vmap
from jaxensemble.errors import InputError, MemberError, StateError, TrainingModeWarning
from jaxensemble.modules.state import merge, split

MODES: tuple[Literal["eval", "train", "as_is"], ...] = ("eval", "train", "as_is")
TRACES: list[str] = []


class Net(nnx.Module):
    """A bit of everything: a shared table, batch statistics, dropout, a partial object, an integer buffer."""

    def __init__(self, rngs: nnx.Rngs, *, features: int = 2, rate: float = 0.5) -> None:
        self.linear = nnx.Linear(3, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.table = Constant(jnp.arange(float(features)))
        self.calls = nnx.Variable(jnp.array(0))
        self.act = functools.partial(jnp.clip, min=-1, max=1)

    def __call__(self, x: Any) -> jax.Array:
        TRACES.append("Net")
        self.calls[...] += 1
        return self.act(self.dropout(self.norm(self.linear(x))) + self.table)


class Structured(nnx.Module):
    """Takes trees and gives trees."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, batch: dict[str, Any], power: Any, mask: Any = None) -> dict[str, Any]:
        x = batch["x"] * self.scale**power
        return {"x": x, "pair": (x.sum(), batch["ids"]), "mask": mask}


def _modules(count: int = 3, **options: Any) -> list[Net]:
    modules = [Net(nnx.Rngs(seed), **options) for seed in range(count)]
    for module in modules:
        module.eval()
    return modules


ENSEMBLE = Ensemble.from_modules(_modules())
TRAINING = ENSEMBLE.train()
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
KEY = jax.random.key(0)


def _assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_plain(a), _plain(b)), a, b)


def _plain(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# calls


def test_all_members_see_the_same_minibatch() -> None:
    _close(ENSEMBLE(X), np.stack([module(X) for module in _modules()]))


def test_every_member_sees_a_minibatch_of_its_own() -> None:
    xs = np.stack([X, 2 * X, 3 * X])
    _close(ENSEMBLE.each(xs), np.stack([module(x) for module, x in zip(_modules(), xs, strict=True)]))


def test_one_member_is_fine() -> None:
    _close(Ensemble.from_modules(_modules(1))(X), _modules(1)[0](X)[None])


def test_trees_go_in_and_come_out() -> None:
    ensemble = Ensemble.from_modules([Structured(nnx.Rngs(seed)) for seed in range(2)])
    batch = {"x": np.ones((4, 3), np.float32), "ids": np.arange(4)}
    outputs = ensemble(batch, 2)
    assert jax.tree.map(jnp.shape, outputs) == {"x": (2, 4, 3), "pair": ((2,), (2, 4)), "mask": None}
    each = ensemble.each(jax.tree.map(lambda leaf: np.stack([leaf, leaf]), batch), np.array([2, 2]))
    _close(each["x"], outputs["x"])
    assert ensemble(batch, 2, np.ones(4, bool))["mask"].dtype == bool


def test_equal_structures_and_shapes_share_one_trace() -> None:
    def traced(run: Callable[[], Any]) -> int:
        before = len(TRACES)
        run()
        return len(TRACES) - before

    first, second = (Ensemble.from_modules(_modules(features=5)) for _ in range(2))
    assert traced(lambda: first(X)) == 2  # one to plan by, one to compile
    assert traced(lambda: [first(X), second(X), second(2 * X), jax.tree.map(jnp.copy, first)(X)]) == 0
    assert traced(lambda: first(X[:2])) == 2
    assert traced(lambda: [first(X[:2]), first(X)]) == 0


@pytest.mark.parametrize(
    ("run", "error", "text"),
    [
        (
            lambda: ENSEMBLE.each(X),
            InputError,
            "`each` must be [3, ...], one part for each member; got `inputs[0]` [4, 3]",
        ),
        (lambda: ENSEMBLE("x"), InputError, "`inputs[0]` must be an array; got builtins.str"),
        (lambda: ENSEMBLE({"a": object()}), InputError, "`inputs[0]['a']` must be an array; got builtins.object"),
        (
            lambda: ENSEMBLE(X.astype(object)),
            InputError,
            "`inputs[0]` must hold numbers or booleans; got a numpy array",
        ),
        (
            lambda: ENSEMBLE(X.astype(np.float64)),
            InputError,
            "`inputs[0]` is float64, which JAX would round to 32 bits",
        ),
        (lambda: ENSEMBLE(X.astype(complex)), InputError, "`inputs[0]` is complex128"),
        (
            lambda: ENSEMBLE(np.array([1, 2**32])),
            InputError,
            "`inputs[0]` is int64 and holds 4294967296, which does not fit int32",
        ),
        (lambda: ENSEMBLE(2**31), InputError, "`inputs[0]` is int64 and holds 2147483648, which does not fit int32"),
        (lambda: ENSEMBLE(-(2**80)), InputError, "which does not fit int32"),
        (lambda: TRAINING(X, key=0), InputError, "`key` must be one JAX random key, such as jax.random.key(0); got 0"),
        (lambda: TRAINING(X, key=jnp.ones(2)), InputError, "`key` must be one JAX random key"),
        (
            lambda: ENSEMBLE(X, randomness="error"),  # pyright: ignore[reportArgumentType]
            InputError,
            "`randomness` must be 'different' or 'same'; got 'error'",
        ),
    ],
)
def test_bad_calls(run: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        run()


def test_integers_that_fit_are_narrowed() -> None:
    embed = Ensemble.from_modules([nnx.Embed(5, 2, rngs=nnx.Rngs(seed)) for seed in range(2)])
    ids = np.array([0, 4], np.int64)
    _close(embed(ids), embed(ids.astype(np.int32)))
    assert ENSEMBLE(X.astype(">f4")).dtype == jnp.float32


def test_inputs_are_never_aliased() -> None:
    class Identity(nnx.Module):
        def __init__(self) -> None:
            self.one = nnx.Param(jnp.ones(()))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    ensemble = Ensemble.from_modules([Identity()])
    for size in (3, 1 << 12):
        x = np.zeros((1, size), np.float32)
        results = ensemble(x), ensemble.each(x)
        x[:] = 7
        assert all(float(result.max()) == 0 for result in results)


# randomness and state


def test_training_mode_needs_a_key_where_it_draws() -> None:
    text = "`dropout.rngs` draws random numbers, as dropout in training mode does: pass key=jax.random.key(0)"
    with pytest.raises(StateError, match=re.escape(text)):
        TRAINING(X)
    assert TRAINING(X, key=KEY).shape == (3, 4, 2)
    no_rate = Ensemble.from_modules(_modules(rate=0.0)).train()
    assert no_rate(X).shape == (3, 4, 2)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, ()), (0.1, ("itself",))])
def test_attention_without_dropout_has_no_training_mode(rate: float, expected: tuple[str, ...]) -> None:
    attention = nnx.MultiHeadAttention(2, 4, dropout_rate=rate, decode=False, rngs=nnx.Rngs(0))
    assert Ensemble.from_modules([attention]).train().graphdef.training_layers() == expected


class Split(nnx.Module):
    """Layers whose random streams are split, one key for each of them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones(3))
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs.fork())))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, self.scale * x).sum(0)


def test_random_state_that_is_not_given_begins_by_itself() -> None:
    graphdef: Any = nnx.graphdef(Net(nnx.Rngs(0)))
    with pytest.warns(TrainingModeWarning, match=r"Net is in training mode \(dropout, norm\): call `.eval\(\)` of"):
        ensemble = Ensemble(graphdef, ENSEMBLE.params, ENSEMBLE.buffers, ENSEMBLE.constants)
    np.testing.assert_array_equal(ensemble.eval()(X), ENSEMBLE(X))
    np.testing.assert_array_equal(ensemble(X, key=KEY), TRAINING(X, key=KEY))
    keys = jax.random.key_data(ensemble.rngs["dropout"]["rngs"]["key"])
    assert len(np.unique(keys, axis=0)) == 3
    no_keys = dataclasses.replace(ensemble, rngs={"dropout": {"rngs": {"count": jnp.zeros(3, jnp.uint32)}}})
    with pytest.raises(StateError, match=r"do not fit Net: missing rngs: dropout\.rngs\.key"):
        no_keys(X)


def test_random_streams_that_are_split_have_to_be_given() -> None:
    ensemble = Ensemble.from_modules([Split(nnx.Rngs(seed)) for seed in range(3)], mode="eval")
    with pytest.raises(InputError, match=r"(?s)Split cannot be called .*give `Ensemble` their `rngs`.*from_modules"):
        Ensemble(ensemble.graphdef, ensemble.params, ensemble.buffers)(X)
    with pytest.raises(InputError, match="Split cannot be called") as raised:
        ensemble(X[:, :2])
    assert "from_modules" not in str(raised.value)


class Linen(linen.Module):
    """Asks for a key only in training, where it draws."""

    training: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(2, name="fc")(x)
        return linen.Dropout(0.5, deterministic=not self.training)(x)


def test_modules_of_linen_need_a_key_only_where_they_draw() -> None:
    bridged = [nnx.bridge.ToNNX(Linen(training), rngs=nnx.Rngs(0, dropout=1)) for training in (False, True)]
    evaluating, training = bridged
    for module in bridged:
        module.lazy_init(X)
    ensemble = Ensemble.from_modules([evaluating, evaluating])
    expected = X @ ensemble.params["fc"]["kernel"]
    _close(ensemble(X), expected)
    _close(ensemble(X, key=KEY), expected)
    noisy = Ensemble.from_modules([training, training])
    with pytest.raises(StateError, match=r"(?s)`to_nnx__rngs\.\w+` draws random numbers.* \(Dropout_0 needs PRNG"):
        noisy(X)
    outputs = noisy(X, key=KEY)
    assert set(np.unique(np.isclose(outputs, 0) | np.isclose(outputs, 2 * expected, rtol=1e-5))) == {True}
    with pytest.raises(InputError, match="Linen cannot be called with"):
        ensemble(np.ones((4, 7), np.float32))
    mapped = vmap(lambda x: functional_call(evaluating, {}, x))(X)
    _close(mapped, expected[0])
    with pytest.raises(StateError, match="vmap: called random operation while in randomness error mode"):
        vmap(lambda x: functional_call(training, {}, x))(X)
    assert vmap(lambda x: functional_call(training, {}, x), randomness="different")(X).shape == (4, 2)


def test_members_draw_apart_unless_told_otherwise() -> None:
    twins = TRAINING[[0, 0]]
    x = np.ones((64, 3), np.float32) * np.arange(64)[:, None].astype(np.float32)
    different, same = twins(x, key=KEY), twins(x, key=KEY, randomness="same")
    assert bool(jnp.any(different[0] != different[1]))
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(different, twins(x, key=KEY))
    np.testing.assert_array_equal(different, twins(x, key=jax.random.PRNGKey(0)))
    assert bool(jnp.any(different != twins(x, key=jax.random.key(1))))


def test_layers_draw_apart() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.ones(()))
            self.layers = nnx.List([nnx.Dropout(0.5, rngs=nnx.Rngs(0)) for _ in range(2)])

        def __call__(self, x: jax.Array) -> Any:
            return [layer(x * self.scale) for layer in self.layers]

    first, second = Ensemble.from_modules([Two()], mode="as_is")(np.ones(64, np.float32), key=KEY)
    assert bool(jnp.any(first != second))


@pytest.mark.parametrize("each", [False, True])
def test_updating_gives_the_buffers_that_modules_have_after_a_call(each: bool) -> None:
    modules = _modules(rate=0.0)
    for module in modules:
        module.train()
    ensemble = Ensemble.from_modules(modules, mode="as_is")
    inputs = np.stack([X, 2 * X, 3 * X]) if each else X
    outputs, updated = ensemble.update(inputs, each=each)
    for member, module in enumerate(modules):
        _close(outputs[member], module(inputs[member] if each else inputs))
        _close(updated[member].norm.mean[...], module.norm.mean[...])
        _close(updated[member].norm.var[...], module.norm.var[...])
        assert int(updated[member].calls[...]) == 1
    _close(ensemble.buffers["norm"]["mean"], np.zeros((3, 2)))


def test_modes_are_flax_s() -> None:
    member = TRAINING[0]
    assert (member.norm.use_running_average, member.dropout.deterministic) == (False, False)
    assert TRAINING.eval().graphdef is ENSEMBLE.graphdef
    _close(TRAINING.eval()(X), ENSEMBLE(X))


class Growing(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.last = nnx.Variable(x)
        return x * self.scale


def test_a_call_that_makes_variables_cannot_update() -> None:
    ensemble = Ensemble.from_modules([Growing(), Growing()])
    assert ensemble(X).shape == (2, 4, 3)
    with pytest.raises(StateError, match="a call must not make or remove variables; this network's does: last"):
        ensemble.update(X)


# members


@pytest.mark.parametrize("index", [0, 2, -1, np.int64(1), jnp.array(1)])
def test_one_member_is_a_module_with_its_arrays(index: Any) -> None:
    member = ENSEMBLE[index]
    assert isinstance(member, Net)
    expected = _modules()[int(index)]
    for kind in ("params", "buffers", "constants"):
        _assert_trees_equal(getattr(split(member), kind), getattr(split(expected), kind))
    _close(member(X), expected(X))


@pytest.mark.parametrize(
    ("index", "members"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([0, 2], [0, 2]),
        ([-1, 0, 0], [2, 0, 0]),
        (np.array([True, False, True]), [0, 2]),
        ([False, True, False], [1]),
        (jnp.array([1]), [1]),
    ],
    ids=str,
)
def test_several_members_are_an_ensemble(index: Any, members: list[int]) -> None:
    part = ENSEMBLE[index]
    assert len(part) == len(members)
    _assert_trees_equal(part.params, jax.tree.map(lambda leaf: leaf[np.array(members)], ENSEMBLE.params))
    _close(part(X), ENSEMBLE(X)[np.array(members)])


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (3, IndexError, "there is no member 3: the ensemble has 3"),
        (-4, IndexError, "there is no member -4"),
        ([0, 5, -7], IndexError, "there are no members [5, -7]: the ensemble has 3"),
        ([True, False], IndexError, "one boolean for each of 3 members is needed; got 2"),
        (slice(3, None), MemberError, "slice(3, None, None) selects none of 3"),
        ([], MemberError, "[] selects none of 3"),
        ([0.5], InputError, "members are selected by integers, booleans or a slice; got [0.5]"),
        ("a", InputError, "members are selected by integers"),
        (1.0, InputError, "members are selected by integers"),
    ],
    ids=str,
)
def test_members_that_there_are_not(index: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        ENSEMBLE[index]


def test_iteration_gives_every_member() -> None:
    outputs = [member(X) for member in ENSEMBLE]
    _close(np.stack(outputs), ENSEMBLE(X))


def test_slices_and_concatenation_are_inverses() -> None:
    _assert_trees_equal(Ensemble.concatenate([ENSEMBLE[:1], ENSEMBLE[1:]]), ENSEMBLE)
    _assert_trees_equal(Ensemble.concatenate([ENSEMBLE]), ENSEMBLE)


def _table(value: float) -> Ensemble:
    table = jax.tree.map(lambda leaf: leaf + value, ENSEMBLE.constants)
    return dataclasses.replace(ENSEMBLE, constants=table)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: [], "Expected at least one ensemble, got 0."),
        (lambda: [ENSEMBLE, TRAINING], "ensemble 1, `dropout.deterministic`: expected True, got False"),
        (
            lambda: [ENSEMBLE, Ensemble.from_modules(_modules(features=5))],
            "`linear.kernel`: expected float32[3, 2], got",
        ),
        (lambda: [ENSEMBLE, ENSEMBLE, ENSEMBLE.astype(jnp.bfloat16)], "ensemble 2, `linear.bias`: expected float32[2]"),
        (lambda: [ENSEMBLE, _table(1.0)], "ensemble 1, `table`: a Constant has one value for all members"),
        (lambda: [ENSEMBLE, dataclasses.replace(ENSEMBLE, origin="x")], "the same `origin`; theirs differ"),
    ],
)
def test_only_ensembles_of_one_architecture_are_concatenated(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(MemberError, match=re.escape(text)) as caught:
        Ensemble.concatenate(make())
    assert str(caught.value).startswith("Ensemble.concatenate: ")


def test_modules_that_differ_make_no_ensemble() -> None:
    with pytest.raises(MemberError, match=re.escape("Ensemble.from_modules: Expected at least one model, got 0.")):
        Ensemble.from_modules([])
    with pytest.raises(MemberError, match=re.escape("member 1, `dropout.rate`: expected 0.5, got 0.1")):
        Ensemble.from_modules([*_modules(1), *_modules(1, rate=0.1)])


def test_arrays_must_agree_on_the_members() -> None:
    ensemble = dataclasses.replace(ENSEMBLE, buffers=ENSEMBLE[:2].buffers)
    with pytest.raises(InputError, match=re.escape("every array must be [M, ...]")):
        len(ensemble)
    with pytest.raises(InputError, match="there are no parameters and no buffers"):
        len(Ensemble(split(nnx.Dict()).graphdef, {}, {}))


# as a tree


def test_a_plain_graph_definition_is_taken() -> None:
    graphdef: Any = nnx.graphdef(_modules(1)[0])
    ensemble = Ensemble(graphdef, *ENSEMBLE.state[1:])
    assert ensemble.graphdef is ENSEMBLE.graphdef


def test_a_definition_and_arrays_that_do_not_fit_are_refused_at_once() -> None:
    graphdef: Any = nnx.graphdef(_modules(1)[0])
    _, params, buffers, constants, _ = ENSEMBLE.state
    with pytest.raises(
        StateError, match=r"(?s)do not fit Net: missing .*params: linear\.bias.*; unexpected .*buffers: linear"
    ):
        Ensemble(graphdef, buffers, params, constants)
    with pytest.raises(InputError, match=r"`params` must be nested dicts of arrays"):
        Ensemble(graphdef, _modules(1), buffers, constants)  # type: ignore[arg-type]
    module: Any = _modules(1)[0]
    with pytest.raises(
        InputError, match=r"as nnx.graphdef\(module\) gives it; got Net\..* Ensemble.from_modules\(modules\) makes"
    ):
        Ensemble(module, params, buffers, constants)


def test_modules_in_training_mode_are_told_unless_a_mode_says_that_they_are_meant() -> None:
    modules = _modules(2)
    for module in modules:
        module.norm.train()
    with pytest.warns(TrainingModeWarning, match=r"Net is in training mode \(norm\): mode='eval' is"):
        warned = Ensemble.from_modules(modules)
    training = {mode: Ensemble.from_modules(modules, mode=mode).graphdef.training_layers() for mode in MODES}
    assert training == {"eval": (), "train": ("dropout", "norm"), "as_is": ("norm",)}
    copied = jax.tree.map(lambda leaf: leaf, dataclasses.replace(warned, plan=None)[:1])  # no second warning
    assert copied.graphdef.training_layers() == ("norm",)
    with pytest.raises(InputError, match="`mode` must be 'eval', 'train' or 'as_is'; got 'evaluation'"):
        Ensemble.from_modules(modules, mode="evaluation")  # type: ignore[arg-type]


def test_it_passes_through_jax() -> None:
    _close(jax.jit(lambda ensemble, x: ensemble(x))(ENSEMBLE, X), ENSEMBLE(X))
    _close(jax.device_put(ENSEMBLE)(X), ENSEMBLE(X))
    doubled = jax.tree.map(lambda leaf: leaf, ENSEMBLE)
    assert isinstance(doubled, Ensemble)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ENSEMBLE)]
    assert paths[0] == ".params['linear']['bias']"
    updated = jax.jit(lambda ensemble, x: ensemble.update(x)[1])(ENSEMBLE, X)
    assert int(updated.buffers["calls"][0]) == 1


def test_gradients_have_the_shape_of_the_ensemble() -> None:
    gradient = jax.grad(lambda ensemble: ensemble(X).sum(), allow_int=True)(ENSEMBLE)
    assert isinstance(gradient, Ensemble)
    assert gradient.params["linear"]["kernel"].shape == (3, 3, 2)

    state = split(_modules()[1])

    def own(params: Any) -> jax.Array:
        return merge(ENSEMBLE.graphdef, params, *state[2:])(X).sum()

    expected = jax.grad(own)(state.params)
    jax.tree.map(lambda a, b: _close(a[1], b), gradient.params, expected)


def test_copies() -> None:
    twin = copy.deepcopy(ENSEMBLE)
    _assert_trees_equal(twin, ENSEMBLE)
    assert twin.params["linear"]["kernel"] is not ENSEMBLE.params["linear"]["kernel"]
    assert copy.copy(ENSEMBLE).params is ENSEMBLE.params


def test_members_are_mapped_by_jax_vmap_as_well() -> None:
    def member(params: Any, buffers: Any, rngs: Any) -> jax.Array:
        return merge(ENSEMBLE.graphdef, params, buffers, ENSEMBLE.constants, rngs)(X)

    _close(jax.vmap(member)(ENSEMBLE.params, ENSEMBLE.buffers, ENSEMBLE.rngs), ENSEMBLE(X))


# dtypes, and warnings


def test_only_floating_point_arrays_are_cast() -> None:
    half = ENSEMBLE.astype(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves((half.params, half.constants))} == {jnp.dtype(jnp.bfloat16)}
    assert half.buffers["calls"].dtype == jnp.int32
    assert half(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(half(X.astype(jnp.bfloat16)), half(jnp.asarray(X, jnp.bfloat16)))
    for dtype in (jnp.int8, bool):
        with pytest.raises(InputError, match="`dtype` must be a floating-point dtype"):
            ENSEMBLE.astype(dtype)
    with pytest.raises(InputError, match="`dtype` is float64, which JAX would round"):
        ENSEMBLE.astype("float64")


def test_a_float64_ensemble_is_not_rounded() -> None:
    with jax.enable_x64(True):
        double = ENSEMBLE.astype(jnp.float64)
        assert double(X.astype(np.float64)).dtype == jnp.float64
    with pytest.raises(InputError, match="the ensemble is float64, which JAX would round to 32 bits now: enable"):
        double(X)


def test_representations() -> None:
    assert repr(ENSEMBLE) == "Ensemble(3 x Net, 12 parameters each, float32, int32, 212 bytes)"
    assert repr(jax.tree.map(lambda leaf: None, ENSEMBLE)) == "Ensemble(Net)"
    shapes = jax.eval_shape(lambda ensemble: ensemble, ENSEMBLE)
    assert repr(shapes) == "Ensemble(Net)"


def test_source_is_the_network_s() -> None:
    with pytest.raises(StateError, match="there is no source: this ensemble was made from Flax modules"):
        ENSEMBLE.source()


def test_predictions() -> None:
    prediction: Any = ENSEMBLE.predict(X)
    _close(prediction.mean, jax.nn.softmax(ENSEMBLE(X)).mean(0))
    regression: Any = ENSEMBLE.predict(X, task="regression")
    _close(regression.mean, ENSEMBLE(X).mean(0))
    with pytest.raises(InputError, match=r"`axis`: no such .* outputs_are, class_axis, key, randomness, plan$"):
        ENSEMBLE.predict(X, axis=1)
    with pytest.raises(InputError, match=r"`task` must be .*; got \['classification'\]"):
        ENSEMBLE.predict(X, task=["classification"])


def test_predictions_of_networks_that_draw() -> None:
    training, key = ENSEMBLE.train(), jax.random.key(3)
    with pytest.warns(TrainingModeWarning, match=r"Net predicts in training mode \(norm\)"):
        prediction: Any = training.predict(X, key=key, randomness="same")
    _close(prediction.mean, jax.nn.softmax(training(X, key=key, randomness="same")).mean(0))


# PyTorch's tensors


def test_astype_reaches_embeddings_which_cast_to_what_they_were_made_with():
    ensemble = Ensemble.from_modules([nnx.Embed(5, 3, rngs=nnx.Rngs(seed)) for seed in range(2)])
    assert ensemble.astype("bfloat16")(jnp.array([1, 4])).dtype == jnp.bfloat16
    kept = Ensemble.from_modules([nnx.Embed(5, 3, dtype=jnp.float16, rngs=nnx.Rngs(0))]).astype("bfloat16")
    assert kept(jnp.array([1])).dtype == jnp.float16


def test_classes_of_one_name_are_told_apart():
    first, second = (Ensemble.from_modules([type("Net", (nnx.Linear,), {})(3, 2, rngs=nnx.Rngs(0))]) for _ in range(2))
    with pytest.raises(MemberError, match=r"expected Net, got another class Net"):
        Ensemble.concatenate([first, second])


def test_a_network_that_holds_nothing_has_no_members() -> None:
    class Nothing(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(x)

    with pytest.raises(InputError, match="member"):
        Ensemble.from_modules([Nothing(), Nothing()])(jnp.ones((2, 3)))


class Shifted(nnx.Module):
    """A parameter, a buffer and an array that is neither."""

    def __init__(self, seed: int) -> None:
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(seed))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(seed))
        self.table = nnx.Variable(jnp.arange(3.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.linear(x + self.table))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_what_is_no_parameter_has_no_gradient(training: bool, each: bool) -> None:
    ensemble = Ensemble.from_modules([Shifted(seed) for seed in range(3)], mode="as_is")
    ensemble = ensemble.train() if training else ensemble.eval()
    x = np.stack([X, X + 1, X - 1]) if each else X
    gradient = jax.grad(lambda ensemble: ((ensemble.each if each else ensemble)(x) ** 2).sum())(ensemble)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient.buffers))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient.params["linear"]))


def test_weight_decay_moves_parameters_and_nothing_else() -> None:
    ensemble = Ensemble.from_modules([Shifted(seed) for seed in range(3)], mode="as_is")
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    after, state = ensemble, optimizer.init(ensemble.params)
    for _ in range(10):
        gradients = jax.grad(lambda params, after=after: (after.with_params(params)(X) ** 2).sum())(after.params)
        updates, state = optimizer.update(gradients, state, after.params)
        after = after.with_params(optax.apply_updates(after.params, updates))
    _assert_trees_equal(after.buffers, ensemble.buffers)
    assert not np.array_equal(after.params["linear"]["kernel"], ensemble.params["linear"]["kernel"])


def test_other_parameters_have_the_same_names_and_shapes() -> None:
    params = {"fc": {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(3)}}
    ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(3)])
    with pytest.raises(StateError) as caught:
        ensemble.with_params(params)
    for text in ("bias: expected (3, 2), got none", "fc.scale: expected none, got (3,)", "kernel: expected (3, 3, 2)"):
        assert text in str(caught.value)
